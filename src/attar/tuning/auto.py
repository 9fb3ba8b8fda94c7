"""The strongest setting that keeps the budget: what `ratio: auto` and `bits: auto` look for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from attar.errors import UsageError
from attar.events import Listener, silent
from attar.stages.base import Context

Value = TypeVar("Value")


def strongest(
    setting: str,
    candidates: Sequence[Value],
    attempt: Callable[[Value], float],
    limit: float,
    tell: Listener = silent,
    *,
    baseline: float | None = None,
    higher_is_better: bool = True,
) -> tuple[Value | None, list[dict[str, Any]]]:
    """The strongest of `candidates` whose drop stays within `limit`, by bisection.

    setting: what is searched, for the `trial` events. candidates: from the weakest to the
    strongest; a stronger one is taken to drop no less than a weaker one, and where noise breaks
    that, the one returned still kept the limit when it was tried. attempt: a candidate's drop of
    the validation metric, as a fraction; tried at most ceil(log2 n) + 1 times. baseline: what drops
    are counted from; with it, trials tell the metric too.

    Returns the value, `None` when even the weakest tried breaks the limit, and the trials in order
    as `trial` events without the event's name.

    Example:
        >>> strongest("ratio", [0.2, 0.4, 0.6, 0.8], lambda ratio: ratio / 100, limit=0.005)[0]
        0.4
    """
    tried: list[dict[str, Any]] = []
    best: Value | None = None
    low, high = 0, len(candidates) - 1
    while low <= high:
        middle = (low + high + 1) // 2
        drop = float(attempt(candidates[middle]))
        kept = drop <= limit
        metric = None if baseline is None else baseline - (drop if higher_is_better else -drop)
        trial = {"setting": setting, "value": candidates[middle], "metric": metric}
        tried.append({**trial, "drop": drop, "kept": kept})
        tell({"event": "trial", **tried[-1]})
        if kept:
            best, low = candidates[middle], middle + 1
        else:
            high = middle - 1
    return best, tried


def search(
    run: Context,
    setting: str,
    candidates: Sequence[Value],
    make: Callable[[Value], nn.Module],
) -> tuple[Value | None, list[dict[str, Any]]]:
    """`strongest` within a stage: the limit is the budget's, drops are counted on validation.

    make: the network that a candidate gives, recovered if it will be. Raises `UsageError` without
    a budget to keep.
    """
    if run.max_drop is None:
        raise UsageError(
            f"{setting}: auto looks for the strongest that keeps the budget, and there is none: "
            "set budget.max_drop (for instance 1%), or give a number"
        )
    baseline = baseline_of(run)
    if baseline is None:
        raise UsageError(f"{setting}: auto needs a teacher to count the drop from")
    sign = 1 if run.task.metric.higher_is_better else -1
    return strongest(
        setting,
        candidates,
        lambda value: sign * (baseline - run.evaluate(make(value))),
        run.max_drop,
        run.tell,
        baseline=baseline,
        higher_is_better=sign == 1,
    )


def baseline_of(run: Context) -> float | None:
    """The validation metric that drops are counted from: the teacher's; `None` without one."""
    if run.baseline is not None:
        return run.baseline
    return None if run.teacher is None else run.evaluate(run.teacher)
