"""Batch norms folded into the convolutions before them, so that biases are all that is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from attar.errors import UsageError
from attar.student import Edit
from attar.student.edits import submodule

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NormsFolded(Edit):
    """Convolutions that have taken up the batch norms after them, which do nothing any more.

    norms: by the norm's path, the convolution's.
    """

    kind: ClassVar[str] = "norms-folded"

    def __init__(self, norms: Mapping[str, str]) -> None:
        self.norms = dict(norms)

    def to_json(self) -> dict[str, Any]:
        return {"norms": self.norms}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> NormsFolded:
        return cls({str(norm): str(layer) for norm, layer in record["norms"].items()})

    def replay(self, module: nn.Module) -> None:
        """Gives the convolutions biases and takes the norms away, in place."""
        for path, owner in self.norms.items():
            submodule(module, path, "a batch norm was folded at")
            layer = submodule(module, owner, "a batch norm was folded into")
            assert isinstance(layer, _ConvNd)
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))
            module.set_submodule(path, nn.Identity())

    def check(self, module: nn.Module) -> list[str]:
        layers = dict(module.named_modules())
        return [
            f"{norm} was folded into {layer} and is a batch norm again"
            for norm, layer in self.norms.items()
            if isinstance(layers.get(norm), _BatchNorm)
        ]

    def summary(self) -> str:
        return f"{len(self.norms)} batch norms folded into convolutions"


@torch.no_grad()
def fold_norms(module: nn.Module) -> NormsFolded:
    """Folds the batch norms of `module`, in place, into the convolutions that they follow; the
    network answers in eval mode as before. Gives the edit.

    A norm with statistics is folded where it alone reads a convolution, and both are called once.
    Raises `UsageError` for a network that `torch.fx` can't trace.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> fold_norms(network).norms
        {'1': '0'}
    """
    norms = dict(_foldable(module))
    layers = dict(module.named_modules())
    fused = {}
    for path, owner in norms.items():
        layer, norm = layers[owner], layers[path]
        fused[owner] = fuse_conv_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias,
        )  # fmt: skip
    edit = NormsFolded(norms)
    edit.replay(module)
    for owner, (weight, bias) in fused.items():
        layers[owner].weight.copy_(weight)
        layers[owner].bias.copy_(bias)
    return edit


def _foldable(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The paths of batch norms, each with that of its convolution."""
    try:
        graph = fx.symbolic_trace(module).graph
    except Exception as error:  # tracing runs the person's code: anything can come out of it
        raise UsageError(
            f"fold: torch.fx can't trace {type(module).__name__} ({str(error).splitlines()[0]}): "
            "leave fold out"
        ) from error
    layers = dict(module.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        norm, layer = layers[str(node.target)], layers[str(source.target)]
        fits = (
            isinstance(norm, _BatchNorm)
            and norm.running_var is not None
            and type(layer) in CONVOLUTIONS
            and len(source.users) == 1
            and calls[str(node.target)] == calls[str(source.target)] == 1
        )
        if fits:
            yield str(node.target), str(source.target)
