"""Sharing that training itself decides: which weights are one, and how few bits they take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from attar.errors import UsageError
from attar.share import DifferentiableKMeans, RateDistortion, codable, round_norms
from attar.stages.base import Context
from attar.stages.sharing.clustered import record
from attar.student import Student
from attar.student.packed import coded_size, packed_size
from attar.units import readable

if TYPE_CHECKING:
    from attar.stages.share import Share


def share_by_dkm(stage: Share, student: Student, run: Context, bits: int) -> Student:
    """The student trained through differentiable k-means, then clustered for good."""
    assert stage.recover is not None
    trained, objective = stage.recover.through(
        student,
        run,
        lambda inner: DifferentiableKMeans(
            inner,
            student.module,
            bits=bits,
            temperature=stage.temperature,
            exclude=stage.exclude,
        ),
        label="share",
    )
    edit, done = objective.share(trained.module)
    record(run, done, bits=bits)
    return trained.edited(edit)


def share_by_rate(
    stage: Share, student: Student, run: Context, *, rate: float | None, size: int | None
) -> Student:
    """The student trained for accuracy and few bits at once. rate: the loss that a kilobyte is
    worth. size: instead, what the packed file shall take, in bytes."""
    assert stage.recover is not None
    kilobytes = None if size is None else _room(stage, student, size) / 1000
    # the best epoch on validation would be an early one, whose weights cost the most
    recover = stage.recover.model_copy(update={"keep": "last"})
    trained, objective = recover.through(
        student,
        run,
        lambda inner: RateDistortion(
            inner, student.module, rate=rate, kilobytes=kilobytes, exclude=stage.exclude
        ),
        label="share",
    )
    edit, done = objective.share(trained.module)
    round_norms(trained.module, stage.norms)
    record(run, done, rate=rate)
    result = trained.edited(edit)
    took = packed_size(result)
    run.found["packed_bytes"] = took
    if size is not None and took > size:
        text = (
            f"share: the packed file takes {readable(took)}, above the {readable(size)} asked for"
        )
        run.tell({"event": "note", "text": f"{text}; more epochs would bring it nearer"})
    return result


def _room(stage: Share, student: Student, size: int) -> int:
    """The bytes that a packed file of `size` has for the shared weights. Raises `UsageError` where
    it takes more with zeros in their stead."""
    rest = student.copy()
    paths = codable(rest.module, stage.exclude)
    with torch.no_grad():
        for path in paths:
            rest.module.get_parameter(path).zero_()
    round_norms(rest.module, stage.norms)
    least = packed_size(rest)
    if least >= size:
        raise UsageError(
            f"share: size {readable(size)} can't be met: with nothing but zeros for the shared "
            f"weights, the packed file takes {readable(least)}"
        )
    zeros = {path: rest.module.get_parameter(path).detach() for path in paths}
    return size - least + math.ceil(coded_size(zeros))
