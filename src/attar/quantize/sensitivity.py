"""How far a network's answers move when one of its layers computes in int8."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.data.base import Batch
from attar.errors import DataError, UsageError
from attar.measure.intervals import Interval
from attar.quantize.edit import Quantized
from attar.quantize.switched import Switched
from attar.student import Student
from attar.tasks.base import Task
from attar.tasks.intervals import metric_drop

NATS, SQUARED = "nats", "share of the answers' variance"


@dataclass(frozen=True)
class LayerLoss:
    """What it costs to compute one layer in int8 and all others in float.

    loss: how far answers move, the mean over examples, in the unit that `Sensitivity` names.
    error: its standard error. drop: how much worse the task's metric is, on the same examples.
    """

    layer: str
    loss: float
    error: float
    drop: Interval


@dataclass(frozen=True)
class Sensitivity:
    """Every layer's loss, in the network's order. unit: `nats`, or a share of the answers'
    variance. examples: how many were looked at."""

    unit: str
    examples: int
    layers: list[LayerLoss]

    def ranked(self) -> list[LayerLoss]:
        """The most sensitive layer first."""
        return sorted(self.layers, key=lambda one: -one.loss)

    def losses(self) -> dict[str, float]:
        """By layer."""
        return {one.layer: one.loss for one in self.layers}


def sensitivity(
    int8: Student,
    stored: Student,
    batches: Iterable[Batch],
    task: Task,
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> Sensitivity:
    """Puts one layer at a time on its grids and compares the answers with those of the network in
    float: `KL(float ‖ with this layer in int8)` of their probabilities, an example. Where the task
    knows no right and wrong, or there is a single output, it is the squared difference over the
    variance of the float answers.

    In float means as it is deployed: all weights rounded to 8 bits (see `Scheme.float_layers`), so
    that a loss is what leaving the layer in float would spare. One graph serves all layers: see
    `Switched` for what of it belongs to which.

    int8, stored: the quantized student, as much of it in int8 as can be, and the same all in float
    (`float_layers=("*",)`). batches: seen once in order; memory grows with answers alone. example,
    dynamic_shapes: what the network is traced with. Raises `DataError` where there is no batch,
    `UsageError` where a student is not quantized.

    Example:
        >>> found = sensitivity(                              # doctest: +SKIP
        ...     quantized(()), quantized(("*",)), split.batches(64), task,
        ...     example=example, dynamic_shapes=task.dynamic_shapes(example),
        ... )
        >>> found.ranked()[0].layer                           # doctest: +SKIP
        'features.1.conv.0.0'
    """
    edit = _edit(int8)
    graph = Switched(edit.prepared(int8.module, example, dynamic_shapes), _edit(stored).grids)
    answers: dict[str | None, list[Tensor]] = {}
    statistics: dict[str | None, list[np.ndarray]] = {}
    for batch in batches:
        arguments, _ = task.arguments(batch)
        for layer, output in graph.answers_of_each(arguments):
            logits = task.logits(output).float()
            answers.setdefault(layer, []).append(logits)
            statistics.setdefault(layer, []).append(task.statistics(logits, batch))
    if not answers:
        raise DataError("the sensitivity of layers needs examples, and there are none")
    seen = {layer: np.concatenate(parts) for layer, parts in statistics.items()}
    whole = torch.cat(answers.pop(None))
    classes = whole.flatten(1).shape[1] > 1 and task.verdicts(seen[None]) is not None
    apart = divergences if classes else squared_differences
    layers = []
    for layer in graph.layers:
        moved = apart(whole, torch.cat(answers[layer]))
        error = float(moved.std()) / math.sqrt(len(moved)) if len(moved) > 1 else math.nan
        drop = metric_drop(task, seen[None], seen[layer])
        loss = max(float(moved.mean()), 0.0)  # divergences of equals are rounding, of either sign
        layers.append(LayerLoss(layer, loss, error, drop))
    return Sensitivity(NATS if classes else SQUARED, len(whole), layers)


def divergences(whole: Tensor, moved: Tensor) -> Tensor:
    """`KL(whole ‖ moved)` of two networks' probabilities, in nats, float64 (N,).

    whole, moved: logits (N, classes).
    """
    p, q = (x.double().log_softmax(-1) for x in (whole, moved))
    return (p.exp() * (p - q)).sum(-1)


def squared_differences(whole: Tensor, moved: Tensor) -> Tensor:
    """Squared differences of answers over the variance that `whole` has over examples, float64
    (N,); zero where nothing moved.

    whole, moved: (N, outputs).
    """
    a, b = (x.double().flatten(1) for x in (whole, moved))
    varies = a.var(0, unbiased=False).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (a - b).square().sum(1) / varies


def _edit(student: Student) -> Quantized:
    edits = [edit for edit in student.edits if isinstance(edit, Quantized)]
    if not edits:
        raise UsageError("the sensitivity to int8 is asked of a student that is not quantized")
    return edits[-1]
