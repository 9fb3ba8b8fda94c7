"""What every benchmark shares: its options, its table, its last line."""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attar.measure.machine import environment

COMPARISONS = {">=": operator.ge, "<=": operator.le}
RESULTS = Path(__file__).parent / "results"


def options(description: str) -> argparse.ArgumentParser:
    """`--quick`, `--seeds N`, `--out FILE`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--out", type=Path, help="also write the last line to this file")
    return parser


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=140).print(table)


def processor_seconds(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of the processor: others may use it, too."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def conclude(
    name: str,
    arguments: argparse.Namespace,
    figures: dict[str, float],
    goals: dict[str, tuple[str, float]],
    **more: Any,
) -> None:
    """Prints the last line: one JSON object with the figures and whether they reach the goals."""
    judged = {k: COMPARISONS[sign](figures[k], goal) for k, (sign, goal) in goals.items()}
    line = json.dumps(
        {
            "benchmark": name,
            "quick": arguments.quick,
            "figures": figures,
            "goals": goals,
            "met": all(judged.values()),
            "environment": environment(),
            **more,
        }
    )
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)
