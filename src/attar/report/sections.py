"""The page's sections as plain values: what the templates show, with every figure already text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from attar import numbers
from attar.report.charts import Point, both_widths
from attar.report.found import human
from attar.report.record import BASELINES, RunRecord
from attar.report.verdict import p50, size_of, unit_of

MOST_LOST = 12
"""Classes shown at once; the others are folded away."""
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")
ABBREVIATIONS = {"auc": "AUC"}


def ledger(run: RunRecord) -> list[dict[str, Any]]:
    """The ledger's rows, figures as text."""
    return [_ledger_row(row, run) for row in run.rows]


def role(row: dict[str, Any], run: RunRecord) -> str:
    """How a row is drawn: `teacher`, `baseline`, `stage` or `final`."""
    stage = row.get("stage")
    if stage == "teacher":
        return "teacher"
    if stage in BASELINES:
        return "baseline"
    return "final" if row is run.final else "stage"


def pictures(run: RunRecord) -> list[dict[str, Any]]:
    """Accuracy against latency and against size; a picture needs two rows that have both."""
    limits = run.ledger.get("budget") or {}
    rows = [row for row in run.rows if metric_value(row) is not None]
    name = ((run.final or {}).get("metric") or {}).get("name", "metric")
    unit = unit_of(run.final)
    wanted: list[tuple[str, str, Callable[[Any], float | None], str, Any]] = [
        ("latency", "median of one answer, ms", p50, "latency_ms", "{:g}".format),
        ("size", "bytes of the model files", size_of, "size", numbers.size),
    ]
    drawn = []
    for against, label, value, limit, show in wanted:
        points = [_point(row, run, value, against == "latency") for row in rows if value(row)]
        if len(points) >= 2:
            title = f"{name.capitalize()} against {against}"
            svg = both_widths(points, title, label, name, show, unit, limits.get(limit))
            drawn.append({"title": title, "svg": svg})
    return drawn


def classes(run: RunRecord) -> dict[str, Any] | None:
    """Accuracy per class, teacher and final, those that lost most first."""
    per_class = run.details.get("per_class") or {}
    names = run.details.get("classes") or []
    before, after = per_class.get("teacher") or [], per_class.get("final") or []
    if not names or len(before) != len(names) or len(after) != len(names):
        return None
    shares = [v for v in [*before, *after] if numbers.known(v)]
    if not shares:
        return None
    low = max(0.0, min(shares) - 0.02)
    examples = per_class.get("n") or [None] * len(names)
    lines = [
        _class_line(str(name), b, a, n, low)
        for name, b, a, n in zip(names, before, after, examples, strict=False)
    ]
    lines.sort(key=lambda line: -line["lost"])
    return {
        "shown": lines[:MOST_LOST],
        "folded": lines[MOST_LOST:],
        "low": numbers.metric(low),
        "all": len(lines),
    }


def wrong(run: RunRecord) -> list[dict[str, Any]]:
    """Examples that the teacher had right and the final model has wrong."""
    names = run.details.get("classes") or []
    return [_wrong(example, names) for example in run.details.get("wrong") or []]


def notes(run: RunRecord) -> list[str]:
    """What was decided on the person's behalf, and said while it ran; each once."""
    said = [e.get("text") for e in run.events if e["event"] == "note"]
    every = [*(run.details.get("notes") or []), *said]
    return list(dict.fromkeys(str(note) for note in every if note))


def _ledger_row(row: dict[str, Any], run: RunRecord) -> dict[str, Any]:
    unit = unit_of(row)
    metric, drop = row.get("metric") or {}, row.get("drop") or {}
    parity = row.get("parity") or {}
    latency = row.get("latency") or []
    first = latency[0] if latency else {}
    teacher = run.teacher
    is_teacher = row is teacher
    return {
        "stage": str(row.get("stage", "")),
        "role": role(row, run),
        "runtime": str(first.get("runtime", "")),
        "metric": numbers.metric(metric.get("value"), unit),
        "metric_span": numbers.span(metric, numbers.metric, unit),
        "drop": "" if is_teacher else numbers.difference(drop.get("value"), unit),
        "drop_span": numbers.span(drop, numbers.difference, unit),
        "agreement": numbers.metric(row["agreement"]) if "agreement" in row else "",
        "parameters": numbers.count(row.get("parameters")),
        "nonzero": _fewer(row.get("nonzero"), row.get("parameters")),
        "macs": numbers.count(row.get("macs")),
        "size": numbers.size(size_of(row)),
        "packed": numbers.size(row.get("packed_bytes")),
        "size_ratio": numbers.compared(size_of(teacher), size_of(row), "smaller", "larger"),
        "p50": _plain_ms(first.get("p50_ms")),
        "p90": _plain_ms(first.get("p90_ms")),
        "speed_ratio": numbers.compared(p50(teacher), p50(row), "faster", "slower"),
        "passes_off": _plain_ms((row.get("graph") or {}).get("passes_off_p50_ms")),
        "memory": numbers.megabytes(row.get("memory_mb")),
        "parity": f"{parity['max_abs_diff']:.1e}"
        if numbers.known(parity.get("max_abs_diff"))
        else "",
        "parity_same": numbers.metric(parity.get("agreement")).replace(".00", ""),
        "seconds": numbers.seconds(row.get("seconds")),
    }


def further(run: RunRecord) -> dict[str, Any] | None:
    """What the task measures beside its metric, on test: a table with a row a stage."""
    values = [((row.get("metric") or {}).get("further") or {}) for row in run.rows]
    names = list(dict.fromkeys(name for one in values for name in one))
    if not names:
        return None
    return {
        "kind": "table",
        "columns": ["stage", *(_metric_name(name) for name in names)],
        "numeric": [False, *(True for _ in names)],
        "rows": [
            [str(row.get("stage", "")), *(_four_decimals(one.get(name)) for name in names)]
            for row, one in zip(run.rows, values, strict=True)
        ],
    }


def _metric_name(key: str) -> str:
    """`balanced_accuracy` as words, `auc` as the abbreviation it is."""
    return ABBREVIATIONS.get(key, human(key))


def _four_decimals(value: Any) -> str:
    return f"{value:.4f}" if numbers.known(value) else numbers.ABSENT


def _fewer(nonzero: Any, parameters: Any) -> str:
    """How many parameters aren't zero, where some are."""
    return numbers.count(nonzero) if numbers.known(nonzero) and nonzero != parameters else ""


def metric_value(row: dict[str, Any]) -> float | None:
    """The row's metric on test, where it was measured."""
    value = (row.get("metric") or {}).get("value")
    return value if numbers.known(value) else None


def _point(
    row: dict[str, Any], run: RunRecord, x: Callable[[Any], float | None], spread: bool
) -> Point:
    metric, unit = row["metric"], unit_of(row)
    line = _ledger_row(row, run)
    span = f" ({line['metric_span']})" if line["metric_span"] else ""
    latency = (row.get("latency") or [{}])[0]
    return Point(
        label=line["stage"],
        x=x(row) or 1.0,
        y=metric["value"],
        role=line["role"],
        low=metric.get("low"),
        high=metric.get("high"),
        x_high=latency.get("p90_ms") if spread else None,
        tip=f"{line['stage']}: {numbers.metric(metric['value'], unit)}{span}, "
        f"{line['size']}, {line['p50']} ms",
    )


def _class_line(name: str, before: Any, after: Any, n: Any, low: float) -> dict[str, Any]:
    both = numbers.known(before) and numbers.known(after)
    lost = before - after if both else 0.0

    def place(share: Any) -> float:
        return round(100 * (share - low) / (1 - low), 2) if numbers.known(share) else 0.0

    return {
        "name": name,
        "before": numbers.metric(before),
        "after": numbers.metric(after),
        "lost": lost,
        "change": numbers.difference(-lost) if lost <= 0 else f"−{numbers.difference(lost)}",
        "sign": "lost" if lost > 0 else "won" if lost < 0 else "same",
        "n": numbers.count(n),
        "known": both,
        "from": min(place(before), place(after)),
        "to": max(place(before), place(after)),
        "at_before": place(before),
        "at_after": place(after),
    }


def _wrong(example: dict[str, Any], names: list[Any]) -> dict[str, Any]:
    def named(value: Any) -> str:
        known = isinstance(value, int) and 0 <= value < len(names)
        return str(names[value]) if known else str(value)

    image = example.get("image")
    return {
        "index": example.get("index"),
        "true": named(example.get("true")),
        "student": named(example.get("student")),
        "confidence": f"{100 * example['confidence']:.0f} %"
        if numbers.known(example.get("confidence"))
        else "",
        "image": image if isinstance(image, str) and PICTURE.fullmatch(image) else None,
    }


def _plain_ms(value: float | None) -> str:
    return numbers.milliseconds(value).removesuffix(" ms")
