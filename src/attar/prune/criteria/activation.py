"""Importance by what a layer reads: channels that stay silent on data can go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.prune.criteria.base import Calls, Criterion, criteria

_READERS: dict[Callable[..., Any], int] = {
    torch.conv1d: -2,
    torch.conv2d: -3,
    torch.conv3d: -4,
    torch.conv_transpose1d: -2,
    torch.conv_transpose2d: -3,
    torch.conv_transpose3d: -4,
    nn.functional.linear: -1,
}
"""Functions that read channels, and the channels' dimension in their input."""


@criteria.register("activation")
class Activation(Criterion):
    """Keeps the channels of largest mean activation, E|x|, as the layers that read them see it.

    Needs a few batches of data, taken one at a time. The article's "fixed activation" pruning.
    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference" (section 2.2, mean activation).
    """

    granularities = ("channel",)
    needs_data = True
    sides: ClassVar[tuple[str, ...]] = ("in",)

    def __init__(self) -> None:
        self._means: dict[str, Tensor] = {}

    def observe(self, module: nn.Module, calls: Calls) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        with _Reading(names, self.measure) as reading:
            for call in calls():
                module(*call[0], **call[1])
        self._means = {path: total / count for path, (total, count) in reading.sums.items()}

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        if path not in self._means:  # read by an operator that isn't watched: no ground to prefer
            return torch.ones(weight.shape[dim or 0])
        return self._means[path]

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        """What is averaged over examples and positions."""
        return x.abs()


@criteria.register("apoz")
class ActiveShare(Activation):
    """Keeps the channels that are zero least often: 1 − APoZ, the average percentage of zeros.

    Source: Hu et al. 2016, "Network Trimming: A Data-Driven Neuron Pruning Approach towards
    Efficient Deep Architectures".
    """

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        return (x != 0).to(x.dtype)


class _Reading(TorchFunctionMode):
    """Sums what layers read, a channel at a time, by the path of their weight."""

    def __init__(self, names: dict[int, str], measure: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self._names = names
        self._measure = measure

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READERS and len(args) > 1 and id(args[1]) in self._names:
            self._add(self._names[id(args[1])], args[0].detach(), _READERS[func])
        return func(*args, **(kwargs or {}))

    def _add(self, path: str, x: Tensor, d: int) -> None:
        values = self._measure(x).movedim(d, 0).flatten(1).double()
        total, count = self.sums.get(path, (torch.zeros(len(values), dtype=torch.float64), 0))
        self.sums[path] = total + values.sum(1).cpu(), count + values.shape[1]
