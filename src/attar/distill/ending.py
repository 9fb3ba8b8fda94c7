"""How a network ends: its classifier, and the last layer before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attar.distill.adapters import KINDS
from attar.distill.capture import layer as layer_at
from attar.errors import UsageError
from attar.training.evaluation import evaluating


@dataclass(frozen=True)
class Ending:
    """The end of a network, as one call of it showed.

    layer, features: a layer's path and what it gave, batch first. head, linear: the classifier's
    path and itself. Nothing that runs between them, or after, has weights.
    alike: where the layer was found and not named, the paths of all that give the same features,
        from the innermost to `layer`, which holds them.
    """

    layer: str
    features: Tensor
    head: str
    linear: nn.Linear
    alike: tuple[str, ...]


def ending(
    network: nn.Module,
    example: tuple[Any, ...],
    *,
    layer: str | None = None,
    head: str | None = None,
    who: str = "network",
) -> Ending:
    """The end of a network, found by calling it once, in evaluation mode.

    example: its arguments, batch first.
    layer: default: the last one before the head that nothing with weights follows; of several, the
        one that gives the most positions (the maps, not their mean).
    head: default: the last `nn.Linear` that runs. who: what messages call the network.

    Raises `UsageError`, saying which layer to name: a layer that something with weights follows, a
    head that is no `nn.Linear`, either of them not run, or run twice.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        >>> found = ending(net, (torch.zeros(2, 1, 4, 4),))
        >>> found.layer, tuple(found.features.shape), found.head
        ('1', (2, 4, 2, 2), '3')
    """
    calls = _calls(network, example)
    last = _head(network, calls, head, who)
    found = _before(calls, last) if layer is None else [_once(network, calls, layer, who)]
    if not found:
        raise UsageError(
            f"the {who} has no layer that gives {', '.join(KINDS.values())} before its head "
            f"{last.path!r} with nothing that has weights between them: name another head"
        )
    before = found[-1]
    between = _weighted(calls, before, last)
    if between:
        raise UsageError(
            f"{between[-1].path!r} has weights and runs between the {who}'s layer {before.path!r} "
            f"and its head {last.path!r}: name {between[-1].path!r} as the layer, or one after it"
        )
    if before.end > last.start:
        raise UsageError(
            f"the {who}'s layer {before.path!r} does not end before its head {last.path!r} begins: "
            "name one that does"
        )
    if before.output is None:
        raise UsageError(f"the {who}'s layer {before.path!r} gives no tensor: name one that does")
    assert isinstance(last.module, nn.Linear)
    alike = tuple(call.path for call in found)
    return Ending(before.path, before.output, last.path, last.module, alike)


@dataclass(frozen=True)
class _Call:
    """One call of a module. start, end: when, in the order of what happened."""

    path: str
    module: nn.Module
    start: int
    end: int
    output: Tensor | None

    @property
    def has_weights(self) -> bool:
        """Of its own, running statistics included."""
        held = (*self.module._parameters.values(), *self.module._buffers.values())
        return any(x is not None for x in held)


def _calls(network: nn.Module, example: tuple[Any, ...]) -> list[_Call]:
    """Every call of a module inside, in the order in which they end."""
    calls: list[_Call] = []
    running: list[int] = []
    now = 0

    def begins(module: nn.Module, args: Any) -> None:
        nonlocal now
        now += 1
        running.append(now)

    def watch(path: str, module: nn.Module) -> list[Any]:
        def ends(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal now
            now += 1
            calls.append(_Call(path, module, running.pop(), now, _tensor(output)))

        return [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]

    handles = [h for path, module in network.named_modules() for h in watch(path, module)]
    try:
        with evaluating(network):
            network(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _tensor(output: Any) -> Tensor | None:
    """A copy, since what follows may write over it; of a tuple, its first entry's."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first.clone() if isinstance(first, Tensor) else None


def _head(network: nn.Module, calls: list[_Call], path: str | None, who: str) -> _Call:
    if path is not None:
        found = _once(network, calls, path, who)
        if not isinstance(found.module, nn.Linear):
            raise UsageError(
                f"the {who}'s head {path!r} is a {type(found.module).__name__}: name an nn.Linear"
            )
    else:
        linear = [call.path for call in calls if isinstance(call.module, nn.Linear)]
        if not linear:
            raise UsageError(f"the {who} ends in no nn.Linear, which a head that is reused must be")
        found = _once(network, calls, linear[-1], who)
    after = [call.path for call in calls if call.start > found.end and call.has_weights]
    if after:
        raise UsageError(
            f"{after[0]!r} has weights and runs after the {who}'s head {found.path!r}, so that "
            "isn't what answers: name the last nn.Linear as the head"
        )
    return found


def _once(network: nn.Module, calls: list[_Call], path: str, who: str) -> _Call:
    """The one call of the module at this path."""
    module = layer_at(network, path)
    found = [call for call in calls if call.module is module]
    if len(found) != 1:
        often = "is not used" if not found else "runs more than once"
        raise UsageError(
            f"the {who}'s layer {path!r} {often} when it is called: name one that runs once"
        )
    (call,) = found
    return _Call(path, call.module, call.start, call.end, call.output)


def _before(calls: list[_Call], head: _Call) -> list[_Call]:
    """The last layer before the head, after those inside it that give the same."""
    fitting = [
        call
        for call in calls
        if call.path
        and call.end < head.start
        and call.output is not None
        and call.output.dim() in KINDS
        and sum(other.module is call.module for other in calls) == 1
        and not _weighted(calls, call, head)
    ]
    most = max((_size(call) for call in fitting), default=(0, 0))
    largest = [call for call in fitting if _size(call) == most]
    return [call for call in largest if _same(call, largest[-1])]


def _weighted(calls: list[_Call], before: _Call, head: _Call) -> list[_Call]:
    """What runs between two calls and has weights."""
    return [call for call in calls if before.end < call.start < head.start and call.has_weights]


def _same(one: _Call, other: _Call) -> bool:
    assert one.output is not None and other.output is not None
    return torch.equal(one.output, other.output)


def _size(call: _Call) -> tuple[int, int]:
    """How many positions it gives, and maps of one before vectors."""
    assert call.output is not None
    shape = call.output.shape
    return math.prod(shape[2:] if len(shape) == 4 else shape[1:-1]), len(shape)
