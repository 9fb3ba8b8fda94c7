"""Choosing a prepared graph's grids: a look at examples, then what they ask of each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attar.errors import DataError
from attar.quantize.observers import Grid, PerChannelWeight
from attar.quantize.pt2e import grids_of
from attar.runtimes.aten import argument, constant

LARGEST_BIAS = 2**30
"""In steps of input scale times weight scale: int32 with room for the sum it is added to."""


def look(prepared: GraphModule, examples: Iterable[tuple[Any, ...]]) -> None:
    """Lets the observers see the examples. Raises `DataError` where there are none."""
    seen = False
    with torch.no_grad():
        for arguments in examples:
            prepared(*arguments)
            seen = True
    if not seen:
        raise DataError("calibration needs examples, and there are none")


def settle(prepared: GraphModule, per_tensor: Mapping[str, Tensor]) -> None:
    """Chooses every grid from what was seen.

    per_tensor: weights by parameter path that share one grid over all their channels.
    """
    grids = grids_of(prepared)
    for grid in grids.values():
        grid.settle()
    for path, weight in per_tensor.items():
        for key, grid in grids.items():
            if key.startswith(path.removesuffix(".weight") + ":") and key.endswith("/weight"):
                assert isinstance(grid, PerChannelWeight)
                _share_grid(grid, weight)
    modules = dict(prepared.named_modules(remove_duplicate=False))
    for node in prepared.graph.nodes:
        _make_room_for_bias(prepared, modules, node)


def _share_grid(grid: PerChannelWeight, weight: Tensor) -> None:
    """One grid for the weight as it is in the network. Folding has multiplied each channel by its
    batch norm's factor, and the scale follows: equal weights stay equal integers."""
    own = weight.abs().flatten(1).amax(1)
    grid.spread(channel_factors(own, grid.largest) * own.max())


def channel_factors(own: Tensor, folded: Tensor) -> Tensor:
    """What folding has multiplied channels by, from their largest magnitudes before and after it;
    1 for a channel of zeros."""
    return torch.where((own > 0) & (folded > 0), folded / own, 1.0)


def _make_room_for_bias(prepared: GraphModule, modules: dict[str, Any], layer: Node) -> None:
    """The runtime keeps a bias as int32 in steps of input scale times weight scale: a channel of
    tiny weights and a real bias takes coarser steps, or it would overflow without a word."""
    source, weight, bias = (modules.get(str(a)) for a in _targets(layer))
    if not isinstance(source, Grid) or not isinstance(weight, PerChannelWeight) or bias is None:
        return
    values = constant(prepared, argument(argument(layer, 2)))
    least = least_weight_scale(values, source.scale)
    weight.fix(torch.maximum(weight.scale, least), weight.zero_point)


def least_weight_scale(bias: Tensor, input_scale: Tensor) -> Tensor:
    """The smallest scale of a channel's weights with which its bias still fits."""
    return bias.abs() / (input_scale * LARGEST_BIAS)


def _targets(layer: Node) -> list[Any]:
    """What a layer's input, weight and bias are observed by."""
    return [getattr(argument(layer, place), "target", None) for place in range(3)]
