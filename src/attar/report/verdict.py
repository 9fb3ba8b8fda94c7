"""What came out of a run, in the few sentences that the figures allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attar import numbers
from attar.report.record import RunRecord

LIMITS = {
    "max_drop": "drop, on validation",
    "latency_ms": "one answer",
    "size": "size",
    "memory": "memory",
}


@dataclass(frozen=True)
class Tile:
    """One figure of the headline: its name, the figure, what it is compared to."""

    name: str
    value: str
    unit: str
    notes: list[str]


@dataclass(frozen=True)
class Factor:
    """A speed-up and its 95 % interval, as text, where it was timed in pairs."""

    value: float
    span: str = ""

    @property
    def width(self) -> float:
        """Its width in a bar: the logarithm, since factors multiply."""
        return round(max(math.log(self.value), 0.1), 3)


@dataclass(frozen=True)
class Split:
    """Where a speed-up comes from: factors, and the times they lead through.

    Each factor that was timed in pairs is an estimate of its own, so that they don't multiply to
    the total exactly.
    """

    total: Factor
    runtime: Factor
    compression: Factor
    teacher_ms: float
    exported_ms: float
    final_ms: float

    @property
    def paired(self) -> bool:
        """Whether the factors were timed in pairs, rather than taken from medians."""
        return bool(self.total.span)


def p50(row: dict[str, Any] | None) -> float | None:
    """A row's median latency in ms."""
    latency = (row or {}).get("latency") or [{}]
    return latency[0].get("p50_ms")


def size_of(row: dict[str, Any] | None) -> float | None:
    """A row's bytes."""
    return ((row or {}).get("bundle") or {}).get("bytes")


def unit_of(row: dict[str, Any] | None) -> str:
    return ((row or {}).get("metric") or {}).get("unit", "fraction")


def metric_name(run: RunRecord) -> str:
    """What the run's metric is called; `metric` where no row says it."""
    row = run.final or run.teacher or {}
    return str((row.get("metric") or {}).get("name", "metric"))


def sentence(run: RunRecord) -> str:
    """`23.0× smaller and 12.3× faster than the teacher.`"""
    if run.final is None:
        return "The student's first stage hasn't been measured yet."
    smaller = numbers.compared(size_of(run.teacher), size_of(run.final), "smaller", "larger")
    paired = split(run)
    times = (paired.total.value, 1.0) if paired else (p50(run.teacher), p50(run.final))
    faster = numbers.compared(*times, "faster", "slower")
    parts = [part for part in (smaller, faster) if part]
    return (
        " and ".join(parts) + " than the teacher."
        if parts
        else "As large and as fast as the teacher."
    )


def loss_sentence(run: RunRecord) -> str:
    """What may be said about the loss: "no loss" only where the interval excludes one."""
    drop = (run.final or {}).get("drop") or {}
    low, high = drop.get("low"), drop.get("high")
    if not numbers.known(low) or not numbers.known(high):
        return ""
    unit = unit_of(run.final)
    word = numbers.points(unit)
    bound = numbers.difference(high, unit) + word
    if high <= 0:
        return "No loss: the whole 95 % interval of the drop lies at zero or below."
    if low > 0:
        least = numbers.difference(low, unit) + word
        return f"A loss, and not by chance: at least {least}, at most {bound} (95 %)."
    n = ((run.final or {}).get("metric") or {}).get("n")
    examples = f"{numbers.count(n)} test examples leave" if numbers.known(n) else "this test leaves"
    return f"A loss is neither shown nor excluded: {examples} room for up to {bound} (95 %)."


def tiles(run: RunRecord) -> list[Tile]:
    """The headline's figures; those that weren't measured are left out."""
    final, teacher = run.final or {}, run.teacher or {}
    unit = unit_of(final)
    metric, drop = final.get("metric") or {}, final.get("drop") or {}
    found = [
        _tile(
            metric.get("name", "metric"),
            numbers.metric(metric.get("value"), unit),
            numbers.span(metric, numbers.metric, unit),
            _against(numbers.metric((teacher.get("metric") or {}).get("value"), unit)),
        ),
        _tile(
            "drop",
            numbers.difference(drop.get("value"), unit) + numbers.points(unit),
            numbers.span(drop, numbers.difference, unit),
            f"on {metric.get('split', 'test')}, same examples",
        ),
        _tile("size", numbers.size(size_of(final)), _against(numbers.size(size_of(teacher)))),
        _tile(
            "one answer",
            numbers.milliseconds(p50(final)),
            _against(numbers.milliseconds(p50(teacher))),
            _where(final),
        ),
        _tile(
            "memory",
            numbers.megabytes(final.get("memory_mb")),
            _against(numbers.megabytes(teacher.get("memory_mb"))),
        ),
    ]
    return [tile for tile in found if not tile.value.startswith(numbers.ABSENT)]


def split(run: RunRecord) -> Split | None:
    """The speed-up, and what of it the runtime and compression gave; `None` where a row is
    missing."""
    teacher, exported, final = p50(run.teacher), p50(run.row("exported")), p50(run.final)
    if teacher is None or exported is None or final is None or not run.finished:
        return None
    total, runtime, compression = (
        _factor(run, name, before, after)
        for name, before, after in (
            ("total", teacher, final),
            ("runtime", teacher, exported),
            ("compression", exported, final),
        )
    )
    if total is None or runtime is None or compression is None:
        return None
    return Split(total, runtime, compression, teacher, exported, final)


def _factor(run: RunRecord, name: str, before: float, after: float) -> Factor | None:
    """The ledger's paired ratio where it has one, else the ratio of the medians."""
    paired = (run.ledger.get("speedup") or {}).get(name) or {}
    value, low, high = (paired.get(key) for key in ("value", "low", "high"))
    if numbers.known(value) and numbers.known(low) and numbers.known(high) and value > 0:
        return Factor(value, f"{numbers.times(low).removesuffix('×')} to {numbers.times(high)}")
    ratio = numbers.ratio(before, after)
    return None if ratio is None else Factor(ratio)


def budget(run: RunRecord) -> dict[str, Any] | None:
    """The verdict (`kept`, `likely`, `missed`) in words, and a line per limit."""
    judged = run.ledger.get("budget") or {}
    limits = [name for name in LIMITS if judged.get(name) is not None]
    if not limits or "met" not in judged:
        return None
    figures = {f.get("name"): f for f in judged.get("figures") or []}
    lines = [_limit(name, judged[name], figures.get(name, {}), run) for name in limits]
    missed = [line["name"] for line in lines if line["state"] == "missed"]
    if not judged["met"]:
        state, short = "missed", "not met" + (": " + " and ".join(missed) if missed else "")
    elif judged.get("certain"):
        state, short = "kept", "met"
    else:
        state, short = "likely", "met by the estimates, not for certain"
    return {"state": state, "short": short, "said": f"Budget {short}", "lines": lines}


def _limit(name: str, limit: float, figure: dict[str, Any], run: RunRecord) -> dict[str, str]:
    unit = unit_of(run.final)

    def show(value: float | None) -> str:
        if name == "max_drop":
            return numbers.difference(value, unit) + numbers.points(unit)
        return numbers.milliseconds(value) if name == "latency_ms" else numbers.size(value)

    met, certain = figure.get("met"), figure.get("certain")
    state = "" if met is None else "missed" if not met else "kept" if certain else "likely"
    words = {"": "", "missed": "not met", "kept": "met", "likely": "met by the estimate"}
    return {
        "name": LIMITS[name],
        "limit": show(limit),
        "value": show(figure.get("value")),
        "bound": show(figure.get("bound")),
        "state": state,
        "said": words[state],
    }


def _tile(name: str, value: str, *notes: str) -> Tile:
    figure, _, unit = value.partition(" ")
    return Tile(name, figure, unit, [note for note in notes if note])


def _against(teacher: str) -> str:
    return "" if teacher.startswith(numbers.ABSENT) else f"teacher {teacher}"


def _where(row: dict[str, Any]) -> str:
    latency = (row.get("latency") or [{}])[0]
    if "runtime" not in latency:
        return ""
    threads = latency.get("threads", 1)
    plural = "thread" if threads == 1 else "threads"
    return f"{latency['runtime']}, batch {latency.get('batch', 1)}, {threads} {plural}"
