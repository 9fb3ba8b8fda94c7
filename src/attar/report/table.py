"""The ledger where there is no page: on a terminal, in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.report import sections, verdict
from attar.report.page import render
from attar.report.record import RunRecord

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"teacher": "", "baseline": "dim", "stage": "", "final": "bold magenta"}


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """The ledger (as `ledger.json` has it) for the terminal: `rich.print(ledger_table(ledger))`."""
    from rich.table import Table
    from rich.text import Text

    run = RunRecord(Path(), ledger=dict(ledger))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for column in (verdict.metric_name(run), "", "drop", "", "size", "ms", "90th", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sections.ledger(run):
        bounds = (_narrow(row["metric_span"]), _narrow(row["drop_span"]))
        figures = (row["metric"], bounds[0], row["drop"], bounds[1])
        timings = (row["size"], row["p50"], row["p90"], row["memory"])
        cells = [Text(text) for text in (row["stage"], *figures, *timings)]  # names aren't markup
        for place in (2, 4):
            cells[place].stylize("dim")
        table.add_row(*cells, style=STYLES[row["role"]])
    return table


def ledger_html(ledger: Mapping[str, Any]) -> str:
    """The ledger as a small HTML table that fits a notebook's own style."""
    run = RunRecord(Path(), ledger=dict(ledger))
    return render(
        "notebook.html.j2",
        rows=sections.ledger(run),
        sentence=verdict.sentence(run) if run.final else "",
        metric_name=verdict.metric_name(run),
    )


def _narrow(span: str) -> str:
    return span.replace(" %", "").replace(" to ", "…")
