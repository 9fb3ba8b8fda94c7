"""What stands for small weights in an exported graph, spelled out in ONNX's own operators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from attar.runtimes.onnx_bytes import drop_unused
from attar.runtimes.onnx_operators import DOMAIN, DYNAMIC, HALF, STORED

MICROSOFT = "com.microsoft"
BLOCKS = (16, 32, 64, 128, 256)
"""The lengths of groups that MatMulNBits takes."""
NIBBLE, ABOVE_ZERO = 4, 8
"""The bits of half a byte, and what is added to a 4-bit integer so that none is negative."""


def spell_out(proto: onnx.ModelProto, *, negated: bool = False) -> set[str]:
    """Replaces the nodes of the domain `attar` in place; returns the names of weights' values.

    Weights become integers (two to a byte for 4 bits) or halves, followed by ordinary operators on
    constants, which sessions compute once, when they load the file. The products of linear layers
    that ask for it become `MatMulNBits`, which multiplies by the integers.

    negated: store -w and negate it, for a runtime that would take a cast and a product for a
    quantized layer.
    """
    if all(node.domain != DOMAIN for node in proto.graph.node):
        return set()
    graph = _Graph(proto.graph)
    by_integers, gone = _products(graph, proto)
    weights: set[str] = set()
    for node in proto.graph.node:
        if node.name in by_integers:
            _product(graph, node, *by_integers[node.name])
        elif node.name in gone:
            continue
        elif node.domain != DOMAIN:
            graph.nodes.append(node)
        elif node.op_type == DYNAMIC:
            _dynamic(graph, node)
        else:
            weights.add(node.output[0])
            _weight(graph, node, negated=negated)
    del proto.graph.node[:]
    proto.graph.node.extend(graph.nodes)
    drop_unused(proto.graph)
    if by_integers and all(o.domain != MICROSOFT for o in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return weights


class _Graph:
    """A graph being rewritten: its constants, its readers, and the nodes so far."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.on_grids: dict[str, tuple[str, str, str]] = {}
        self._taken = {node.name for node in graph.node}

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name])

    def constant(self, name: str, array: Any) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, source: onnx.NodeProto, kind: str, inputs: list[str], **options: Any) -> str:
        """A node beside `source`, named after it; returns the name of its value."""
        value = f"{source.output[0]}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, [value], self.name_beside(source, kind), **options)
        )
        return value

    def name_beside(self, source: onnx.NodeProto, kind: str) -> str:
        """A name for a node beside `source` that no other has."""
        plain = name = f"{source.name.rpartition('/')[0]}/{kind}"
        count = 1
        while name in self._taken:
            count += 1
            name = f"{plain}_{count}"
        self._taken.add(name)
        return name

    def give(self, value: str) -> None:
        """Calls the last node's value by this name."""
        self.nodes[-1].output[0] = value


def _weight(graph: _Graph, node: onnx.NodeProto, *, negated: bool) -> None:
    value = node.output[0]
    if node.op_type == HALF:
        graph.add(node, "Cast", [node.input[0]], to=onnx.TensorProto.FLOAT)
        graph.give(value)
        return
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    integers, scale = (graph.array(name) for name in node.input)
    shape = [int(n) for n in options["shape"]]
    floats = _floats(graph, node, integers, options["bits"], negated=negated)
    rows, groups = scale.shape
    columns = math.prod(shape[1:])
    if groups > 1:
        inner = graph.constant(f"{value}_groups", np.array([rows, groups, -1]))
        floats = graph.add(node, "Reshape", [floats, inner])
        scale = scale[..., None]
    floats = graph.add(node, "Mul", [floats, graph.constant(f"{value}_scale", scale)])
    if groups > 1:
        inner = graph.constant(f"{value}_rows", np.array([rows, -1]))
        floats = graph.add(node, "Reshape", [floats, inner])
    if integers.shape[1] != columns:
        ends = [
            graph.constant(f"{value}_{name}", np.array([place]))
            for name, place in (("start", 0), ("end", columns), ("axis", 1))
        ]
        floats = graph.add(node, "Slice", [floats, *ends])
    if len(shape) > 2:
        whole = graph.constant(f"{value}_shape", np.array(shape))
        graph.add(node, "Reshape", [floats, whole])
    graph.give(value)


def _floats(
    graph: _Graph, node: onnx.NodeProto, integers: np.ndarray, bits: int, *, negated: bool
) -> str:
    """The integers as a value of floats, stored as small as they are."""
    value = node.output[0]
    if bits == 8:
        stored = graph.constant(f"{value}_int8", -integers if negated else integers)
        floats = graph.add(node, "Cast", [stored], to=onnx.TensorProto.FLOAT)
        return graph.add(node, "Neg", [floats]) if negated else floats
    stored = graph.constant(f"{value}_int4", _two_to_a_byte(integers))
    mask = graph.constant(f"{value}_mask", np.uint8(2**NIBBLE - 1))
    shift = graph.constant(f"{value}_shift", np.uint8(NIBBLE))
    low = graph.add(node, "BitwiseAnd", [stored, mask])
    high = graph.add(node, "BitShift", [stored, shift], direction="RIGHT")
    both = graph.add(node, "Concat", [low, high], axis=1)
    floats = graph.add(node, "Cast", [both], to=onnx.TensorProto.FLOAT)
    middle = graph.constant(f"{value}_middle", np.float32(ABOVE_ZERO))
    return graph.add(node, "Sub", [floats, middle])


def _two_to_a_byte(integers: np.ndarray) -> np.ndarray:
    """(rows, columns) in -8..7 as (rows, columns / 2): a row's first half in the low bits."""
    raised = (integers + ABOVE_ZERO).astype(np.uint8)
    low, high = np.split(raised, 2, axis=1)
    return low | (high << NIBBLE)


_Product = tuple[onnx.NodeProto, str]
"""A stored weight's node, and the bias to add or `""`."""


def _products(graph: _Graph, proto: onnx.ModelProto) -> tuple[dict[str, _Product], set[str]]:
    """By name: the products to do by integers; and the nodes that they leave no use for."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    found: dict[str, _Product] = {}
    gone: set[str] = set()
    for weight in proto.graph.node:
        if weight.op_type != STORED or not _takes_integers(graph, weight):
            continue
        moved = readers.get(weight.output[0], [])
        turned = [n for n in moved if n.op_type == "Transpose"]
        products = [n for n in moved if _is_product(n, weight.output[0])]
        for turn in turned:
            products += [n for n in readers[turn.output[0]] if n.op_type == "MatMul"]
        reading = [*moved, *(n for turn in turned for n in readers[turn.output[0]])]
        if len(products) + len(turned) == len(reading):
            gone |= {weight.name, *(turn.name for turn in turned)}
            for node in products:
                bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
                found[node.name] = (weight, bias)
    return found, gone


def _takes_integers(graph: _Graph, weight: onnx.NodeProto) -> bool:
    options = {a.name: helper.get_attribute_value(a) for a in weight.attribute}
    integers, scale = (graph.array(name) for name in weight.input)
    wanted = options["kernel"] == b"matmulnbits" and options["bits"] == NIBBLE
    return wanted and len(options["shape"]) == 2 and _block(integers, scale) is not None


def _is_product(node: onnx.NodeProto, weight: str) -> bool:
    """Whether it is x · wᵀ plus a bias."""
    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    neutral = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    return node.op_type == "Gemm" and node.input[1] == weight and {**neutral, **options} == wanted


def _block(integers: np.ndarray, scale: np.ndarray) -> int | None:
    """The length of MatMulNBits's blocks for these groups; a row of one may be shorter."""
    columns, groups = integers.shape[1], scale.shape[1]
    if groups > 1:
        length = columns // groups
        return length if length in BLOCKS else None
    return next((block for block in BLOCKS if block >= columns), None)


def _product(graph: _Graph, node: onnx.NodeProto, weight: onnx.NodeProto, bias: str) -> None:
    integers, scale = (graph.array(name) for name in weight.input)
    rows, columns = (int(n) for n in next(a.ints for a in weight.attribute if a.name == "shape"))
    block = _block(integers, scale)
    assert block is not None
    missing = scale.shape[1] * block - integers.shape[1]
    whole = np.pad(integers, ((0, 0), (0, missing))).reshape(rows, -1, block)
    raised = (whole + ABOVE_ZERO).astype(np.uint8)
    value = node.output[0]
    stored = graph.constant(f"{value}_int4", raised[..., ::2] | (raised[..., 1::2] << NIBBLE))
    inputs = [node.input[0], stored, graph.constant(f"{value}_scale", scale)]
    options = {"K": columns, "N": rows, "bits": NIBBLE, "block_size": block}
    graph.add(
        node,
        "MatMulNBits",
        [*inputs, "", "", bias] if bias else inputs,
        domain=MICROSOFT,
        **options,
    )
    graph.give(value)


def _dynamic(graph: _Graph, node: onnx.NodeProto) -> None:
    x, weight, scale, *bias = node.input
    integers, step, zero = _on_a_grid(graph, node, x)
    product = graph.add(node, "MatMulInteger", [integers, weight, zero])
    floats = graph.add(node, "Cast", [product], to=onnx.TensorProto.FLOAT)
    steps = graph.add(node, "Mul", [step, scale])
    floats = graph.add(node, "Mul", [floats, steps])
    if bias and bias[0]:
        graph.add(node, "Add", [floats, bias[0]])
    graph.give(node.output[0])


def _on_a_grid(graph: _Graph, node: onnx.NodeProto, x: str) -> tuple[str, str, str]:
    """A value's integers, step and zero point, made once for all that read them."""
    if x not in graph.on_grids:
        outputs = (f"{x}_uint8", f"{x}_step", f"{x}_zero")
        kind = "DynamicQuantizeLinear"
        name = graph.name_beside(node, kind)
        graph.nodes.append(helper.make_node(kind, [x], outputs, name))
        graph.on_grids[x] = outputs
    return graph.on_grids[x]
