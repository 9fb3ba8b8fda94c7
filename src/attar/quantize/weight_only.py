"""Weights stored in few bits and computed with in float: smaller files, no activation on a grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from attar.errors import UsageError
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
from attar.registry import near
from attar.runtimes.base import runtimes
from attar.student import Student
from attar.student.edits import Rounds, RowGrid
from attar.student.fingerprint import weights_sha256

Precision = Literal["int8", "int4", "float16", "bfloat16"]
Kernel = Literal["expanded", "matmulnbits"]

BITS = {"int8": 8, "int4": 4, "float16": 16, "bfloat16": 16}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT_BYTES = 4
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class WeightScheme:
    """How weights are stored.

    runtime: whose files they are for. precision: `int8`, `int4`, `float16` or `bfloat16`. group:
    how many weights of a row share a scale; `None`: all. float_layers: paths of modules whose
    weights stay as they are, with all inside them. kernel: `expanded`, floats made once at load, or
    `matmulnbits`, products by 4-bit integers where the runtime has them.
    """

    runtime: str = "onnxruntime"
    precision: Precision = "int8"
    group: int | None = None
    float_layers: tuple[str, ...] = ()
    kernel: Kernel = "expanded"


class WeightsQuantized(WeightEdit):
    """A float network whose weights are stored in 4 or 8 bits on symmetric grids, or as halves.

    The graph computes in float with the rounded weights, and so does the exported file, which
    holds the integers and expands them when it is loaded.
    """

    kind: ClassVar[str] = "weights-quantized"
    rounds: ClassVar[Rounds] = "weights"
    scheme_class: ClassVar[type[Any]] = WeightScheme

    @property
    def has_scales(self) -> bool:
        return self.scheme.precision not in HALVES

    def settled(self, module: nn.Module) -> WeightsQuantized:
        """Puts the weights where the file has them, so that they pack in as few bits.

        The graph stays the same: what is on its grid already is rounded to itself. Not so for
        halves where a batch norm may be folded into a weight (what is rounded is their product),
        nor for a weight with a second name, which others may read."""
        if not self.has_scales and any(isinstance(m, BATCH_NORMS) for m in module.modules()):
            return self
        names = Counter(map(id, dict(module.named_parameters(remove_duplicate=False)).values()))
        with torch.no_grad():
            for path in self.weights:
                weight = module.get_parameter(path)
                if weight.dtype == torch.float32 and names[id(weight)] == 1:
                    weight.copy_(self._rounded(path, weight))
        return WeightsQuantized(self.scheme, self.weights, self.scales, weights_sha256(module))

    def row_grids(self) -> dict[str, RowGrid]:
        """Each weight's scales, and how many weights of a row share one."""
        return {
            path: RowGrid(scale, self.scheme.group if scale.shape[1] > 1 else None)
            for path, scale in self.scales.items()
        }

    def _rounded(self, path: str, weight: Tensor) -> Tensor:
        """A weight as the file has it; whole zeros without a sign."""
        if not self.has_scales:
            return weight.to(HALVES[self.scheme.precision]).float()
        scale, bits = self.scales[path].to(weight.device), BITS[self.scheme.precision]
        rows = integers(weight, scale, bits, group=self.scheme.group)
        on_grid = (rows.float() * scale[..., None]).flatten(1)[:, : weight[0].numel()]
        found = on_grid.reshape(weight.shape) + 0.0
        same = torch.equal(integers(found, scale, bits, group=self.scheme.group), rows)
        return found if same else weight  # products may overflow

    def store(self, graph: GraphModule, held: Held) -> None:
        import attar.runtimes.onnx_operators  # noqa: F401 - has torch.ops.attar

        with torch.no_grad():
            made = self._halves(graph, held) if not self.has_scales else self._grid(graph, held)
        made.meta = {k: v for k, v in held.node.meta.items() if k != "val"}
        made.meta["val"] = held.node.meta["val"]

    def _halves(self, graph: GraphModule, held: Held) -> Any:
        precision = self.scheme.precision
        node = held.node
        value = (held.own * held.factor.reshape(-1, *[1] * (held.own.dim() - 1))).to(
            HALVES[precision]
        )
        stored = put(graph, node, precision, value)
        return _replaced(graph, node, torch.ops.attar.half_weight.default, (stored,))

    def _grid(self, graph: GraphModule, held: Held) -> Any:
        node, scheme, own = held.node, self.scheme, held.own
        bits = BITS[scheme.precision]
        rows = integers(own, self.scales[held.path], bits, group=scheme.group).flatten(1)
        stored = put(graph, node, scheme.precision, F.pad(rows, (0, rows.shape[1] % 2)))
        scale = put(graph, node, "scale", self.scale_of(held))
        arguments = (stored, scale, list(own.shape), bits, scheme.kernel)
        return _replaced(graph, node, torch.ops.attar.stored_weight.default, arguments)

    def summary(self) -> str:
        scheme = self.scheme
        group = f" in groups of {scheme.group}" if scheme.group else ""
        kept = f", {len(scheme.float_layers)} layers stay float" if scheme.float_layers else ""
        return f"{scheme.precision} weights{group}, computed in float{kept}"


def _replaced(graph: GraphModule, node: Any, target: Any, arguments: tuple[Any, ...]) -> Any:
    with graph.graph.inserting_before(node.next):
        made = graph.graph.call_function(target, arguments)
    # The new constants stand before the old one, and what is computed from them after it.
    node.replace_all_uses_with(made)
    return made


def quantize_weights(
    student: Student,
    precision: Precision,
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    runtime: str = "onnxruntime",
    group: int | None = None,
    float_layers: tuple[str, ...] = (),
    grids: Mapping[str, Tensor] | None = None,
    kernel: Kernel = "expanded",
) -> Student:
    """The student with its weights stored as `precision`, and computed with in float.

    These are the weights of convolutions, linear layers and embeddings, wherever that makes the
    file smaller; biases and norms stay float. Integers lie on symmetric grids (`step_sizes`). No
    example is looked at; `example` and `dynamic_shapes` are what the network is traced with
    (`Task.example`).

    group: an even number of weights of a row (an output channel's, flat) that share a scale; `None`
    is a scale a row. Weights that share a codebook get one scale a tensor, so that equal ones stay
    equal. float_layers: paths of modules that keep float weights, with all inside them. grids:
    scales that were learnt, by parameter path, one, (rows,) or (rows, groups), for the network's
    own weights and the integers of `weight_scales.LIMITS`; others are chosen here.

    Raises `UsageError` for a precision that the runtime lacks, a group or grid that doesn't fit, an
    unknown layer, or where no weight is left; `ExportError` for a network that can't be traced.

    Example:
        >>> small = quantize_weights(                                        # doctest: +SKIP
        ...     student, "int4", group=32, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    if precision not in get_args(Precision):
        raise UsageError(
            f"unknown precision {precision!r} for weights{near(precision, list(BITS))}"
        )
    integral = precision not in HALVES
    runtimes.get(runtime).require_scheme(f"{precision}-weights" if integral else precision)
    if not integral and (group is not None or grids):
        raise UsageError(f"{precision} weights have no grids: leave out the group and the scales")
    if group is not None and (group < 2 or group % 2):
        raise UsageError(f"a group is an even number of weights, such as 32, not {group}")
    if kernel == "matmulnbits":
        from attar.runtimes.onnx_weights import BLOCKS

        if runtime != "onnxruntime" or precision != "int4" or group not in BLOCKS:
            raise UsageError(
                "the kernel matmulnbits is ONNX Runtime's for int4 weights in groups of "
                f"{', '.join(map(str, BLOCKS))}: the kernel expanded works everywhere"
            )
    refuse_unknown_layers(student.module, float_layers)
    scheme = WeightScheme(runtime, precision, group, float_layers, kernel)
    graph = capture(student.module, example, dynamic_shapes)
    held = {h.path: h for h in held_weights(graph, student.module)}
    held = {p: h for p, h in held.items() if not inside(p, float_layers)}
    given = _given(grids or {}, held, group)
    shared = shared_grids(student)
    scales: dict[str, Tensor] = {}
    chosen: list[str] = []
    for path, each in held.items():
        if integral:
            scale = given.get(path)
            if scale is None:
                scale = step_sizes(
                    each.own, BITS[precision], group=group, per_tensor=path in shared
                )
            if path not in given and not _smaller(each.own, scale, BITS[precision]):
                continue
            scales[path] = scale
        else:
            _refuse_overflow(each, precision)
        chosen.append(path)
    if not chosen:
        raise UsageError(
            f"no weight is left to store as {precision}: float_layers names all there are, or the "
            "network has no convolution, linear layer or embedding"
        )
    return student.edited(WeightsQuantized(scheme, chosen, scales, weights_sha256(student.module)))


def _given(
    grids: Mapping[str, Tensor], held: Mapping[str, Held], group: int | None
) -> dict[str, Tensor]:
    """Scales that were handed in, as (rows, groups)."""
    made = {}
    for path, scale in grids.items():
        if path not in held:
            raise UsageError(f"grids: the student has no weight {path!r}{near(path, list(held))}")
        own = held[path].own
        rows, columns = len(own), own[0].numel()
        groups = -(-columns // group) if group else 1
        value = scale.detach().cpu().float()
        value = value.reshape(-1, 1) if value.dim() < 2 else value
        if value.shape[0] not in (1, rows) or value.shape[1] not in (1, groups):
            raise UsageError(
                f"grids: {path} has {rows} rows of {groups} groups, and its scales the shape "
                f"{tuple(scale.shape)}"
            )
        if not (value.isfinite() & (value != 0)).all():
            raise UsageError(f"grids: the scales of {path} are not all finite and other than zero")
        made[path] = value.expand(rows, -1).contiguous()
    return made


def _smaller(weight: Tensor, scale: Tensor, bits: int) -> bool:
    return weight.numel() * bits / 8 + scale.numel() * FLOAT_BYTES < weight.numel() * FLOAT_BYTES


def _refuse_overflow(held: Held, precision: str) -> None:
    largest = float((held.own.flatten(1) * held.factor).abs().max())
    if largest > torch.finfo(HALVES[precision]).max:
        raise UsageError(
            f"{precision} can't hold {held.path}, whose largest weight is {largest:.3g}: bfloat16 "
            "can"
        )
