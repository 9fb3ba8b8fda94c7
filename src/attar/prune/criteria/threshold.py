"""Importance as an absolute size, to be compared with a threshold."""

from __future__ import annotations

from torch import Tensor

from attar.prune.criteria.base import Criterion, criteria


@criteria.register("threshold")
class Threshold(Criterion):
    """Removes what is smaller than `threshold`: a weight's |w|, a channel's mean |w|.

    How much goes is for the weights to say, not for a ratio. Source: Han et al. 2015, "Learning
    both Weights and Connections for Efficient Neural Networks".
    """

    sides = ("out",)

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        return weight.abs() if dim is None else weight.abs().movedim(dim, 0).flatten(1).mean(1)
