"""AdaRound: each weight rounded up or down as serves its layer's answers, not to the nearest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from attar.errors import DataError
from attar.quantize.edit import Scheme
from attar.quantize.post_training import quantize, shared_grids
from attar.quantize.scaling import refuse_quantized
from attar.runtimes.aten import argument, constant, operator
from attar.student import Student

STRETCH = (-0.1, 1.1)
"""γ and ζ: the sigmoid's range before it is clipped to 0 … 1, so that both are reached."""
FIRST_BETA, LAST_BETA = 20.0, 2.0
FREE = 0.2
"""The share of the iterations in which nothing yet drives a weight to one of its two neighbours."""
PULL = 0.1
"""What that weighs against the error, which is one for rounding to the nearest."""
LEARNING_RATE = 1e-2
DRAWN = 256
"""Positions that an iteration looks at."""


@dataclass(frozen=True)
class Effort:
    """How much AdaRound looks at and does.

    examples: how many go through the network together; memory grows with them and with what of the
    network is alive at once. positions: how many of a layer's outputs are kept of them, at most.
    iterations: steps a layer. seed: draws positions.
    """

    examples: int = 128
    positions: int = 2048
    iterations: int = 1000
    seed: int = 0


def round_adaptively(
    student: Student,
    scheme: Scheme,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    effort: Effort | None = None,
) -> tuple[Student, dict[str, Any]]:
    """The student with weights on the grids that `scheme` gives them, each rounded up or down so
    that its layer answers best, and what was done.

    The float weights are moved to their grid points (through the batch norm that is folded in), so
    that quantizing the student by the same scheme afterwards rounds to those integers and nothing
    more need be stored. Layer by layer, in order: a layer is asked to answer to the quantized
    network's inputs as the float network does, its ReLU included. Zeros stay zero. Weights that
    share a codebook, that several layers read, or that the network computes are left alone.

    examples: argument tuples, batch first; all are calibrated on, the first `effort.examples` kept.
    Changes the weights in place. The record: `layers` rounded, `moved`, the share of their weights
    not at the nearest point, `error`, the mean of the layers' squared errors over those of rounding
    to the nearest, and `left`, how many were left alone. Source: Nagel et al. 2020,
    arXiv 2004.10568.

    Raises `UsageError` for a quantized student, `DataError` for no examples, `ExportError` for a
    network that can't be traced.

    Example:
        >>> student, record = round_adaptively(  # doctest: +SKIP
        ...     student, scheme, batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
        >>> student = quantize(student, scheme, ...)  # doctest: +SKIP
    """
    refuse_quantized(student, "adaptive rounding")
    effort = effort or Effort()
    kept = _Kept(effort.examples)
    calibrated = quantize(
        student, scheme, kept.passing(examples), example=example, dynamic_shapes=dynamic_shapes
    )
    edit = calibrated.edits[-1]
    prepared = edit.prepared(student.module, example, dynamic_shapes)  # type: ignore[attr-defined]

    def grid_of(layer: Any) -> tuple[Tensor, tuple[int, int]] | None:
        observer = dict(prepared.named_modules()).get(str(argument(layer.node, 1).target))
        if observer is None:
            return None
        most = (observer.quant_max - observer.quant_min) // 2
        return observer.scale, (-most, most)

    return student, _round(student, prepared, grid_of, kept.arguments(), effort)


def round_weights(
    student: Student,
    grids: Mapping[str, tuple[Tensor, tuple[int, int]]],
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    effort: Effort | None = None,
) -> tuple[Student, dict[str, Any]]:
    """As `round_adaptively`, for weights alone: activations stay float.

    grids: by parameter path, the step (a tensor that broadcasts against the weight, of either sign)
    and the outermost integers; weights without one stay as they are.
    """
    from attar.quantize.graph import capture

    refuse_quantized(student, "adaptive rounding")
    effort = effort or Effort()
    kept = _Kept(effort.examples)
    for _ in kept.passing(examples):
        if kept.full:
            break
    graph = capture(student.module, example, dynamic_shapes)

    def grid_of(layer: Any) -> tuple[Tensor, tuple[int, int]] | None:
        path = str(argument(layer.node, 1).target)
        if path not in grids:
            return None
        step, limits = grids[path]
        own, folded = student.module.get_parameter(path), constant(graph, argument(layer.node, 1))
        step = step.cpu().expand(own.shape).flatten(1)
        return step * _folding(own.detach().cpu(), folded)[:, None], limits

    return student, _round(student, graph, grid_of, kept.arguments(), effort)


@dataclass(frozen=True)
class Sample:
    """What a layer reads at some positions, and should answer there.

    inputs: (positions, groups, in). targets: (positions, groups, out), after the ReLU if `relu`.
    bias: (groups, out).
    """

    inputs: Tensor
    targets: Tensor
    bias: Tensor | None = None
    relu: bool = False

    def error(self, weight: Tensor, chosen: Any = slice(None)) -> Tensor:
        """The mean squared error of a weight, (groups, out, in), at the positions `chosen`."""
        answers = torch.einsum("pgi,goi->pgo", self.inputs[chosen], weight)
        answers = answers if self.bias is None else answers + self.bias
        return ((answers.relu() if self.relu else answers) - self.targets[chosen]).square().mean()


def adaround(
    weight: Tensor,
    scale: Tensor,
    limits: tuple[int, int],
    sample: Sample,
    *,
    iterations: int = 1000,
    seed: int = 0,
) -> Tensor:
    """A weight's integers, each one of the two that are next to it, float (groups, out, in).

    The squared error of the layer's answers, over that of rounding to the nearest, falls by Adam in
    V, where a weight is floor(w/scale) + h(V), h(V) = clip(sigmoid(V)·(ζ-γ) + γ, 0, 1); the
    mean of 1 - |2h - 1|^β, β from 20 to 2, drives h to 0 or 1. The nearest integers where they
    are better still. Zeros stay zero.

    weight: (groups, out, in). scale: broadcasts against it. limits: the outermost integers. Source:
    Nagel et al. 2020, arXiv 2004.10568, equations 21 to 25.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = (weight / scale).nan_to_num()  # a channel that its batch norm turns off has no step
    floor, rest = steps.floor(), steps.remainder(1)
    movable = weight != 0
    positions = len(sample.inputs)

    def integers(up: Tensor) -> Tensor:
        return torch.where(movable, floor + up, 0.0).clamp(*limits)

    def error(up: Tensor, chosen: Any = slice(None)) -> Tensor:
        return sample.error(integers(up) * scale, chosen)

    nearest = (rest >= 0.5).float()
    usual = error(nearest)
    if not usual > 0:
        return integers(nearest)
    low, high = STRETCH
    start = ((rest - low) / (high - low)).logit()
    free = round(iterations * FREE)
    with torch.enable_grad():
        v = start.requires_grad_()
        optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
        for step in range(iterations):
            chosen = torch.randint(positions, (min(DRAWN, positions),), generator=generator)
            up = (v.sigmoid() * (high - low) + low).clamp(0, 1)
            loss = error(up, chosen) / usual
            if step >= free:
                share = (step - free) / max(1, iterations - free)
                beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - share)
                loss = loss + PULL * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = (v.detach() >= 0).float()  # h(0) is one half
    return integers(found if error(found) < usual else nearest)


def _round(
    student: Student,
    graph: GraphModule,
    grid_of: Callable[[Any], tuple[Tensor, tuple[int, int]] | None],
    arguments: tuple[Any, ...],
    effort: Effort,
) -> dict[str, Any]:
    from attar.quantize.side_by_side import SideBySide

    rounder = _Rounder(student.module, graph, grid_of, shared_grids(student), effort)
    with torch.no_grad():
        SideBySide(graph, rounder.at).run(*arguments)
    return rounder.record()


@dataclass
class _Rounder:
    """Rounds each layer as the networks come to it, in the graph and in the network."""

    module: nn.Module
    graph: GraphModule
    grid_of: Callable[[Any], tuple[Tensor, tuple[int, int]] | None]
    fixed: Collection[str]
    effort: Effort
    moved: int = 0
    weights: int = 0
    left: int = 0
    errors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reads = Counter(
            n.target for n in self.graph.graph.nodes if n.op == "get_attr" for _ in n.users
        )
        self._own = dict(self.module.named_parameters())

    def at(self, layer: Any) -> Tensor:
        """The quantized layer's answer, its weight rounded first where that may be."""
        held = _held(argument(layer.node, 1))
        grid = self.grid_of(layer)
        if grid is None or not self._is_free(held):
            self.left += 1
            answer: Tensor = layer.answers.quantized
            return answer
        weight = constant(self.graph, held)
        rounded = self._rounded(layer, weight, *grid)
        own = self._own[str(held.target)]
        factor = _folding(own.detach().cpu(), weight)
        factor = factor.reshape(-1, *[1] * (own.dim() - 1))
        baked = torch.where(factor != 0, rounded / factor, own.detach().cpu())
        own.data.copy_(baked)
        weight.copy_(rounded)
        rest = layer.arguments[2:]
        answer = layer.node.target(layer.arguments[0], rounded, *rest)
        assert isinstance(answer, Tensor)
        return answer

    def record(self) -> dict[str, Any]:
        """As JSON for the report."""
        errors = self.errors
        return {
            "layers": len(errors),
            "moved": round(self.moved / max(1, self.weights), 4),
            "error": round(sum(errors) / len(errors), 4) if errors else None,
            "left": self.left,
        }

    def _is_free(self, held: Node) -> bool:
        path = str(held.target)
        own = self._own.get(path)
        return (
            own is not None
            and path not in self.fixed
            and self._reads[held.target] == 1
            and own.shape == constant(self.graph, held).shape
        )

    def _rounded(
        self, layer: Any, weight: Tensor, scale: Tensor, limits: tuple[int, int]
    ) -> Tensor:
        """The folded weight on its grid."""
        groups = 1 if operator(layer.node) == "linear" else int(argument(layer.node, 6, 1))
        relu = _relu_after(layer.node)
        inputs, targets = _sampled(layer, weight, self.effort)
        wide = weight.reshape(groups, len(weight) // groups, -1)
        steps = scale.reshape(len(weight), -1).expand(len(weight), wide.shape[2])
        steps = steps.reshape(wide.shape)
        bias = layer.arguments[2] if len(layer.arguments) > 2 else None
        sample = Sample(
            inputs.reshape(len(inputs), groups, -1),
            (targets.relu() if relu else targets).reshape(len(targets), groups, -1),
            None if bias is None else bias.reshape(groups, -1),
            relu,
        )
        integers = adaround(
            wide, steps, limits, sample, iterations=self.effort.iterations, seed=self.effort.seed
        )
        nearest = (wide / steps).round().clamp(*limits)
        self.moved += int((integers != nearest).sum())
        self.weights += weight.numel()
        usual = float(sample.error(nearest * steps))
        self.errors.append(float(sample.error(integers * steps)) / usual if usual else 1.0)
        return (integers * steps).reshape(weight.shape)


class _Kept:
    """The first of the examples that pass."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._batches: list[tuple[Any, ...]] = []
        self._count = 0

    @property
    def full(self) -> bool:
        """Whether there are as many as wanted."""
        return self._count >= self._most

    def passing(self, examples: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        """The examples as they come, the first of them kept."""
        for arguments in examples:
            if not self.full:
                part = tuple(a[: self._most - self._count] for a in arguments)
                self._batches.append(part)
                self._count += len(part[0])
            yield arguments

    def arguments(self) -> tuple[Any, ...]:
        """All that were kept, as one batch."""
        if not self._batches:
            raise DataError("adaptive rounding needs examples, and there are none")
        return tuple(torch.cat(parts) for parts in zip(*self._batches, strict=True))


def _held(node: Node) -> Node:
    """What reads a constant, behind its observer if there is one."""
    return argument(node) if node.op == "call_module" else node


def _folding(own: Tensor, folded: Tensor) -> Tensor:
    """By what each channel of a weight was multiplied when its batch norm was folded, (channels,);
    zero for a channel of zeros."""
    flat, place = own.flatten(1), own.flatten(1).abs().argmax(1, keepdim=True)
    largest = flat.gather(1, place)
    return torch.where(largest != 0, folded.flatten(1).gather(1, place) / largest, 0.0).flatten()


def _relu_after(layer: Node) -> bool:
    users = list(layer.users)
    return len(users) == 1 and operator(users[0]) == "relu"


def _sampled(layer: Any, weight: Tensor, effort: Effort) -> tuple[Tensor, Tensor]:
    """What the quantized layer reads at some of its output positions, (positions, inputs), and what
    the float layer answers there, (positions, out)."""
    generator = torch.Generator().manual_seed(effort.seed)
    x, y = layer.inputs.quantized, layer.answers.in_float
    if operator(layer.node) == "linear":
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        at = torch.randperm(len(y), generator=generator)[: effort.positions]
        return x[at], y[at]
    patches = _patches(x, weight.shape[2:], layer.node)
    outputs = (len(y), *y.shape[2:])
    every = torch.randperm(int(torch.Size(outputs).numel()), generator=generator)
    n, *sides = torch.unravel_index(every[: effort.positions], outputs)
    at_each: Any = (n, slice(None), *sides)
    return patches[at_each].flatten(1), y[at_each]


def _patches(x: Tensor, kernel: Iterable[int], layer: Node) -> Tensor:
    """A view of what a convolution reads, (N, channels, *outputs, *kernel)."""
    sizes = list(kernel)
    stride, dilation = (_each(argument(layer, place, 1), len(sizes)) for place in (3, 5))
    spans = [d * (k - 1) for k, d in zip(sizes, dilation, strict=True)]
    padding = argument(layer, 4, 0)
    if isinstance(padding, str):
        both = [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in spans]
    else:
        both = [(p, p) for p in _each(padding, len(sizes))]
    x = F.pad(x, [side for pair in reversed(both) for side in pair])
    for place, (span, step, apart) in enumerate(zip(spans, stride, dilation, strict=True)):
        x = x.unfold(2 + place, span + 1, step)[..., ::apart]
    return x


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values if len(values) == count else values * count
