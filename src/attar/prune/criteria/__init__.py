"""Pruning criteria: what makes a weight or a channel important. One file each."""

from attar.prune.criteria.base import Call, Calls, Criterion, criteria

__all__ = ["Call", "Calls", "Criterion", "criteria"]
