"""Post-training quantization: grids chosen from a look at examples, no training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attar.errors import DataError
from attar.quantize.edit import Grids, Quantized, Scheme, observers, prepare, weights_sha256
from attar.quantize.observers import Grid, PerChannelWeight
from attar.student import Student

LARGEST_BIAS = 2**30
"""In steps of input scale times weight scale: int32 with room for the sum it is added to."""


def quantize(
    student: Student,
    scheme: Scheme,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> Student:
    """The student with a `Quantized` edit, calibrated on `examples`.

    examples: argument tuples, batch first, seen once in order; memory doesn't grow with them.
    example, dynamic_shapes: what the network is traced with (`Task.example`). Raises `DataError`
    for examples that hold no finite numbers, or for none, `ExportError` for a network that can't
    be traced.

    Example:
        >>> batches = ((b.inputs,) for b in split.batches(64))       # doctest: +SKIP
        >>> small = quantize(                                        # doctest: +SKIP
        ...     student, Scheme(), batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    grids: Grids = {}
    if not scheme.all_float:
        prepared = prepare(student.module, example, dynamic_shapes, scheme)
        look(prepared, examples)
        per_tensor = {
            name: student.module.get_parameter(name)
            for edit in student.edits
            for name in getattr(edit, "per_tensor_weights", set)()
        }
        grids = settle(prepared, per_tensor)
    return student.edited(Quantized(scheme, grids, weights_sha256(student.module)))


def look(prepared: GraphModule, examples: Iterable[tuple[Any, ...]]) -> None:
    """Lets a prepared graph's observers see the examples."""
    seen = False
    with torch.no_grad():
        for arguments in examples:
            prepared(*arguments)
            seen = True
    if not seen:
        raise DataError("calibration needs examples, and there are none")


def settle(prepared: GraphModule, per_tensor: dict[str, nn.Parameter]) -> Grids:
    """Chooses every grid from what was seen.

    per_tensor: weights (by parameter path) that share one grid over all channels.
    """
    found = observers(prepared)
    for observer in found.values():
        observer.settle()
    for name, weight in per_tensor.items():
        _one_grid(found, name.removesuffix(".weight"), weight.detach())
    modules = dict(prepared.named_modules(remove_duplicate=False))
    for node in prepared.graph.nodes:
        _make_room_for_bias(prepared, modules, node)
    return {key: (o.scale, o.zero_point) for key, o in found.items()}  # type: ignore[misc]


def _one_grid(found: dict[str, Grid], path: str, weight: Tensor) -> None:
    """One grid for the weights as they are in the network. Folding multiplied each channel by its
    batch norm's factor, and the scale follows: weights that are equal stay equal integers."""
    for key, observer in found.items():
        layer, _, rest = key.partition(":")
        if layer == path and rest.endswith("/weight") and isinstance(observer, PerChannelWeight):
            assert observer.largest is not None and observer.scale is not None
            own = weight.abs().flatten(1).amax(1)
            factor = torch.where(own > 0, observer.largest / own, 1.0)
            factor = torch.where(factor > 0, factor, 1.0)
            scale = factor * weight.abs().max() / observer.quant_max
            observer.fix(scale, torch.zeros_like(scale, dtype=torch.int64))


def _make_room_for_bias(prepared: GraphModule, modules: dict[str, Any], node: Node) -> None:
    """The runtime keeps a bias as int32 in steps of input scale times weight scale: a channel of
    tiny weights and a real bias needs coarser weights, or it would overflow silently."""
    if len(node.args) < 3 or not isinstance(node.args[2], Node) or node.args[2].op != "get_attr":
        return
    grids = [modules.get(str(a.target)) for a in node.args[:2] if isinstance(a, Node)]
    if len(grids) != 2 or not isinstance(grids[1], PerChannelWeight):
        return
    source, weight = grids
    assert isinstance(source, Grid) and source.scale is not None and weight.scale is not None
    bias = getattr(prepared, str(node.args[2].target), None)
    if bias is None:
        bias = prepared.get_parameter(str(node.args[2].target))
    least = bias.detach().abs() / (source.scale * LARGEST_BIAS)
    weight.fix(torch.maximum(weight.scale, least), weight.zero_point)
