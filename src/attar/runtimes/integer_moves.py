"""Moves of values between equal grids, done on the integers themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attar.runtimes.aten import argument, operator

PADDINGS = {"pad", "constant_pad_nd"}


def move_integers(graph: GraphModule, moves: Collection[str] = PADDINGS) -> None:
    """`dequantize -> move -> quantize` on one grid as the move of the integers, in place: a runtime
    that has no kernel for the pattern leaves the move in float, with a conversion on either side.

    moves: the operators to do so for, each with one input; paddings are with zeros, which become
    the zero point.
    """
    for move in list(graph.graph.nodes):
        before, after = argument(move), next(iter(move.users), None)
        if operator(move) not in moves or after is None:
            continue
        if operator(before) != "dequantize_per_tensor" or operator(after) != "quantize_per_tensor":
            continue
        if before.args[1:] != after.args[1:]:
            continue
        with graph.graph.inserting_before(move):
            moved = _on_integers(graph, move, before)
        after.replace_all_uses_with(moved)
        graph.graph.erase_node(after)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _on_integers(graph: GraphModule, move: Node, before: Node) -> Node:
    integers, zero = argument(before), argument(before, 2)
    if operator(move) in PADDINGS:
        pad = torch.ops.aten.constant_pad_nd.default
        return graph.graph.call_function(pad, (integers, argument(move, 1), zero))
    target: Any = move.target
    return graph.graph.call_function(target, (integers, *move.args[1:]), move.kwargs)
