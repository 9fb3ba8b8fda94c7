"""How few bits the budget allows: what `auto` and lists of settings try, and what is chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from attar.stages.base import Context
from attar.student import Student
from attar.student.packed import packed_size
from attar.tuning.auto import baseline_of, search

if TYPE_CHECKING:
    from attar.stages.share import Share


def fewest_bits(stage: Share, student: Student, run: Context) -> int | None:
    """The fewest bits that keep the budget on validation, each trained for a third as long."""
    curve: list[dict[str, Any]] = []

    def attempt(bits: int) -> nn.Module:
        trial = _tried(stage, student, run, "bits", bits)
        curve.append({"bits": bits, "bytes": packed_size(trial)})
        return trial.module

    found = search(run, "bits", range(8, 0, -1), attempt)
    fewest, tried = found
    for point, trial in zip(curve, tried, strict=True):
        point |= {key: trial[key] for key in ("metric", "drop", "kept")}
        point["chosen"] = trial["value"] == fewest
    run.found["tried"] = tried
    run.found.update(_curve(run, curve, baseline_of(run)))
    return fewest


def smallest(
    stage: Share, student: Student, run: Context, setting: str, candidates: list[Any]
) -> Student:
    """The student by the setting whose packed file is smallest among those that keep the budget
    (without a budget, or where none keeps it: that answers best). Every candidate is trained in
    full, and the one chosen isn't trained again."""
    baseline = baseline_of(run)
    sign = 1 if run.task.metric.higher_is_better else -1
    curve: list[dict[str, Any]] = []
    results: list[tuple[Student, Context]] = []
    for value in candidates:
        own = _apart(run, setting, value)
        result = stage.having(**{setting: value}).shared(student.copy(), own)
        metric = run.evaluate(result.module)
        drop = None if baseline is None else sign * (baseline - metric)
        kept = None if drop is None or run.max_drop is None else drop <= run.max_drop
        size = packed_size(result)
        found = {"bytes": size, "metric": metric, "drop": drop, "kept": kept}
        run.tell({"event": "trial", "setting": setting, "value": value, **found})
        curve.append({setting: value, **found})
        results.append((result, own))
    place = _choice(curve, sign)
    for i, point in enumerate(curve):
        point["chosen"] = i == place
    result, own = results[place]
    run.found.update(own.found)
    run.found.update(_curve(run, curve, baseline))
    run.histories.update(own.histories)
    if all(point["kept"] is False for point in curve):
        text = f"share: no {setting} of the list keeps the budget's max_drop on validation"
        run.tell({"event": "note", "text": f"{text}; {candidates[place]}, the best, is taken"})
    return result


def _choice(curve: list[dict[str, Any]], sign: int) -> int:
    """The place of the smallest that keeps the budget, else of the best; of equally good ones, of
    the smaller."""
    kept = [i for i, point in enumerate(curve) if point["kept"]]
    if kept:
        return min(kept, key=lambda i: curve[i]["bytes"])

    def quality(i: int) -> tuple[float, int]:
        metric = sign * curve[i]["metric"]
        return (-math.inf if math.isnan(metric) else metric, -curve[i]["bytes"])

    return max(range(len(curve)), key=quality)


def _curve(run: Context, curve: list[dict[str, Any]], baseline: float | None) -> dict[str, Any]:
    """What a page draws: the points, and the metric at which the budget's drop is used up."""
    if baseline is None or run.max_drop is None:
        return {"curve": curve}
    sign = 1 if run.task.metric.higher_is_better else -1
    return {"curve": curve, "limit": baseline - sign * run.max_drop}


def _tried(stage: Share, student: Student, run: Context, setting: str, value: Any) -> Student:
    """The student by one candidate, trained for a third as long."""
    recover = stage.recover
    if recover is not None:
        recover = recover.of(max(1, recover.epochs // 3))
    short = stage.having(**{setting: value}, recover=recover)
    return short.shared(student.copy(), _apart(run, setting, value))


def _apart(run: Context, setting: str, value: Any) -> Context:
    """A candidate's own context: its folder, and a name of its own for its trainings."""

    def tell(event: dict[str, Any]) -> None:
        if "label" in event:
            event = {**event, "label": f"{event['label']}, {setting} = {value}"}
        run.tell(event)

    return replace(run.at(f"{setting}-{value}"), found={}, histories={}, tell=tell)
