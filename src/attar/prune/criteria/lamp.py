"""Importance by size within the layer, on a scale that all layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.prune.criteria.base import Criterion, criteria
from attar.prune.criteria.gradients import summed


@criteria.register("lamp")
class Lamp(Criterion):
    """Keeps the weights of largest w² beside their layer's no smaller ones: wᵤ² / Σ(v≥u) wᵥ².

    Weights are sorted by size, equal ones in their order; the largest of every layer scores 1.
    Scores are made for `scope: global` and compared across layers as they are; within a layer they
    rank as `magnitude`. Channels, an extension, score so by the squared L2 norm of the weights that
    make them. Source: Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning".
    """

    sides = ("out",)
    comparable = True

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        squares = summed(weight.double().square(), dim)
        order = torch.sort(squares.flatten(), stable=True).indices
        ranked = squares.flatten()[order]
        no_smaller = ranked.flip(0).cumsum(0).flip(0)
        scores = torch.empty_like(ranked)
        scores[order] = ranked / no_smaller.clamp_min(torch.finfo(ranked.dtype).tiny)
        return scores.view(squares.shape)
