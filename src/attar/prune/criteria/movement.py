"""Importance by movement: weights that training pulls towards zero can go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attar.prune.criteria.base import Calls, criteria
from attar.prune.criteria.gradients import ByGradient, summed


@criteria.register("movement")
class Movement(ByGradient):
    """Keeps the weights that training moves away from zero: S = −Σₜ wₜ · ∂Lₜ/∂wₜ over SGD steps.

    t runs over the batches, one step of plain SGD on a copy of the network each; a channel's S is
    the sum of its weights'. Scores are S less the smallest of the layer, so that none is negative.
    Needs batches with their losses. lr: the steps' learning rate.
    Source: Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning";
    Lagunas et al. 2021, "Block Pruning For Faster Transformers" (sums over blocks).
    """

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self._moved: dict[str, Tensor] = {}

    def observe(self, module: nn.Module, calls: Calls) -> None:
        self._moved = {}
        for products in self.products(module, calls):
            for path, product in products.items():
                known = self._moved.get(path)
                self._moved[path] = -product if known is None else known.sub_(product)

    def step(self, weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=self.lr)

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        moved = summed(self._moved[self.named(path)], dim)
        return moved - moved.min()
