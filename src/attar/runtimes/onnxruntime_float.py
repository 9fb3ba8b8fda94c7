"""Layers that are to stay float, kept from ONNX Runtime's own ideas."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

OWN_DOMAIN = "com.microsoft"


def store_in_bytes(proto: onnx.ModelProto) -> set[str]:
    """Turns what dequantizes a uint8 weight into a cast and a product, in place, and returns the
    names of the weights' values.

    Sessions leave `DequantizeLinear` for integer kernels to use, so a layer that computes in float
    would dequantize its weight in every call; ordinary operators on constants are computed once,
    when the file is loaded.
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
        centred = integers.astype(np.int16) - zero.reshape(shape)
        for name, array in (("int8", centred.astype(np.int8)), ("scale", scale.reshape(shape))):
            graph.initializer.append(numpy_helper.from_array(array, f"{value}_{name}"))
        integers_name, scale_name, floats = (f"{value}_{n}" for n in ("int8", "scale", "float"))
        made = [
            helper.make_node(
                "Cast", [integers_name], [floats], f"{node.name}/Cast", to=onnx.TensorProto.FLOAT
            ),
            helper.make_node("Mul", [floats, scale_name], [value], f"{node.name}/Mul"),
        ]
        nodes.extend(made)
        stored.add(value)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return stored


def keep_float(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Makes float layers that read a dequantized value unmistakable, in place.

    ONNX Runtime quantizes a float layer's weights on its own (one scale a tensor, all eight bits)
    where the layer lies between `DequantizeLinear` and `QuantizeLinear`. It leaves its own float
    operators alone, which compute the same.
    """
    constants = {w.name for w in proto.graph.initializer} | store_in_bytes(proto)
    dequantized = {
        value
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear"
        for value in node.output
    }
    changed = False
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.domain:
            continue
        if node.input[0] in dequantized and node.input[1] in constants:
            _as_own(node)
            changed = True
    if changed and all(o.domain != OWN_DOMAIN for o in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(OWN_DOMAIN, 1))
    return proto


def _as_own(node: onnx.NodeProto) -> None:
    if node.op_type == "Gemm":  # has to have an activation: one that changes nothing
        identity = {"activation": "LeakyRelu", "activation_alpha": 1.0}
        node.attribute.extend(helper.make_attribute(k, v) for k, v in identity.items())
    node.op_type, node.domain = f"Fused{node.op_type}", OWN_DOMAIN


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
