"""A quantized student's float weights, moved to the integers that its graph rounds them to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attar.errors import UsageError
from attar.quantize.dynamic import LINEAR, QuantizedDynamically
from attar.quantize.edit import Quantized
from attar.quantize.graph import capture, factors, folds
from attar.quantize.observers import PerChannelWeight
from attar.quantize.post_training import shared_grids
from attar.quantize.weight_edit import held_weights, parameter_of
from attar.quantize.weight_scales import integers
from attar.runtimes.aten import argument, constant, is_constant, operator
from attar.student import Edit, Student
from attar.student.fingerprint import weights_sha256


@dataclass(frozen=True)
class Move:
    """A weight to be put on its grid.

    path: the parameter's. target: the graph's constant that is made from it. weight: on its grid,
    float32. steps: the grid's, (rows, 1).
    """

    path: str
    target: str
    weight: Tensor
    steps: Tensor


def settle_weights(
    student: Student, *, example: tuple[Any, ...], dynamic_shapes: tuple[dict[int, Any], ...]
) -> Student:
    """The int8 student with float weights that lie on their grids, so that they pack as integers.

    Its quantized graph is the same, to the bit. Where a batch norm is folded into a weight, the
    grid's steps are divided by its factors. Weights that share a codebook stay, for they pack small
    as they are, and so do those that something else reads, too: an embedding, say.

    The given student isn't changed. example, dynamic_shapes: as of `quantize`. Raises `UsageError`
    where the last edit is no int8 quantization, `CheckpointError` as `quantized_reference`.

    Example:
        >>> small = quantize(student, Scheme(), batches, **traced)  # doctest: +SKIP
        >>> packed_size(settle_weights(small, **traced))            # doctest: +SKIP
    """
    edit = student.edits[-1] if student.edits else None
    if isinstance(edit, Quantized):
        graph = edit.prepared(student.module, example, dynamic_shapes)
        moves = list(_on_static_grids(student, graph))
    elif isinstance(edit, QuantizedDynamically):
        graph = capture(student.module, example, dynamic_shapes)
        moves = list(_on_dynamic_grids(student, graph, edit))
    else:
        raise UsageError("only an int8 student's weights can be put on their grids: quantize it")
    made = _made_from(graph)
    moves = [move for move in moves if _is_free(student, move.path) and _moves_alone(move, made)]
    settled = student.copy()
    with torch.no_grad():
        for move in moves:
            settled.module.get_parameter(move.path).copy_(move.weight)
    sha256 = weights_sha256(settled.module)
    if isinstance(edit, Quantized):
        last: Edit = edit.settled_at(sha256, {move.path: move.steps for move in moves})
    else:
        last = edit.settled_at(sha256)
    return Student(settled.module, settled.spec, [*settled.edits[:-1], last])


def _on_static_grids(student: Student, prepared: GraphModule) -> Iterator[Move]:
    """Of weights that are read through an observer and by nothing else."""
    observers = dict(prepared.named_modules(remove_duplicate=False))
    for held in _read_once(prepared):
        (reader,) = held.users
        grid = observers.get(str(reader.target)) if reader.op == "call_module" else None
        path, own = parameter_of(student.module, str(held.target))
        if own is None or not isinstance(grid, PerChannelWeight) or grid.ch_axis:
            continue
        folded = constant(prepared, held)
        if folded.shape != own.shape or own.dim() < 2:
            continue
        scale = grid.scale.double()
        factor = factors(prepared).get(str(held.target), torch.ones_like(scale))
        steps = torch.where(factor != 0, scale / factor, scale).float()[:, None]
        rounded = _integers(folded, grid)
        weight = _times(rounded, steps)
        move = Move(path, str(held.target), weight, steps)
        if torch.equal(_integers(_remade(prepared, move), grid), rounded):
            yield move


def _on_dynamic_grids(
    student: Student, graph: GraphModule, edit: QuantizedDynamically
) -> Iterator[Move]:
    """Of weights that linear layers read and nothing else."""
    bits = edit.scheme.weight_bits
    for held in held_weights(graph, student.module, LINEAR):
        alone = all(
            operator(n) == "linear" and argument(n, 1) is held.node for n in held.node.users
        )
        if not alone or held.path not in edit.weights:
            continue
        steps = edit.scales[held.path]
        rounded = integers(held.own, steps, bits)
        weight = _times(rounded.flatten(1).float().reshape(held.own.shape), steps)
        if torch.equal(integers(weight, steps, bits), rounded):
            yield Move(held.path, str(held.node.target), weight, steps)


def _read_once(graph: GraphModule) -> Iterator[Node]:
    """The nodes of constants that are read in one place."""
    nodes = [node for node in graph.graph.nodes if is_constant(node)]
    reads = Counter(node.target for node in nodes for _ in node.users)
    return (node for node in nodes if node.users and reads[node.target] == 1)


def _integers(folded: Tensor, grid: PerChannelWeight) -> Tensor:
    """A weight as the converted graph has it, in float, from its zero point."""
    sides = (-1, *[1] * (folded.dim() - 1))
    scale, zero = grid.scale.reshape(sides), grid.zero_point.reshape(sides)
    at = (folded * (1.0 / scale)).round() + zero
    return at.clamp(grid.quant_min, grid.quant_max) - zero


def _times(rounded: Tensor, steps: Tensor) -> Tensor:
    """Integers in steps, zeros without a sign."""
    return rounded * steps.reshape(-1, *[1] * (rounded.dim() - 1)) + 0.0


def _is_free(student: Student, path: str) -> bool:
    """Whether a parameter is float32, goes by one name, and shares no codebook."""
    weight = student.module.get_parameter(path)
    every = student.module.named_parameters(remove_duplicate=False)
    names = [name for name, each in every if each is weight]
    return weight.dtype == torch.float32 and len(names) == 1 and path not in shared_grids(student)


def _moves_alone(move: Move, made: Mapping[str, Collection[str]]) -> bool:
    """Whether the weight's own constant is all of the graph that follows from it."""
    return [name for name, tensors in made.items() if move.path in tensors] == [move.target]


def _made_from(graph: GraphModule) -> dict[str, set[str]]:
    """By the constants of a graph: the network's tensors that each is made from."""
    found: dict[str, set[str]] = {}
    for name in {str(node.target): None for node in graph.graph.nodes if is_constant(node)}:
        seen = _Seen(graph.meta["originals"])
        if name in folds(graph):
            folds(graph)[name](seen)
        found[name] = seen.names if name in folds(graph) else {name}
    return found


class _Seen(dict[str, Tensor]):
    """Tensors by name, and the names that were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def _remade(graph: GraphModule, move: Move) -> Tensor:
    """The moved weight as the graph will read it."""
    tensors = {**graph.meta["originals"], move.path: move.weight}
    known = folds(graph).get(move.target)
    return move.weight if known is None else known(tensors).float()
