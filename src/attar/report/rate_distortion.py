"""The packed file's bytes against the metric: the settings that a share stage tried, and which it
chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attar import numbers
from attar.report.charts import Point, both_widths
from attar.report.record import RunRecord
from attar.report.verdict import metric_name, unit_of

Tried = Mapping[str, Any]


def points_of(found: Mapping[str, Any]) -> list[Tried]:
    """The settings tried, the smallest file first; none where the stage had but one to take."""
    curve = found.get("curve")
    if not isinstance(curve, Sequence):
        return []
    return sorted((point for point in curve if _whole(point)), key=lambda point: point["bytes"])


def rate_distortion(run: RunRecord, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The curve as a sentence, a picture and a table's rows. found: by the share stage."""
    points = points_of(found)
    if not points:
        return None
    unit, metric = unit_of(run.final), metric_name(run)
    setting = "bits" if "bits" in points[0] else "rate"
    most = (run.ledger.get("budget") or {}).get("max_drop")
    return {
        "said": " ".join([_chosen_said(points, setting, metric, _within(most, unit)), _on(found)]),
        "picture": _picture(points, setting, unit, metric, found.get("limit")),
        "setting": setting,
        "rows": [_row(point, setting, unit) for point in points],
    }


def _whole(point: object) -> bool:
    return (
        isinstance(point, Mapping)
        and numbers.known(point.get("bytes"))
        and point["bytes"] > 0
        and "metric" in point
        and ("bits" in point or "rate" in point)
    )


def _within(most: Any, unit: str) -> str:
    if not numbers.known(most):
        return ""
    return f" within {numbers.difference(most, unit)}{numbers.points(unit)}"


def _chosen_said(points: Sequence[Tried], setting: str, metric: str, within: str) -> str:
    """What was chosen, and why. within: the budget's limit on the drop, in words."""
    tried = f"{len(points)} tried"
    kept = f"kept the drop in {metric}{within or ' within the budget'}"
    chosen = next((point for point in points if point.get("chosen")), None)
    if chosen is None:
        return f"None of {tried} {kept}: nothing is shared."
    said = f"{setting} = {chosen[setting]}"
    if chosen.get("kept"):
        return f"{said}: of {tried}, the smallest file that {kept}."
    if chosen.get("kept") is None:
        return f"{said}: of {tried}, the best {metric}; no budget limits its drop."
    return f"None of {tried} {kept}: {said}, the best of them, was taken."


def _on(found: Mapping[str, Any]) -> str:
    said = "Figures are on validation, where the choice is made; the ledger’s are on test."
    if "tried" not in found:
        return said
    return f"{said} Each was trained for a third as long as what was chosen is afterwards."


def _picture(
    points: Sequence[Tried], setting: str, unit: str, metric: str, limit: Any
) -> dict[str, Any] | None:
    """The curve; a picture needs two points. limit: the metric where the budget's drop ends."""
    marks = [_mark(point, setting, unit) for point in points if numbers.known(point["metric"])]
    if len(marks) < 2:
        return None
    title = f"{metric.capitalize()} against bytes"
    svg = both_widths(
        marks,
        title,
        "bytes of the packed file",
        f"{metric}, on validation",
        numbers.size,
        unit,
        y_limit=limit if numbers.known(limit) else None,
        joined=True,
    )
    return {"title": title, "svg": svg}


def _mark(point: Tried, setting: str, unit: str) -> Point:
    value = point[setting]
    label = f"{value} bit{'s' * (value != 1)}" if setting == "bits" else f"{setting} {value}"
    shown = f"{numbers.size(point['bytes'])}, {numbers.metric(point['metric'], unit)}"
    role = "final" if point.get("chosen") else "stage"
    return Point(label, point["bytes"], point["metric"], role, tip=f"{label}: {shown}")


def _row(point: Tried, setting: str, unit: str) -> dict[str, Any]:
    kept = point.get("kept")
    verdict = "" if kept is None else "kept" if kept else "broken"
    chosen = "chosen" if point.get("chosen") else ""
    return {
        "value": str(point[setting]),
        "size": numbers.size(point["bytes"]),
        "metric": numbers.metric(point["metric"], unit),
        "drop": numbers.difference(point.get("drop"), unit),
        "verdict": ", ".join(word for word in (verdict, chosen) if word),
        "tone": {"kept": "kept", "broken": "missed"}.get(verdict, ""),
        "chosen": bool(chosen),
    }
