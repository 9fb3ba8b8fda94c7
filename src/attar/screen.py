"""A run on the terminal: live progress, each row of the ledger as it is measured, the verdict.

Where the output is no terminal (a pipe, a CI log) it is plain lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from attar import numbers
from attar.report import ledger_table
from attar.report.record import read_run

REFRESH = 8
"""Updates of the live line, a second."""

PLAIN_WIDTH = 160
"""Columns of an output that is no terminal."""

COLUMNS = (
    ("stage", "<12"), ("metric", ">10"), ("drop", ">13"), ("size", ">9"), ("one answer", ">11"),
    ("faster", ">7"), ("memory", ">8"),
)  # fmt: skip


def screen_console(*, stderr: bool = False) -> Console:
    """Where events are shown. What is no terminal has no width, so that no line is cut."""
    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


class Screen:
    """Listens to a run's events (`attar.events`) and shows them.

    Example:
        >>> with Screen() as screen:                              # doctest: +SKIP
        ...     attar.run(recipe, Path("runs/digits"), tell=screen)
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or screen_console()
        self._progress = _Progress()
        self._live: Live | None = None
        self._teacher: dict[str, Any] = {}
        self._unit = "fraction"

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        """The live line, once there is something to show: before, questions may be asked."""
        if self._live is None and self.console.is_terminal:
            self._live = Live(
                get_renderable=self._progress.line,
                console=self.console,
                refresh_per_second=REFRESH,
                transient=True,
            )
            self._live.start()

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, event: dict[str, Any]) -> None:
        show: Callable[[dict[str, Any]], None] | None = getattr(self, f"_{event['event']}", None)
        if show:
            show(event)

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, soft_wrap=True)

    def _run(self, event: dict[str, Any]) -> None:
        self._print(f"[bold]{escape(event['recipe'])}[/] → {escape(event['folder'])}")

    def _note(self, event: dict[str, Any]) -> None:
        self._print(f"note: {escape(event['text'])}", style="yellow")

    def _stage(self, event: dict[str, Any]) -> None:
        self._start()
        self._progress.stage = f"{event['name']} ({event['index']} of {event['of']})"
        self._progress.rest()
        stored = ", computed before" if event["cached"] else ""
        self._print(f"{self._progress.stage}{stored}", style="dim")

    def _step(self, event: dict[str, Any]) -> None:
        self._progress.step(event)

    def _epoch(self, event: dict[str, Any]) -> None:
        self._progress.epoch(event)
        if self._live is None:
            self._print(f"  {self._progress.words()}")

    def _trial(self, event: dict[str, Any]) -> None:
        self._print(f"  {trial_line(event, self._unit)}", style="dim")

    def _cell(self, event: dict[str, Any]) -> None:
        self._progress.cell(event)
        if self._live is None:
            self._print(f"  {self._progress.words()}")

    def _row(self, event: dict[str, Any]) -> None:
        row = event["row"]
        if not self._teacher:
            self._teacher = row
            self._unit = row["metric"]["unit"]
            self._print(_columns([name for name, _ in COLUMNS]), style="dim")
        self._print(_columns(_cells(row, self._teacher)), style="bold")
        self._progress.rest()

    def _done(self, event: dict[str, Any]) -> None:
        self._stop()
        ledger = read_run(Path(event["folder"])).ledger
        self.console.print()
        self.console.print(ledger_table(ledger))
        self.console.print()
        for figure in ledger["budget"].get("figures", []):
            self._print(budget_line(figure), style="green" if figure["met"] else "red")
        self._print(f"report: {escape(event['report'])}")


class _Progress:
    """The live line: stage, epoch (or layer), loss, metric, time left."""

    def __init__(self) -> None:
        self.stage = ""
        self.rest()

    def rest(self) -> None:
        """Nothing is being trained."""
        self._label = ""
        self._share: float | None = None
        self._loss: float | None = None
        self._metric: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._ends: float | None = None

    def step(self, event: dict[str, Any]) -> None:
        self._training(event)
        done = event["epoch"] - 1 + event["step"] / event["steps"]
        self._share = done / event["epochs"]
        if self._ends is None and self._share:
            elapsed = time.monotonic() - self._began
            self._ends = self._began + elapsed / self._share

    def epoch(self, event: dict[str, Any]) -> None:
        self._training(event)
        self._share = event["epoch"] / event["epochs"]
        self._metric = event["metric"]
        self._ends = time.monotonic() + event["eta_s"]

    def cell(self, event: dict[str, Any]) -> None:
        """Of a sensitivity analysis."""
        self._label = f"{event['name']} at {numbers.share(event['ratio'])}"
        self._epoch = f"{event['done']} of {event['of']}"
        self._share = event["done"] / event["of"]
        self._ends = self._began + (time.monotonic() - self._began) / self._share

    def _training(self, event: dict[str, Any]) -> None:
        if event["label"] != self._label:
            self.rest()
        self._label, self._loss = event["label"], event["loss"]
        self._epoch = f"epoch {event['epoch']} of {event['epochs']}"

    def words(self) -> str:
        if self._share is None:
            return ""
        parts = [self._label, self._epoch]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._metric:
            unit = self._metric.get("unit", "fraction")
            parts.append(f"{self._metric['name']} {numbers.metric(self._metric['value'], unit)}")
        if self._ends is not None and self._share < 1:
            parts.append(f"{numbers.seconds(max(0.0, self._ends - time.monotonic()))} left")
        return escape(" · ".join(parts))

    def line(self) -> Table:
        grid = Table.grid(padding=(0, 1))
        if self._share is not None:
            bar = ProgressBar(total=1, completed=self._share, width=24)
            grid.add_row(bar, self.words())
        elif self.stage:
            grid.add_row(f"{escape(self.stage)} …")
        return grid


def trial_line(event: dict[str, Any], unit: str = "fraction") -> str:
    """A `trial` event in words. unit: of the metric.

    Example:
        >>> trial_line({"setting": "bits", "value": 3, "bytes": 4210, "metric": 0.97,
        ...             "drop": 0.01, "kept": True})
        'tried bits = 3: 4.21 KB packed, drop 1.00, keeps the budget'
    """
    said = [f"{numbers.size(event['bytes'])} packed"] if "bytes" in event else []
    if event["drop"] is None:
        said.append(f"metric {numbers.metric(event['metric'], unit)}")
    else:
        said.append(f"drop {numbers.difference(event['drop'], unit)}")
    if event["kept"] is not None:
        said.append("keeps the budget" if event["kept"] else "too much")
    return f"tried {event['setting']} = {event['value']}: {', '.join(said)}"


def budget_line(figure: dict[str, Any]) -> str:
    """One limit of the budget: what was found, what was allowed, and by how much it is missed.

    Example:
        >>> budget_line({"name": "size", "limit": 50000, "value": 60000, "met": False,
        ...              "certain": False})
        'budget: size 60 KB, allowed 50 KB: over by 10 KB'
    """
    show = _SHOWN.get(figure["name"], str)
    value, limit = figure["value"], figure["limit"]
    if not figure["met"]:
        verdict = f"over by {show(value - limit)}"
    else:
        verdict = "met" if figure.get("certain") else "met by the estimate, not for certain"
    name = figure["name"].removesuffix("_ms").replace("_", " ")
    return f"budget: {name} {show(value)}, allowed {show(limit)}: {verdict}"


_SHOWN: dict[str, Callable[[Any], str]] = {
    "max_drop": lambda value: numbers.difference(value) + " points",
    "latency_ms": numbers.milliseconds,
    "size": numbers.size,
    "memory": numbers.size,
}


def _cells(row: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    unit = row["metric"]["unit"]
    latency = row["latency"][0]["p50_ms"]
    faster = numbers.ratio(teacher["latency"][0]["p50_ms"], latency)
    drop = row.get("drop")
    return [
        row["stage"],
        numbers.metric(row["metric"]["value"], unit),
        numbers.difference(drop["value"], unit) + numbers.points(unit) if drop else "",
        numbers.size(row["bundle"]["bytes"]),
        numbers.milliseconds(latency),
        numbers.times(faster),
        numbers.megabytes(row.get("memory_mb")),
    ]


def _columns(cells: list[str]) -> str:
    return " ".join(
        f"{cell:{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)
    ).rstrip()
