"""Importance by a batch norm's scale: channels that it mutes can go."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attar.prune.criteria.base import Criterion, criteria
from attar.prune.criteria.magnitude import Magnitude


@criteria.register("bn-scale")
class BatchNormScale(Criterion):
    """Keeps the channels that their batch norm scales most: |γ| of y = γ · (x − μ)/σ + β.

    Of several batch norms that a channel goes through, the mean. Channels that go through none
    (or one without γ) are scored by `magnitude`, whose scores, like these, are divided by their
    layer's mean. Network slimming. Source: Liu et al. 2017, "Learning Efficient Convolutional
    Networks through Network Slimming", which also trains with an L1 penalty on γ.
    """

    granularities = ("channel",)
    sides: ClassVar[tuple[str, ...]] = ("scale",)
    fallback = Magnitude

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        return weight.abs()
