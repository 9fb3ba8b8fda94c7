"""Cross-layer equalisation: each channel's range alike in the layer that makes it and in those that
read it, in a network that answers as before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from attar.errors import DataError
from attar.quantize.graph import FOLDABLE, trace
from attar.quantize.post_training import shared_grids
from attar.quantize.scaling import (
    Link,
    groups_of,
    input_peaks,
    links,
    peaks,
    refuse_quantized,
    restore,
    scale,
    scale_all,
    weights_of,
)
from attar.runtimes.aten import argument, is_constant, operator
from attar.student import Student

SWEEPS = 50
CONVERGED = 1e-3
"""The largest factor of a sweep, less one, at which no further one is made."""
ROOM = 1.5
"""How far below a ReLU6's clip a channel must stay, in terms of the largest value seen."""


def equalise(
    student: Student,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> tuple[Student, dict[str, Any]]:
    """The student with each channel's weights as large where it is made as where it is read, its
    answers the same, and what was done.

    With r1 and r2 the largest weights that make and read channel i (batch norms folded in), the
    layer that makes it is divided by s = sqrt(r1 / r2), and what reads it multiplied: both ranges
    become sqrt(r1 · r2). Pairs are taken in turn until none changes. They are convolutions and
    linear layers, depthwise ones too, with nothing between but what lets a positive factor pass:
    ReLU, leaky ReLU, pooling, flattening; a batch norm is scaled by its affine. Through a ReLU6
    only those channels are scaled that the examples leave unclipped, and no further than that they
    stay so with half as much room again. Zeros stay zero; weights that share a codebook stay as
    they are, as do those that several layers read.

    Changes the weights in place, on their device; a pair at which the answers to the first examples
    change, or a promise of the student breaks, is undone. The record: `pairs` scaled, `sweeps`,
    `largest` factor, and `undone`, by layer. Source: Nagel et al. 2019, arXiv 1906.04721,
    equations 7 to 9 and section 4.1.1.

    Raises `UsageError` for a quantized student, `DataError` for no examples, `ExportError` for a
    network that can't be traced.

    Example:
        >>> student, record = equalise(  # doctest: +SKIP
        ...     student, batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    refuse_quantized(student, "cross-layer equalisation")
    seen = iter(examples)
    probe = next(seen, None)
    if probe is None:
        raise DataError("equalisation needs examples to hold its answers against; there are none")
    graph = trace(student.module, example, dynamic_shapes)
    found = links(graph, student.module, shared_grids(student))
    pairs = [link for link in found if operator(link.maker) in FOLDABLE]
    clips = {clip.source: clip.channel for link in pairs for clip in link.clips}
    heights = peaks(graph, itertools.chain([probe], seen), clips, signed=True) if clips else {}
    factors, sweeps = _factors(student.module, pairs, heights)
    chosen = [(link, s) for link, s in zip(pairs, factors, strict=True) if (s != 1).any()]
    undone = scale_all(student, graph, chosen, probe)
    spans = [float(torch.maximum(s, 1 / s).max()) for link, s in chosen if link.name not in undone]
    return student, {
        "pairs": len(spans),
        "sweeps": sweeps,
        "largest": round(max(spans, default=1.0), 4),
        "undone": undone,
    }


def _factors(
    module: nn.Module, pairs: list[Link], heights: dict[Node, Tensor]
) -> tuple[list[Tensor], int]:
    """Each pair's factors, float64, and the number of sweeps; the weights are as they were."""
    before = weights_of(module, pairs)
    products: list[Tensor] = [torch.ones(1, dtype=torch.float64)] * len(pairs)
    sweeps, moved = 0, float("inf")
    while moved - 1 > CONVERGED and sweeps < SWEEPS:
        sweeps, moved = sweeps + 1, 1.0
        for place, link in enumerate(pairs):
            factors = _bounded(_factor(module, link), link, heights, products[place])
            scale(module, link, factors)
            products[place] = products[place] * factors
            moved = max(moved, float(torch.maximum(factors, 1 / factors).max()))
    restore(module, before)
    return products, sweeps


def _factor(module: nn.Module, link: Link) -> Tensor:
    """sqrt(r1 / r2), float64; one for a channel that nothing makes or reads."""
    made = _folded(module, link.maker).flatten(1).amax(1)
    read = torch.stack(
        [input_peaks(_folded(module, r.layer), groups_of(r.layer), r.repeat) for r in link.readers]
    ).amax(0)
    return torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)


def _folded(module: nn.Module, layer: Node) -> Tensor:
    """A layer's weights' magnitudes with the factor of its batch norm, float64 on the CPU."""
    weight = _constant(module, argument(layer, 1)).abs()
    norm = next(iter(layer.users))
    if len(layer.users) != 1 or operator(norm) != "batch_norm" or not argument(norm, 3):
        return weight
    factor = (_constant(module, argument(norm, 4)) + argument(norm, 7)).rsqrt()
    if is_constant(argument(norm, 1)):
        factor = factor * _constant(module, argument(norm, 1)).abs()
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _constant(module: nn.Module, node: Node) -> Tensor:
    *path, name = str(node.target).split(".")
    value: Tensor = getattr(module.get_submodule(".".join(path)), name)
    return value.detach().cpu().double()


def _bounded(factors: Tensor, link: Link, heights: dict[Node, Tensor], so_far: Tensor) -> Tensor:
    """The factors, kept from moving a channel into a clip, or one that is clipped already."""
    for clip in link.clips:
        needed = ROOM * heights[clip.source].double() / clip.limit
        least = torch.where(needed < 1, needed / so_far, 1.0)
        factors = torch.where(needed < 1, torch.maximum(factors, least), 1.0)
    return factors
