"""Operators of graphs whose weights are stored small, and the nodes that stand for them in ONNX.

The exporter computes what it can of constants, which would make floats of them again. So a stored
weight leaves it as a node of a domain of its own, which `onnx_weights` then spells out in ONNX's
operators, as the runtime at hand likes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor

DOMAIN = "attar"
STORED, HALF, DYNAMIC = "StoredWeight", "HalfWeight", "DynamicLinear"
LEVELS = 255


@torch.library.custom_op("attar::stored_weight", mutates_args=())
def stored_weight(
    stored: Tensor, scale: Tensor, shape: list[int], bits: int, kernel: str
) -> Tensor:
    """A float weight from integers.

    stored: int8 (rows, columns), each row a weight's first dimension, the rest of it flat, with
    zeros after it. scale: (rows, groups): the columns are so many groups of equal length. shape:
    the weight's. bits: what an integer takes in a file. kernel: `expanded`, or `matmulnbits` where
    a runtime may multiply by the integers.
    """
    values = stored.to(scale.dtype).reshape(*scale.shape, -1) * scale[..., None]
    return values.flatten(1)[:, : math.prod(shape[1:])].reshape(shape).contiguous()


@stored_weight.register_fake
def _(stored: Tensor, scale: Tensor, shape: list[int], bits: int, kernel: str) -> Tensor:
    return scale.new_empty(shape)


@torch.library.custom_op("attar::half_weight", mutates_args=())
def half_weight(stored: Tensor) -> Tensor:
    """A float weight from float16 or bfloat16."""
    return stored.float()


@half_weight.register_fake
def _(stored: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=torch.float32)


@torch.library.custom_op("attar::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose input is put on a uint8 grid of its own in every call, one for the whole
    tensor, and multiplied in integers: ONNX's DynamicQuantizeLinear and MatMulInteger.

    x: (..., inputs). weight: int8 (inputs, outputs). scale: (outputs,). bias: (outputs,) or none.
    """
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = (high - low) / LEVELS
    zero = torch.where(step > 0, (-low / step).round().clamp(0, LEVELS), 0)
    on_grid = torch.where(step > 0, ((x / step).round() + zero).clamp(0, LEVELS), 0)
    # Products of 8-bit integers and their sums are exact in float64.
    product = ((on_grid - zero).double() @ weight.double()).float() * (step * scale)
    return product if bias is None else product + bias


@dynamic_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _placeholder(
    name: str, inputs: list[str], attributes: dict[str, OpSchema.AttrType], optional: int = 0
) -> values.Op:
    """An operator of the domain `attar` that takes tensors of any types and gives floats."""
    kinds = [f"tensor({t})" for t in ("float", "int8", "float16", "bfloat16")]
    required = len(inputs) - optional
    parameters = [
        OpSchema.FormalParameter(
            each,
            f"T{i}",
            param_option=OpSchema.FormalParameterOption.Single
            if i < required
            else OpSchema.FormalParameterOption.Optional,
        )
        for i, each in enumerate(inputs)
    ]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=parameters,
        outputs=[OpSchema.FormalParameter("result", "R")],
        type_constraints=[
            *((f"T{i}", kinds, "") for i in range(len(inputs))),
            ("R", ["tensor(float)"], ""),
        ],
        attributes=[OpSchema.Attribute(k, v, required=True) for k, v in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


def translations() -> dict[Any, Callable[..., Any]]:
    """What the exporter (`torch.onnx.export`) writes for each operator here."""
    kind = OpSchema.AttrType
    own = torch.ops.attar
    stored = {"shape": kind.INTS, "bits": kind.INT, "kernel": kind.STRING}
    weight = _placeholder(STORED, ["stored", "scale"], stored)
    half = _placeholder(HALF, ["stored"], {})
    linear = _placeholder(DYNAMIC, ["x", "weight", "scale", "bias"], {}, optional=1)
    return {
        own.stored_weight.default: lambda stored, scale, shape, bits, kernel: weight(
            stored, scale, shape=shape, bits=bits, kernel=kernel
        ),
        own.half_weight.default: lambda stored: half(stored),
        own.dynamic_linear.default: lambda x, w, scale, bias: linear(
            x, w, scale, *([] if bias is None else [bias])
        ),
    }
