"""SmoothQuant: outliers move from a linear layer's input into its weight, where a grid a channel
has room for them, in a network that answers as before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import DataError, UsageError
from attar.quantize.graph import trace
from attar.quantize.post_training import shared_grids
from attar.quantize.scaling import Link, input_peaks, links, peaks, refuse_quantized, scale_all
from attar.runtimes.aten import operator
from attar.student import Student


def smooth(
    student: Student,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    alpha: float = 0.5,
) -> tuple[Student, dict[str, Any]]:
    """The student with its linear layers' inputs smoothed, its answers the same, and what was done.

    Input feature j of the linear layers that read it is divided by
    s = max|X_j|^alpha / max|W_j|^(1 - alpha), and their weights multiplied; the division goes into
    what makes the feature: a layer norm's affine, an RMS norm's or any other product with a
    parameter, or a linear layer, where nothing but linear layers reads it (as queries, keys and
    values do), directly or through a ReLU. X is looked at over the examples.

    alpha: how much of the difficulty moves into the weights, 0 to 1. Changes the weights in place;
    what doesn't leave the answers to the first examples alone, or breaks a promise of the student,
    is undone. The record: `places` smoothed, `spread`, the largest feature over the median one,
    before and after, at the place where it was largest (`where`), and `undone`, by layer. Source:
    Xiao et al. 2023, arXiv 2211.10438, equation 4.

    Raises `UsageError` for a quantized student and an alpha outside 0 to 1, `DataError` for no
    examples, `ExportError` for a network that can't be traced.

    Example:
        >>> student, record = smooth(  # doctest: +SKIP
        ...     student, batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"smoothing: alpha is from 0 to 1, not {alpha:g}")
    refuse_quantized(student, "smoothing")
    seen = iter(examples)
    probe = next(seen, None)
    if probe is None:
        raise DataError("smoothing needs examples to see outliers in, and there are none")
    graph = trace(student.module, example, dynamic_shapes)
    found = [li for li in links(graph, student.module, shared_grids(student)) if _smoothable(li)]
    wanted = {link.readers[0].source: link.readers[0].channel for link in found}
    heights = peaks(graph, itertools.chain([probe], seen), wanted)
    inputs = [heights[link.readers[0].source].double() for link in found]
    chosen = [
        (link, smoothing(x, _weights(student.module, link), alpha))
        for link, x in zip(found, inputs, strict=True)
    ]
    undone = scale_all(student, graph, chosen, probe)
    spreads = {
        link.name: (_spread(x), _spread(x / s))
        for (link, s), x in zip(chosen, inputs, strict=True)
        if link.name not in undone
    }
    where = max(spreads, key=lambda name: spreads[name][0], default=None)
    return student, {
        "places": len(spreads),
        "where": where,
        "spread": [round(v, 3) for v in spreads[where]] if where is not None else None,
        "undone": undone,
    }


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """By what each feature is divided, (features,): equation 4; one where it is never anything or
    never read.

    inputs, weights: the largest magnitudes of the features, and of the weights that read them.

    Example:
        >>> smoothing(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0]), 0.5).tolist()
        [4.0, 0.5]
    """
    some = (inputs > 0) & (weights > 0)
    return torch.where(some, inputs.pow(alpha) / weights.pow(1 - alpha), 1.0)


def _smoothable(link: Link) -> bool:
    layers = [link.maker, *(r.layer for r in link.readers)]
    convolves = any(operator(layer).startswith("conv") for layer in layers)
    return not convolves and not link.clips and all(r.repeat == 1 for r in link.readers)


def _weights(module: nn.Module, link: Link) -> Tensor:
    """The largest magnitude of what reads each feature, float64 on the CPU."""
    weights = (module.get_parameter(r.weight).detach().cpu().double() for r in link.readers)
    return torch.stack([input_peaks(w, 1, 1) for w in weights]).amax(0)


def _spread(heights: Tensor) -> float:
    """The largest over the median."""
    return float(heights.max() / heights.median().clamp_min(torch.finfo(heights.dtype).tiny))
