"""Gradients of a loss on data: what criteria that ask for them share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from attar.errors import UsageError
from attar.prune.criteria.base import Call, Calls, Criterion, no_loss
from attar.training.gradients import loss_gradients, trainable_copy


class ByGradient(Criterion):
    """Scores by w · ∂L/∂w, the first-order change of the loss as a weight goes to zero.

    Gradients are taken on a copy of the network, frozen parameters' too, so that the one handed in
    keeps its parameters, buffers and gradients; the random state is kept as well. The copy answers
    in eval mode: with a batch's own statistics, a norm undoes the scale of the filter before it,
    and that filter's Σ w · ∂L/∂w would be zero whatever it does. A weight shared under several
    names has one gradient, the sum over its uses, and one score under each name.
    """

    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def products(self, module: nn.Module, calls: Calls) -> Iterator[dict[str, Tensor]]:
        """For each batch: w · ∂L/∂w by the parameter's (first) path, float64, of its shape."""
        first: dict[int, str] = {}
        every = module.named_parameters(remove_duplicate=False)
        self._names = {path: first.setdefault(id(p), path) for path, p in every}
        network = trainable_copy(module)
        weights = {path: p for path, p in network.named_parameters() if p.requires_grad}
        seen = False
        for item in calls():
            seen = True
            found = self._gradients(network, list(weights.values()), Call(*item))
            pairs = zip(weights.items(), found, strict=True)
            yield {path: weight.detach().double() * g.double() for (path, weight), g in pairs}
            self.step(list(weights.values()), found)
        if not seen:
            raise UsageError(f"{type(self).__name__} scores on data, but calls gives no batch")

    def step(self, weights: list[nn.Parameter], gradients: list[Tensor]) -> None:
        """What happens to the copy's weights after each batch: nothing."""

    def named(self, path: str) -> str:
        """The path that a weight's products are found by."""
        return self._names[path]

    def _gradients(
        self, network: nn.Module, weights: list[nn.Parameter], call: Call
    ) -> list[Tensor]:
        if call.loss is None:
            raise UsageError(no_loss(self))
        loss = call.loss
        return loss_gradients(
            lambda: loss(network(*call.args, **call.kwargs)), weights, type(self).__name__
        )


class SquaredProducts(ByGradient):
    """Scores by squares of w · ∂L/∂w, summed over a channel first, averaged over batches: estimates
    of what the loss changes by, whichever the layer."""

    comparable = True

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[tuple[str, int | None], Tensor] = {}
        self._batches = 0

    def observe(self, module: nn.Module, calls: Calls) -> None:
        self._sums, self._batches = {}, 0
        for products in self.products(module, calls):
            self._batches += 1
            for path, product in products.items():
                for dim in (None, *range(product.dim())):
                    squared = summed(product, dim).square()
                    known = self._sums.get((path, dim))
                    self._sums[path, dim] = squared if known is None else known.add_(squared)

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        return self._sums[self.named(path), dim] / self._batches


def summed(values: Tensor, dim: int | None) -> Tensor:
    """A weight's values summed for each index along `dim`; as they are with `None`."""
    rest = [d for d in range(values.dim()) if d != dim]
    return values if dim is None or not rest else values.sum(rest)
