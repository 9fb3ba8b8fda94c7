"""PT2E's part: a network's graph with observers, and the same graph on their grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from attar.quantize.graph import add_to_biases, capture
from attar.quantize.observers import ActivationObserver, Grid, PerChannelWeight
from attar.runtimes.base import runtimes

if TYPE_CHECKING:
    from attar.quantize.edit import Scheme


def prepare(
    module: nn.Module,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    scheme: Scheme,
    biases: Mapping[str, Tensor] | None = None,
) -> GraphModule:
    """The network's graph with an observer at every tensor that the runtime wants on a grid.

    biases: what is added to layers' biases before, by `layer_keys`.

    Raises `UsageError` for a runtime without int8 graphs, `ExportError` for a network that can't be
    traced, `CheckpointError` for biases that don't fit it.
    """
    graph = capture(module, example, dynamic_shapes)
    add_to_biases(graph, biases or {})
    quantizer = runtimes.get(scheme.runtime)().quantizer(
        activation=ActivationObserver.with_args(choice=scheme.observer),
        weight=PerChannelWeight.with_args(),
        weight_bits=scheme.weight_bits,
        float_layers=scheme.float_layers,
    )
    with torch.no_grad():
        return prepare_pt2e(graph, quantizer)


def convert(prepared: GraphModule) -> GraphModule:
    """The graph on the grids its observers hold: quantize and dequantize nodes in their stead."""
    with torch.no_grad():
        return convert_pt2e(prepared)


def grids_of(prepared: GraphModule) -> dict[str, Grid]:
    """The observers of a prepared graph, by key."""
    return {m.key: m for m in prepared.modules() if isinstance(m, Grid)}
