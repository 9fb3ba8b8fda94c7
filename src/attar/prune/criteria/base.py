"""A pruning criterion: how important each weight, or each channel, is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from attar.errors import UsageError
from attar.registry import Registry
from attar.training.evaluation import evaluating

Loss = Callable[[Any], Tensor]
"""From the network's output on one batch to that batch's loss, a scalar; it knows the labels."""


class Call(NamedTuple):
    """One batch of data: the arguments to call the network with, and its loss where it is known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Loss | None = None


Pair = tuple[tuple[Any, ...], dict[str, Any]]
Calls = Callable[[], Iterable[Call | Pair | tuple[tuple[Any, ...], dict[str, Any], Loss]]]
"""A few batches of data, `(args, kwargs)` or `(args, kwargs, loss)` each, as in `Call`; may be
asked for again."""

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
    needs_loss: ClassVar[bool] = False
    """Whether each batch must come with its loss; only where `needs_data`."""
    by_example: ClassVar[bool] = False
    """Whether batches are meant to be of one example."""
    sides: ClassVar[tuple[str, ...]] = ("out", "in")
    """Which tensors score a channel: those that make it (`out`), those that read it (`in`), the
    batch norms that scale it (`scale`)."""
    comparable: ClassVar[bool] = False
    """Whether scores of different layers compare as they are; others are divided by their mean."""
    fallback: ClassVar[type[Criterion] | None] = None
    """What scores the channels of which no side is there; without one, they stay."""
    seed: int = 0
    """By which it draws, where it draws; a recipe's own in a run."""

    def observe(self, module: nn.Module, calls: Calls) -> None:
        """Looks at the network and a few batches before scoring, where `needs_data`; leaves the
        network as it is. Unless `needs_loss`, batches come without losses."""
        return

    @abstractmethod
    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        """How important: each index along `dim` of a weight, (weight.shape[dim],); with `None`,
        each element, of the weight's shape. Not negative. path: the parameter's."""


def require_calls(criterion: Criterion, calls: Calls | None) -> None:
    """Raises `UsageError` where a criterion that needs data gets none."""
    if calls is None and criterion.needs_loss:
        raise UsageError(no_loss(criterion))
    if calls is None and criterion.needs_data:
        raise UsageError(f"{type(criterion).__name__} scores on data: hand in calls")


def no_loss(criterion: Criterion) -> str:
    """What to say where a criterion lacks its loss."""
    return (
        f"{type(criterion).__name__} scores by the gradient of a loss: hand in calls of (args, "
        "kwargs, loss), where loss takes the network's output and returns a scalar"
    )


def observe(criterion: Criterion, module: nn.Module, calls: Calls | None) -> None:
    """Shows a criterion what it needs to see, in eval mode. Raises `UsageError` without it."""
    require_calls(criterion, calls)
    if not criterion.needs_data or calls is None:
        return
    with evaluating(module):
        criterion.observe(module, calls if criterion.needs_loss else _pairs(calls))


def _pairs(calls: Calls) -> Calls:
    def pairs() -> Iterator[Pair]:
        for call in calls():
            yield call[0], call[1]

    return pairs
