"""What an objective calls in a network's stead, so that it computes as it will when deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn import Parameter


class StandIn(nn.Module):
    """Computes from a network's own parameters in another way, and has its layers' names.

    It isn't a module around the network: nothing is registered twice, and the network's mode and
    place stay its own. Inner layers are reached by path through `layers`, on which hooks work as on
    the network's.

    compute: the answer, from the network and the call's arguments. layers: a module whose
    submodules run in that computation under the network's paths: the network itself, or others.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: nn.Module,
        compute: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        super().__init__()
        self._computes = (compute, network)
        self.training = network.training
        for name, layer in layers.named_children():
            self.add_module(name, layer)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return self.network.parameters(recurse)

    @property
    def network(self) -> nn.Module:
        """The network that it stands in for."""
        return self._computes[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compute, network = self._computes
        return compute(network, args, kwargs)
