"""Layers that are to stay float, kept from ONNX Runtime's own ideas."""

from __future__ import annotations

import onnx
from onnx import helper

from attar.runtimes.onnx_bytes import store_in_bytes
from attar.runtimes.onnx_weights import spell_out

OWN_DOMAIN = "com.microsoft"


def keep_float(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Makes float layers that read a dequantized value unmistakable, in place.

    ONNX Runtime quantizes a float layer's weights on its own (one scale a tensor, all eight bits)
    where the layer lies between `DequantizeLinear` and `QuantizeLinear`. It leaves its own float
    operators alone, which compute the same.
    """
    constants = {w.name for w in proto.graph.initializer} | store_in_bytes(proto) | spell_out(proto)
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
