"""Weights that are stored in bytes and computed with in float."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def store_in_bytes(proto: onnx.ModelProto, *, negated: bool = False) -> set[str]:
    """Turns what dequantizes a uint8 weight into a cast and a product, in place, and returns the
    names of the weights' values.

    Sessions leave `DequantizeLinear` for integer kernels to use, so a layer that computes in float
    would dequantize its weight in every call; ordinary operators on constants are computed once,
    when the file is loaded.

    negated: store -w and negate it after the cast, for a runtime that takes a cast and a product
    for a dequantization too.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    stored: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != onnx.TensorProto.UINT8:
            nodes.append(node)
            continue
        value = node.output[0]
        integers, scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)]
        centred = (integers.astype(np.int16) - zero.reshape(shape)).astype(np.int8)
        constant, factor, cast, flipped = (
            f"{value}_{name}" for name in ("int8", "scale", "float", "negated")
        )
        for name, array in (
            (constant, -centred if negated else centred),
            (factor, scale.reshape(shape)),
        ):
            graph.initializer.append(numpy_helper.from_array(array, name))
        floats = flipped if negated else cast
        to = onnx.TensorProto.FLOAT
        nodes.append(helper.make_node("Cast", [constant], [cast], f"{node.name}/Cast", to=to))
        if negated:
            nodes.append(helper.make_node("Neg", [cast], [flipped], f"{node.name}/Neg"))
        nodes.append(helper.make_node("Mul", [floats, factor], [value], f"{node.name}/Mul"))
        stored.add(value)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    return stored


def drop_unused(graph: onnx.GraphProto) -> None:
    """Removes the constants that nothing reads, in place."""
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
