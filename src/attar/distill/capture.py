"""Outputs of inner layers by module path, through hooks that leave the modules as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from attar.errors import UsageError
from attar.registry import near


def layer(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path` (`"layer3.1.conv2"`). Raises `UsageError` listing near ones."""
    found = dict(module.named_modules(remove_duplicate=False)).get(path) if path else None
    if found is None:
        known = [name for name, _ in module.named_modules() if name]
        raise UsageError(f"{type(module).__name__} has no layer {path!r}{_near(path, known)}")
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside PyTorch's wrappers for several devices."""
    while isinstance(module, DataParallel | DistributedDataParallel):
        module = module.module
    return module


class Capture:
    """The layers of one network whose outputs are wanted, found once, captured call by call.

    What is captured is a copy, so that what follows the layer may overwrite its output in place
    (`ReLU(inplace=True)`), and gradients flow through it. Of a tuple, the first entry is taken.

    Raises `UsageError` for a path that isn't there, listing near ones.

    Example:
        >>> capture = Capture(net, ["layer2", "layer3.0"])  # doctest: +SKIP
        >>> with capture() as features:  # doctest: +SKIP
        ...     logits = net(images)
        >>> features["layer2"].shape  # doctest: +SKIP
    """

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        self.module = module
        inner = unwrapped(module)
        self._layers = {path: layer(inner, path) for path in paths}

    @contextmanager
    def __call__(self) -> Iterator[dict[str, Tensor]]:
        """Captures one call of the network; the hooks are gone afterwards, whatever happened.

        Raises `UsageError` where a layer runs more than once in a call, since either output could
        be meant, or not at all.
        """
        features: dict[str, Tensor] = {}
        handles = [
            inner.register_forward_hook(_keeper(path, features))
            for path, inner in self._layers.items()
        ]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()
        for path in self._layers:
            if path not in features:
                raise UsageError(f"the layer {path!r} is not used when the network is called")


def _keeper(path: str, features: dict[str, Tensor]) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if path in features:
            around = path.rpartition(".")[0]
            such = f", such as {around!r}" if around else ""
            raise UsageError(
                f"the layer {path!r} runs more than once in a call of the network, so which of its "
                f"outputs is meant is open: name one that runs once{such}"
            )
        features[path] = _tensor(path, output).clone()

    return keep


def _tensor(path: str, output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise UsageError(
            f"the layer {path!r} gives a {type(first).__name__}: name one that gives a tensor"
        )
    return first


def _near(path: str, known: list[str]) -> str:
    """Near paths; else the network's top, which is short enough to list."""
    close = near(path, known)
    return close if close.startswith("; did") else near(path, [n for n in known if "." not in n])
