"""A quantized graph in the form that XNNPACK's partitioner takes for integers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from attar.runtimes.aten import argument, constant, forget_unused, operator
from attar.runtimes.integer_moves import PADDINGS, move_integers

MIDDLE = 128
END = 2**31
MOVES = {*PADDINGS, "slice", "select"}
"""What XNNPACK has no int8 kernel for where the batch varies; ExecuTorch's own move integers."""


def for_xnnpack(graph: GraphModule) -> None:
    """Rewrites the graph in place; it answers as before.

    Activations become int8 on the same grid. Constants on other grids than int8 become floats:
    biases, which XNNPACK puts on their grid itself, and the weights of layers that stay float.
    """
    for node in list(graph.graph.nodes):
        if operator(node) in ("quantize_per_tensor", "dequantize_per_tensor"):
            _as_int8(node)
        elif operator(node) == "dequantize_per_channel" and argument(node, 6) != torch.int8:
            _as_float(graph, node)
        elif operator(node) == "slice" and _takes_all(node):
            node.replace_all_uses_with(argument(node))
            graph.graph.erase_node(node)
    _join(graph)
    move_integers(graph, MOVES)
    _part(graph)
    forget_unused(graph)


def _as_int8(node: Node) -> None:
    value, scale, *grid, dtype = node.args
    if dtype == torch.uint8:
        shifted: list[Any] = [part - MIDDLE for part in grid]  # type: ignore[operator]
        node.args = (value, scale, *shifted, torch.int8)


def _as_float(graph: GraphModule, node: Node) -> None:
    grid = [constant(graph, part) for part in node.args[:3]]  # type: ignore[arg-type]
    values = torch.ops.quantized_decomposed.dequantize_per_channel(*grid, *node.args[3:])
    source: Any = argument(node)
    name = f"{source.target}_float".replace(".", "_")
    graph.register_buffer(name, values)
    with graph.graph.inserting_before(node):
        node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.erase_node(node)


def _takes_all(node: Node) -> bool:
    """`x[:]`, which PyTorch's indexing leaves behind for each dimension before the last named."""
    start, end, step = argument(node, 2), argument(node, 3, END), argument(node, 4, 1)
    return start in (None, 0) and step == 1 and isinstance(end, int) and end >= END


def _join(graph: GraphModule) -> None:
    """Puts a value back onto the grid it comes from as what it was."""
    for node in list(graph.graph.nodes):
        source: Any = argument(node)
        if operator(node) != "quantize_per_tensor" or operator(source) != "dequantize_per_tensor":
            continue
        if node.args[1:] == source.args[1:]:
            node.replace_all_uses_with(argument(source))
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _part(graph: GraphModule) -> None:
    """Gives each reader of a value a dequantization of its own: one that an int8 kernel takes in is
    never computed, and XNNPACK would hand its integers to the others as floats."""
    for node in list(graph.graph.nodes):
        if operator(node) != "dequantize_per_tensor":
            continue
        for user in list(node.users)[1:]:
            with graph.graph.inserting_before(user):
                user.replace_input_with(node, graph.graph.node_copy(node))
