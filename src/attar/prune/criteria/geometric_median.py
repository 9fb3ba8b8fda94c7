"""Importance by being unlike the others: what a layer's other filters can stand in for goes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from attar.prune.criteria.base import Criterion, criteria


@criteria.register("geometric-median")
class GeometricMedian(Criterion):
    """Keeps the channels farthest from their layer's geometric median: Σⱼ ‖Fᵢ − Fⱼ‖₂.

    F are the weights that make each channel; those nearest to all others go, whatever their size.
    Source: He et al. 2019, "Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration" (FPGM).
    """

    granularities = ("channel",)
    sides: ClassVar[tuple[str, ...]] = ("out",)

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        filters = weight.movedim(dim or 0, 0).flatten(1).double()
        return torch.cdist(filters, filters).sum(1)
