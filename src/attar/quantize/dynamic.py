"""int8 without calibration: linear layers put their inputs on a grid of its own in every call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from attar.errors import UsageError
from attar.quantize.cpu import safe_on, weight_bits
from attar.quantize.graph import capture
from attar.quantize.post_training import shared_grids
from attar.quantize.weight_edit import (
    Held,
    WeightEdit,
    held_weights,
    inside,
    put,
    refuse_unknown_layers,
)
from attar.quantize.weight_scales import integers, step_sizes
from attar.runtimes.aten import argument, operator
from attar.runtimes.base import runtimes
from attar.student import Student
from attar.student.edits import Rounds, RowGrid
from attar.student.fingerprint import weights_sha256

LINEAR = {"linear": 1}


@dataclass(frozen=True)
class DynamicScheme:
    """What is computed in int8, and how.

    runtime: whose kernels it is for. weight_bits: 8, or 7 for processors whose 8-bit products
    overflow; by default, as this one needs. float_layers: paths of modules whose linear layers
    compute in float, with all inside them.
    """

    runtime: str = "onnxruntime"
    weight_bits: int = field(default_factory=lambda: weight_bits("auto"))
    float_layers: tuple[str, ...] = ()


class QuantizedDynamically(WeightEdit):
    """Linear layers in int8: int8 weights with a scale an output channel, inputs in uint8.

    An input's grid is its range in this very call, over the whole batch (ONNX's
    DynamicQuantizeLinear), so an example's answer depends a little on what it is asked with.
    """

    kind: ClassVar[str] = "quantized-dynamically"
    rounds: ClassVar[Rounds] = "activations"
    scheme_class: ClassVar[type[Any]] = DynamicScheme

    def settled_at(self, weights_sha256: str) -> QuantizedDynamically:
        """The same of weights that lie on its grids, with this checksum."""
        return QuantizedDynamically(self.scheme, self.weights, self.scales, weights_sha256)

    def row_grids(self) -> dict[str, RowGrid]:
        return {path: RowGrid(scale, None) for path, scale in self.scales.items()}

    def store(self, graph: GraphModule, held: Held) -> None:
        import attar.runtimes.onnx_operators  # noqa: F401 - has torch.ops.attar

        with torch.no_grad():
            rows = integers(held.own, self.scales[held.path], self.scheme.weight_bits)
            stored = put(graph, held.node, "int8", rows.flatten(1).T.contiguous())
            scale = put(graph, held.node, "scale", self.scale_of(held).flatten())
        for node in list(held.node.users):
            if operator(node) == "linear" and argument(node, 1) is held.node:
                node.target = torch.ops.attar.dynamic_linear.default
                node.args = (argument(node), stored, scale, argument(node, 2))

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "safe_on": safe_on(self.scheme.weight_bits)}

    def summary(self) -> str:
        bits, kept = self.scheme.weight_bits, len(self.scheme.float_layers)
        text = f"linear layers in int8, inputs' grids chosen in every call, {bits}-bit weights"
        return f"{text} (safe on {safe_on(bits)})" + (f", {kept} layers stay float" if kept else "")


def quantize_dynamically(
    student: Student,
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    runtime: str = "onnxruntime",
    weight_bits: int | None = None,
    float_layers: tuple[str, ...] = (),
) -> Student:
    """The student with its linear layers in int8, their inputs' grids chosen in every call.

    It needs no look at data, and suits transformers, whose activations' ranges vary from text to
    text. Convolutions and all else compute in float. `example` and `dynamic_shapes` are what the
    network is traced with (`Task.example`).

    weight_bits: 8, or 7 (`attar.quantize.weight_bits`); `None` asks this machine. float_layers:
    paths of modules that stay float, with all inside them. Weights that share a codebook get one
    scale a tensor.

    Raises `UsageError` for a runtime without such kernels, an unknown layer, or a network without
    linear layers; `ExportError` for one that can't be traced.

    Example:
        >>> fast = quantize_dynamically(                                     # doctest: +SKIP
        ...     student, example=(tokens,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    runtimes.get(runtime).require_scheme("int8-dynamic")
    refuse_unknown_layers(student.module, float_layers)
    if weight_bits not in (None, 7, 8):
        raise UsageError(f"weights take 7 or 8 bits here, not {weight_bits}")
    made = DynamicScheme(runtime=runtime, float_layers=float_layers)
    if weight_bits is not None:
        made = replace(made, weight_bits=weight_bits)
    graph = capture(student.module, example, dynamic_shapes)
    shared = shared_grids(student)
    scales: dict[str, Tensor] = {
        held.path: step_sizes(held.own, made.weight_bits, per_tensor=held.path in shared)
        for held in held_weights(graph, student.module, LINEAR)
        if not inside(held.path, float_layers)
    }
    if not scales:
        raise UsageError(
            "the scheme int8-dynamic is for linear layers, and the network has none that "
            "float_layers leaves: int8 computes convolutions too"
        )
    sha256 = weights_sha256(student.module)
    return student.edited(QuantizedDynamically(made, list(scales), scales, sha256))
