"""Sharing by k-means, the values then trained as they are shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attar.data.base import Batch
from attar.share import Sharing, fisher_importance, share_weights
from attar.share.vectors import Vectors
from attar.stages.base import Context
from attar.student import Student
from attar.training.evaluation import to_device

if TYPE_CHECKING:
    from attar.stages.share import Share

SENSED = 512
"""Training examples that tell the weights' importance."""


def share_by_kmeans(stage: Share, student: Student, run: Context, bits: int | None) -> Student:
    """The student with its weights clustered in place, and trained on where the recipe says so.

    bits: of an index; `None`: the recipe gives the number of values.
    """
    vectors = stage.vectors
    edit, done = share_weights(
        student.module,
        bits,
        stage.exclude,
        values=stage.values,
        scope=stage.scope,
        channels=stage.channels,
        importance=_importance(student.module, run) if stage.importance else None,
        vectors=None if vectors is None else Vectors(**vectors.model_dump(), seed=run.seed),
        gradient=stage.gradient,
    )
    record(run, done, bits=bits)
    shared = student.edited(edit)
    return stage.recover.recovered(shared, run) if stage.recover else shared


def record(run: Context, done: Mapping[str, Sharing], **settings: Any) -> None:
    """Keeps what was done for the report."""
    run.found.update({key: value for key, value in settings.items() if value is not None})
    run.found["layers"] = {path: asdict(layer) for path, layer in done.items()}
    run.found["distortion"] = overall(done)


def overall(done: Mapping[str, Sharing]) -> float:
    """The layers' distortion, weighted by their numbers of weights."""
    weights = sum(layer.weights for layer in done.values())
    return sum(s.distortion * s.weights for s in done.values()) / weights if weights else 0.0


def _importance(module: nn.Module, run: Context) -> dict[str, Tensor]:
    """How much the task's loss depends on each weight, by training examples, one at a time."""
    device = next(module.parameters()).device
    examples = run.data.train.batches(1, shuffle=True, seed=run.seed)

    def loss_of(network: nn.Module, batch: Batch) -> Tensor:
        args, kwargs = run.task.arguments(batch)
        return run.task.loss(network(*args, **kwargs), batch)

    batches = (to_device(batch, device) for batch in islice(examples, SENSED))
    return fisher_importance(module, batches, loss_of)
