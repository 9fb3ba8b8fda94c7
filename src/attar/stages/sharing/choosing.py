"""How few bits the budget allows: what `auto` and lists of settings try, and what is chosen."""

from __future__ import annotations

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

    candidates: list[int] = list(range(8, 0, -1))
    found = search(run, "bits", candidates, attempt)
    fewest, run.found["tried"] = found
    for point, trial in zip(curve, run.found["tried"], strict=True):
        point |= {"metric": trial["metric"], "chosen": trial["value"] == fewest}
    run.found["curve"] = curve
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
        own = replace(run.at(f"{setting}-{value}"), found={}, histories={})
        result = stage.having(**{setting: value}).shared(student.copy(), own)
        metric = run.evaluate(result.module)
        drop = None if baseline is None else sign * (baseline - metric)
        point = {setting: value, "bytes": packed_size(result), "metric": metric, "drop": drop}
        run.tell({"event": "trial", "setting": setting, "value": value, **point})
        curve.append(point)
        results.append((result, own))
    place = _choice(curve, run.max_drop, sign)
    for i, point in enumerate(curve):
        point["chosen"] = i == place
    result, own = results[place]
    run.found.update({**own.found, "curve": curve})
    run.histories.update(own.histories)
    return result


def _choice(curve: list[dict[str, Any]], limit: float | None, sign: int) -> int:
    """The place of the smallest within the limit, else of the best."""
    kept = [
        i
        for i, point in enumerate(curve)
        if limit is not None and point["drop"] is not None and point["drop"] <= limit
    ]
    if kept:
        return min(kept, key=lambda i: curve[i]["bytes"])
    return max(range(len(curve)), key=lambda i: sign * curve[i]["metric"])


def _tried(stage: Share, student: Student, run: Context, setting: str, value: Any) -> Student:
    """The student by one candidate, trained for a third as long."""
    recover = stage.recover
    if recover is not None:
        recover = recover.of(max(1, recover.epochs // 3))
    own = replace(run.at(f"{setting}-{value}"), found={}, histories={})
    short = stage.having(**{setting: value}, recover=recover)
    return short.shared(student.copy(), own)
