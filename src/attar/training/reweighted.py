"""Training that asks its objective of a network whose weights are computed from its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from attar.data.base import Batch
from attar.training.objective import Objective
from attar.training.stand_in import StandIn


class Reweighted(Objective):
    """Another objective, asked of the network with other weights in the place of some.

    A subclass says which: `weights` while training, `judged_weights` for validation. The network's
    own parameters are what is trained, by the gradients that come through.

    Example:
        >>> class Halved(Reweighted):
        ...     def weights(self, network):
        ...         return {name: p / 2 for name, p in network.named_parameters()}
    """

    def __init__(self, inner: Objective) -> None:
        super().__init__()
        self.inner = inner
        self._stand_ins: list[StandIn] = []  # in a list, so that it is no part of this module

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """What the network computes with, by parameter path; a tied one under each of its names."""
        raise NotImplementedError

    def judged_weights(self, network: nn.Module) -> dict[str, Tensor]:
        """The same as the network will have them when it is deployed; by default `weights`."""
        return self.weights(network)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.inner.start_epoch(epoch, epochs)

    def undecayed(self) -> Iterable[nn.Parameter]:
        return self.inner.undecayed()

    def judged(self, model: nn.Module) -> StandIn:
        return StandIn(model, model, self._deployed)

    def kept(self) -> dict[str, Tensor]:
        return {f"inner.{name}": value for name, value in self.inner.kept().items()}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if not self._stand_ins or self._stand_ins[0].network is not model:
            self._stand_ins = [StandIn(model, model, self._trained)]
        return self.inner(self._stand_ins[0], batch)

    def _trained(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return functional_call(network, self.weights(network), args, kwargs, tie_weights=False)

    def _deployed(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weights = self.judged_weights(network)
        return functional_call(network, weights, args, kwargs, tie_weights=False)


def under_each_name(network: nn.Module, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was computed for parameters, by path, under every name that each of them has: a tied one
    is computed once and given to all of its owners."""
    by_parameter = {id(network.get_parameter(path)): value for path, value in made.items()}
    named = network.named_parameters(remove_duplicate=False)
    return {name: by_parameter[id(p)] for name, p in named if id(p) in by_parameter}


def as_name(path: str) -> str:
    """A path as a parameter's or a buffer's name, which may have no dots."""
    return path.replace(".", "/")
