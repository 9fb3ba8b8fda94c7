"""Importance by the loss's curvature, as its gradients' spread over examples shows it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attar.prune.criteria.base import criteria
from attar.prune.criteria.gradients import SquaredProducts


@criteria.register("fisher")
class Fisher(SquaredProducts):
    """Keeps what the empirical Fisher information says costs most: 1/(2N) · Σₙ (Σ w · ∂Lₙ/∂w)².

    n runs over the N calls, the inner sum over a channel's weights in the layer that reads it: this
    is the gradient of a mask on the channel, as that layer sees it. Single weights score
    w² · Σₙ (∂Lₙ/∂w)² / 2N, the diagonal of the Fisher matrix. Calls are meant to be of one example
    each; of more, a batch's mean gradient takes the place of an example's, and what its examples
    cancel is not seen. Needs calls with their losses.
    Source: Theis et al. 2018, "Faster Gaze Prediction with Dense Networks and Fisher Pruning"
    (Δ = 1/2N Σ g²); Liu et al. 2021, "Group Fisher Pruning for Practical Network Compression" (the
    mask on what a layer reads). Where several layers read a channel, Liu et al. add their masks'
    gradients before squaring; here each layer's scores are averaged, as of every criterion.
    """

    by_example = True
    sides: ClassVar[tuple[str, ...]] = ("in",)

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        return super().scores(path, weight, dim) / 2
