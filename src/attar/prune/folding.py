"""Layers that compute their weight from parameters, made into plain ones.

Weight standardisation and PyTorch's parametrizations (weight norm, spectral norm) let no channel of
a weight go by itself: what the others are made of changes with it, or the code that computes them
has no place for fewer. Once the weight is computed and kept, the layer is a plain one with the same
answers. (Trained further, it is no longer standardised.)

Sources: Qiao et al. 2019, "Weight Standardization"; Brock et al. 2021, "Characterizing Signal
Propagation to Close the Performance Gap in Unnormalized ResNets" (scaled).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from attar.errors import CheckpointError
from attar.prune.removal import answers_alike
from attar.student.edits import Edit, submodule
from attar.training.evaluation import evaluating

FOLDED = "the weight was folded in"
PLAIN: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_APPLIED = {F.conv1d, F.conv2d, F.conv3d, F.linear}


@dataclass(frozen=True)
class WeightsFolded(Edit):
    """Layers whose weight is kept as it was computed, each by path."""

    kind: ClassVar[str] = "weights-folded"

    layers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> WeightsFolded:
        try:
            return cls(tuple(str(path) for path in record["layers"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the record of folded weights is damaged: {error}") from None

    def replay(self, module: nn.Module) -> None:
        """Puts plain layers in the place of those, in place. Raises `CheckpointError` where there
        is nothing to fold."""
        for path in self.layers:
            plain = _plain(submodule(module, path, FOLDED))
            if plain is None:
                raise CheckpointError(f"{FOLDED} {path}, which computes no weight here")
            module.set_submodule(path, plain)

    def within(self, paths: Iterable[str]) -> WeightsFolded:
        """Those of the layers in which one of these parameters lies."""
        touched = tuple(paths)
        return WeightsFolded(
            tuple(layer for layer in self.layers if any(t.startswith(f"{layer}.") for t in touched))
        )

    def __bool__(self) -> bool:
        return bool(self.layers)

    def summary(self) -> str:
        return f"computed weights kept in {len(self.layers)} layers"


def with_plain_weights(
    module: nn.Module, example: tuple[Any, ...]
) -> tuple[nn.Module, WeightsFolded]:
    """A copy of the network with plain layers where weights are computed, and which; the network
    itself where there are none, or where it would answer otherwise.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> net = nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
        >>> plain, folded = with_plain_weights(net, (torch.randn(2, 4),))
        >>> folded.layers, type(plain[0]).__name__
        (('0',), 'Linear')
    """
    found = WeightsFolded(tuple(p for p, m in module.named_modules() if p and _computes(m)))
    if not found:
        return module, found
    folded = copy.deepcopy(module)
    found.replay(folded)
    return (
        (folded, found) if answers_alike(module, folded, example) else (module, WeightsFolded(()))
    )


def _computes(layer: nn.Module) -> bool:
    """Whether a layer is a plain one but for a weight that it computes."""
    if not isinstance(layer, PLAIN) or isinstance(layer, _ConvTransposeNd):
        return False
    given = type(layer) in PLAIN and not layer._forward_pre_hooks
    return not given and _plain(layer) is not None


def _plain(layer: nn.Module) -> nn.Module | None:
    """The layer with its weight as computed; `None` where it does more than applying a weight, or
    where the weight is its parameter."""
    x = _input(layer)
    with _Applied() as applied, evaluating(layer):
        try:
            result = layer(x)
        except Exception:  # whatever a class of the person's own raises
            return None
    if len(applied.calls) != 1:
        return None
    function, arguments, made = applied.calls[0]
    own = arguments["weight"] is layer._parameters.get("weight")
    if own or arguments["input"] is not x or result is not made:
        return None
    return _built(layer, function, arguments)


def _input(layer: Any) -> Tensor:
    """Something small to call a layer on."""
    like = next(layer.parameters())
    if isinstance(layer, _ConvNd):
        sides = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return like.new_zeros((1, layer.in_channels, *sides))
    return like.new_zeros((1, layer.in_features))


def _built(layer: Any, function: Any, arguments: Mapping[str, Any]) -> nn.Module:
    weight, bias = arguments["weight"], arguments.get("bias")
    plain: Any
    if function is F.linear:
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    else:
        kind: Any = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}[function]
        geometry = {k: arguments[k] for k in ("stride", "padding", "dilation") if k in arguments}
        groups = arguments.get("groups", 1)
        plain = kind(
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]),
            groups=groups, bias=bias is not None, **geometry,
        )  # fmt: skip
    plain.to(weight.device, weight.dtype).train(layer.training)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


class _Applied(TorchFunctionMode):
    """Notes each time a weight is applied: the function, its arguments by name, its result."""

    _NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _APPLIED:
            given = dict(zip(self._NAMES, args, strict=False)) | (kwargs or {})
            self.calls.append((func, given, result))
        return result
