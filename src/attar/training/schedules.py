"""How the learning rate moves over a training."""

from __future__ import annotations

import math

from attar.training.config import Schedule


def rate_factor(schedule: Schedule, progress: float) -> float:
    """What the base rate is multiplied by at `progress`, the share of all steps done (0 to 1).

    Warm-up is linear; `cosine` (Loshchilov & Hutter 2017, eq. 5 without restarts) and `linear`
    then fall to zero, `steps` falls by `factor` at each milestone.

    >>> rate_factor(Schedule(name="cosine", warmup=0), 0.5)
    0.5
    """
    if progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "steps":
        return schedule.factor ** sum(progress >= m for m in schedule.milestones)
    rest = (progress - schedule.warmup) / (1 - schedule.warmup)
    return (1 + math.cos(math.pi * rest)) / 2 if schedule.name == "cosine" else 1 - rest
