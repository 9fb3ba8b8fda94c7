"""Training that feels the weights' integer grid: what `recover` does in the quantize stage."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attar.data.base import Batch
from attar.training.objective import Objective

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class OnGrid(Objective):
    """Another objective, asked of the network with its weights rounded to their integer grid.

    Each convolution's and linear layer's weight is rounded as the quantized graph will round it: to
    `bits` bits (±64 steps for 7, ±127 for 8), symmetric, with a scale an output channel, or a
    tensor where `per_tensor` names it; a batch norm that follows scales a channel as a whole and
    doesn't change that. Gradients pass the rounding as if it were not there (straight-through
    estimator, Bengio et al. 2013, section 4), so the network that is trained stays a float one.
    Activations are computed in float: their grids are chosen after the training.

    Example:
        >>> objective = OnGrid(recovery_objective(task, teacher, training))  # doctest: +SKIP
        >>> train(net, objective=objective, ...)  # doctest: +SKIP
    """

    def __init__(
        self,
        inner: Objective,
        *,
        bits: int = 8,
        per_tensor: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.inner = inner
        self._largest = min(127, 2 ** (bits - 1))
        self._per_tensor = frozenset(per_tensor)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.inner.start_epoch(epoch, epochs)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        weights = {
            path: rounded(weight, self._largest, per_tensor=path in self._per_tensor)
            for path, weight in self._weights(model).items()
        }
        return self.inner(_Rounded(model, weights), batch)

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            f"{path}.weight": layer.weight
            for path, layer in model.named_modules()
            if isinstance(layer, LAYERS)
        }


class _Rounded(nn.Module):
    """The network, computing with other weights; it isn't a part of this module."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = (network, weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        network, weights = self._call
        return functional_call(network, weights, args, kwargs)


def rounded(weight: Tensor, largest: int, *, per_tensor: bool = False) -> Tensor:
    """A weight (output channels first) on its symmetric grid of ±`largest` steps; its gradient is
    that of the weight itself.

    >>> rounded(torch.tensor([[0.9, -2.0]]), 2).tolist()
    [[1.0, -2.0]]
    """
    values = weight.detach()
    extent = values.abs().amax() if per_tensor else values.abs().flatten(1).amax(1)
    shape = () if per_tensor else (-1, *[1] * (weight.dim() - 1))
    step = (extent / largest).clamp_min(torch.finfo(weight.dtype).tiny).reshape(shape)
    return weight + (torch.round(values / step) * step - values)
