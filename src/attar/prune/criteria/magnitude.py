"""Importance by size: small weights change little when they go."""

from __future__ import annotations

from torch import Tensor

from attar.prune.criteria.base import Criterion, criteria


@criteria.register("magnitude")
class Magnitude(Criterion):
    """Keeps the weights of largest size: the L1 norm of a channel's weights, Σ|w|.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks"
    (single weights); Li et al. 2017, "Pruning Filters for Efficient ConvNets" (channels).
    """

    order = 1

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return weight.abs()
        return weight.movedim(dim, 0).flatten(1).norm(p=self.order, dim=1)


@criteria.register("magnitude-l2")
class MagnitudeL2(Magnitude):
    """Keeps the channels of largest L2 norm, √Σw²; for single weights the same as `magnitude`.

    Source: He et al. 2018, "Soft Filter Pruning for Accelerating Deep Convolutional Networks".
    """

    order = 2
