"""Constants of few different values, written as indices and a codebook.

They are looked up when the file is loaded, by operators on constants, which sessions compute once:
from then on they are ordinary constants.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from attar.runtimes.few_values import FewValues, few_values
from attar.runtimes.onnx_file import save, tidy
from attar.runtimes.onnx_lookup import (
    WIDEST,
    complete,
    function_name,
    lookup,
    multiple,
    pack,
    tabled,
    tables,
)
from attar.runtimes.onnx_operators import DOMAIN

KINDS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
}
KEPT = 0.75
"""The largest share of its bytes that a tensor may still take: looking up takes time at load."""
NAMING = 64
"""About what a tensor's node and the names of its constants take, in bytes."""
TABLE = 80
"""About what a table of digits takes, with its part in what all tables are made of."""
WHOLE = (1, 2, 4, 8)
"""The bits of which a byte holds a whole number: such functions are shorter."""

Width = tuple[int, bool]
"""A function of `onnx_lookup`: the bits of an index, and whether padding is cut off."""


def share_constants(path: Path, student: Any, *, inline: bool = False) -> None:
    """Does `use_codebooks` to the file of a `Student`."""
    own = {n: p.detach().cpu().numpy() for n, p in student.module.named_parameters()}
    lengths = {length for edit in student.edits for length in edit.runs().values()}
    proto = onnx.load(str(path))
    save(use_codebooks(proto, own, lengths, inline=inline), path)


def use_codebooks(
    proto: onnx.ModelProto,
    own: Mapping[str, np.ndarray],
    lengths: Collection[int] = (),
    *,
    inline: bool = False,
) -> onnx.ModelProto:
    """The model with constants of few values as indices and a codebook, where that takes at most
    three quarters of their bytes; it is never larger.

    It comes last: what reads a constant's numbers after it doesn't find them. own: the network's
    weights by path; a constant may be one with its rows multiplied (a folded batch norm).
    lengths: of runs of weights that may be one entry of a codebook. inline: write the functions'
    bodies out for every constant, for a runtime that knows no functions.
    """
    graph = proto.graph
    answers = {value.name for value in (*graph.output, *graph.input)}
    found: dict[str, FewValues] = {}
    for tensor in graph.initializer:
        if tensor.data_type in KINDS and len(tensor.dims) > 1 and tensor.name not in answers:
            few = few_values(numpy_helper.to_array(tensor), own, lengths)
            if few is not None and few.bits <= WIDEST and _saves(few, tensor):
                found[tensor.name] = few
    opset = next(o.version for o in proto.opset_import if o.domain == "")
    cost = _Cost({t.name: t.ByteSize() for t in graph.initializer}, opset, inline)
    chosen = _choose(found, cost)
    if not chosen:
        return proto
    smaller = onnx.ModelProto()
    smaller.CopyFrom(proto)
    _write(smaller, found, chosen, opset)
    if inline:
        smaller = _inlined(smaller)
    return smaller if smaller.ByteSize() < proto.ByteSize() else proto


def _saves(few: FewValues, tensor: onnx.TensorProto) -> bool:
    return few.bytes + NAMING < KEPT * tensor.ByteSize()


@dataclass(frozen=True)
class _Cost:
    """What things take in the file. dense: of each constant as it is."""

    dense: Mapping[str, int]
    opset: int
    inline: bool

    def body(self, width: Width) -> int:
        return lookup(width[0], cut=width[1], opset=self.opset).ByteSize()

    def of(self, few: FewValues, width: Width) -> int:
        wider = len(few.indices) * (width[0] - few.bits) // 8
        missing = few.values[:1].nbytes * (len(complete(few.values, width[0])) - len(few.values))
        return few.bytes + wider + missing + NAMING + (self.body(width) if self.inline else 0)


def _choose(found: Mapping[str, FewValues], cost: _Cost) -> dict[str, Width]:
    """By constant: the function that expands it. Each function's body takes room as well, so a few
    constants may be better off with wider indices, or as they were."""
    widths = {(few.bits, cut) for few in found.values() for cut in (False, True)}
    widths |= {(bits, cut) for bits in WHOLE for cut in (False, True)}
    best, total = _assign(found, widths, cost)
    while widths:
        tried = {width: _assign(found, widths - {width}, cost) for width in sorted(widths)}
        least = min(tried, key=lambda width: tried[width][1])
        if tried[least][1] > total:
            break
        best, total = tried[least]
        widths.remove(least)
    return best


def _assign(
    found: Mapping[str, FewValues], widths: Collection[Width], cost: _Cost
) -> tuple[dict[str, Width], int]:
    assigned: dict[str, Width] = {}
    total = TABLE * len({digit for bits, _ in widths for digit in tabled(bits)})
    total += 0 if cost.inline else sum(map(cost.body, widths))
    for name, few in found.items():
        fitting = [width for width in widths if _fits(few, width)]
        taken, width = min((cost.of(few, w), w) for w in fitting) if fitting else (0, None)
        if width is None or taken >= cost.dense[name]:
            taken = cost.dense[name]
        else:
            assigned[name] = width
        total += taken
    return assigned, total


def _fits(few: FewValues, width: Width) -> bool:
    bits, cut = width
    return few.bits <= bits and (cut or len(few.indices) % multiple(bits) == 0)


@dataclass
class _Constants:
    """Constants with short names, one of each."""

    graph: onnx.GraphProto
    taken: set[str]
    names: dict[tuple[Any, ...], str]

    def name(self, array: np.ndarray) -> str:
        """The name of a constant of these numbers."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.names:
            self.names[key] = self.own(array)
        return self.names[key]

    def own(self, array: np.ndarray) -> str:
        """The name of a new constant of these numbers."""
        name = self.fresh()
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def fresh(self) -> str:
        """A name that no value has."""
        count = len(self.taken)
        while (name := f"c{count}") in self.taken:
            count += 1
        self.taken.add(name)
        return name


def _write(
    proto: onnx.ModelProto, found: Mapping[str, FewValues], chosen: Mapping[str, Width], opset: int
) -> None:
    graph = proto.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in chosen]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    constants = _Constants(graph, _values(graph), {})
    books = _common_books({name: (found[name], chosen[name][0]) for name in chosen})
    digits = sorted({digit for bits, _ in chosen.values() for digit in tabled(bits)})
    nodes, names = tables(digits, f"{constants.fresh()}.") if digits else ([], [])
    table = dict(zip(digits, names, strict=True))
    for name, (bits, cut) in chosen.items():
        values, indices = books[name]
        few = found[name]
        # Of indices in common, sessions would make one constant again: see `onnx_file._part_bytes`.
        stored = constants.own(pack(indices, bits))
        arrays = (complete(values, bits), np.array(few.shape, np.int64))
        inputs = [stored, *map(constants.name, arrays), *(table[digit] for digit in tabled(bits))]
        nodes.append(helper.make_node(function_name(bits, cut=cut), inputs, [name], domain=DOMAIN))
        _append(nodes, "Transpose", constants, few.turned)
        _append(nodes, "Mul", constants, few.factor is not None, few.factor)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    proto.functions.extend(
        lookup(bits, cut=cut, opset=opset) for bits, cut in sorted(set(chosen.values()))
    )
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions, their bodies' constants written once."""
    from onnx import inliner

    proto = inliner.inline_local_functions(proto)
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            node.attribute[0].t.name = node.output[0]
            proto.graph.initializer.append(node.attribute[0].t)
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return tidy(proto)


def _append(
    nodes: list[onnx.NodeProto],
    kind: str,
    constants: _Constants,
    wanted: bool,
    operand: np.ndarray | None = None,
) -> None:
    """Does something more to the last node's value, which keeps its name."""
    if not wanted:
        return
    name, inner = nodes[-1].output[0], constants.fresh()
    nodes[-1].output[0] = inner
    inputs = [inner] if operand is None else [inner, constants.name(operand)]
    nodes.append(helper.make_node(kind, inputs, [name]))


def _values(graph: onnx.GraphProto) -> set[str]:
    """The names of all values, inner graphs' among them."""
    named: set[str] = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        named |= {*node.input, *node.output}
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                named |= _values(attribute.g)
    return named


def _common_books(
    wanted: Mapping[str, tuple[FewValues, int]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By constant: values and indices, of another's codebook where that has its values too."""
    made: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    books: list[np.ndarray] = []
    for name, (few, bits) in sorted(wanted.items(), key=lambda each: -len(each[1][0].values)):
        fitting = (b for b in books if len(b) <= 2**bits)
        for book, places in _holding(fitting, few.values):
            made[name] = (book, places[few.indices])
            break
        else:
            books.append(few.values)
            made[name] = (few.values, few.indices)
    return made


def _holding(
    books: Iterable[np.ndarray], values: np.ndarray
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """The codebooks that have all these values, and the place of each."""
    for book in books:
        if book.dtype != values.dtype or book.shape[1:] != values.shape[1:]:
            continue
        places = {entry.tobytes(): i for i, entry in enumerate(book)}
        keys = [entry.tobytes() for entry in values]
        if all(key in places for key in keys):
            yield book, np.array([places[key] for key in keys])
