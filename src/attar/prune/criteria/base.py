"""A pruning criterion: how important each weight, or each channel, is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from attar.registry import Registry

Calls = Callable[[], Iterable[tuple[tuple[Any, ...], dict[str, Any]]]]
"""A few batches of data, as arguments to call the network with; may be asked for again."""

criteria: Registry[type[Criterion]] = Registry("pruning criterion", "attar.prune.criteria")


class Criterion(ABC):
    """Scores weights: the lowest go first. A subclass is one class, registered by name.

    Example:
        >>> @criteria.register("noise")
        ... class Noise(Criterion):
        ...     "Prunes at random."
        ...     def scores(self, path, weight, dim):
        ...         return torch.rand(weight.shape if dim is None else weight.shape[dim])
    """

    granularities: ClassVar[tuple[str, ...]] = ("channel", "weight")
    needs_data: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("out", "in")
    """Which tensors score a channel: those that make it (`out`), those that read it (`in`)."""

    def observe(self, module: nn.Module, calls: Calls) -> None:
        """Looks at the network and a few batches before scoring, where `needs_data`."""
        return

    @abstractmethod
    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        """How important: each index along `dim` of a weight, (weight.shape[dim],); with `None`,
        each element, of the weight's shape. Not negative. path: the parameter's."""
