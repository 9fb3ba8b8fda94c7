"""A task's metric, and how much worse it became, with their intervals."""

from __future__ import annotations

import numpy as np

from attar.measure.intervals import (
    Interval,
    bootstrap_interval,
    paired_bootstrap_drop,
    paired_share_drop,
    share_interval,
)
from attar.tasks.base import Task


def metric_interval(task: Task, statistics: np.ndarray) -> Interval:
    """The metric of these examples with its 95 % interval."""
    hits = task.hits(statistics)
    if hits is not None:
        return share_interval(hits)
    return bootstrap_interval(task.value, statistics)


def metric_drop(task: Task, before: np.ndarray, after: np.ndarray) -> Interval:
    """How much worse the metric became on the same examples, with its 95 % interval."""
    hits = task.hits(before), task.hits(after)
    if hits[0] is not None and hits[1] is not None:
        return paired_share_drop(hits[0], hits[1])
    return paired_bootstrap_drop(
        task.value, before, after, higher_is_better=task.metric.higher_is_better
    )
