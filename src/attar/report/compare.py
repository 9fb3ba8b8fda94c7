"""Runs side by side: what came out of each, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attar import numbers
from attar.report import sections, verdict
from attar.report.charts import Point, both_widths
from attar.report.page import render
from attar.report.record import RunRecord, read_run


def compare_reports(folders: Sequence[Path]) -> str:
    """One self-contained page with every run's final row, as HTML.

    Runs of different tasks or metrics share the table but no picture, and what makes figures
    incomparable (another processor, another test split) is said. Raises `UsageError` for a folder
    without a run.
    """
    runs = [read_run(Path(folder)) for folder in folders]
    names = _names(runs)
    return render(
        "compare.html.j2",
        title=f"{len(runs)} runs",
        rows=[_row(run, name) for run, name in zip(runs, names, strict=True)],
        pictures=_pictures(runs, names),
        cautions=_cautions(runs),
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Each run's name; its folder's too where several have the same."""
    names = [run.name for run in runs]
    return [
        f"{name} ({run.folder.resolve().name})" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def _row(run: RunRecord, name: str) -> dict[str, Any]:
    final = run.final
    shown = [row for row in sections.ledger(run) if row["role"] == "final"]
    budget = verdict.budget(run)
    return {
        "name": name,
        "task": str(run.ledger.get("task", "")),
        "metric_name": ((final or {}).get("metric") or {}).get("name", ""),
        "finished": run.finished,
        "row": shown[-1] if shown else None,
        "budget": budget,
    }


def _pictures(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    measures = {_measure(run) for run in runs if run.final}
    if len(measures) != 1:
        return []
    (metric, unit) = measures.pop()
    drawn = []
    for against, label, value, show in (
        ("latency", "median of one answer, ms", verdict.p50, "{:g}".format),
        ("size", "bytes of the model files", verdict.size_of, numbers.size),
    ):
        points = [
            _point(run, name, x)
            for run, name in zip(runs, names, strict=True)
            if run.final
            and (x := value(run.final))
            and (run.final.get("metric") or {}).get("value")
        ]
        if len(points) >= 2:
            title = f"{metric.capitalize()} against {against}"
            svg = both_widths(points, title, label, metric, show, unit)
            drawn.append({"title": title, "svg": svg})
    return drawn


def _measure(run: RunRecord) -> tuple[str, str]:
    metric = (run.final or {}).get("metric") or {}
    return str(metric.get("name", "metric")), str(metric.get("unit", "fraction"))


def _point(run: RunRecord, name: str, x: float) -> Point:
    metric = (run.final or {})["metric"]
    return Point(name, x, metric["value"], "final", metric.get("low"), metric.get("high"))


def _cautions(runs: Sequence[RunRecord]) -> list[str]:
    said = []
    if len({_processor(run) for run in runs if run.ledger}) > 1:
        said.append("The runs were measured on different processors: don't compare their speed.")
    if len({_measure(run) for run in runs if run.final}) > 1:
        said.append("The runs are judged by different metrics: don't compare those.")
    sizes = {((run.final or {}).get("metric") or {}).get("n") for run in runs if run.final}
    if len(sizes) > 1:
        said.append("The runs were tested on different numbers of examples.")
    targets = {_target(run) for run in runs if run.final}
    if len(targets) > 1:
        said.append("The runs were measured with different runtimes, batches or threads.")
    return said


def _processor(run: RunRecord) -> str:
    """Its name and instructions: virtual machines give different processors one name."""
    environment = run.ledger.get("environment") or {}
    return f"{environment.get('cpu')} {environment.get('instructions')}"


def _target(run: RunRecord) -> tuple[Any, ...]:
    latency = ((run.final or {}).get("latency") or [{}])[0]
    return tuple(latency.get(key) for key in ("runtime", "batch", "threads"))
