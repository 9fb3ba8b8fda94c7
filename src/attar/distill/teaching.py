"""Who answers during one training, and to which examples: a live teacher, or its stored answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from attar.data.arrays import ArraySplit
from attar.data.base import Data
from attar.distill.answers import Storing
from attar.distill.signal import Nobody, Source
from attar.distill.stored import stored
from attar.distill.teacher import Teacher
from attar.errors import UsageError
from attar.events import Listener, silent
from attar.store import Store
from attar.tasks.base import Task
from attar.training.config import Training
from attar.training.loop import augmentation_seed

STORED_UNASKED = 2**30
"""Answers of up to this many bytes are stored unasked, where that changes nothing."""


def teaching(
    module: nn.Module | None,
    *,
    task: Task,
    data: Data,
    training: Training,
    label: str,
    seed: int,
    store: Store,
    layers: Sequence[str] = (),
    views: int | None = None,
    storing: Storing | None = None,
    tell: Listener = silent,
) -> tuple[Source, Data]:
    """The source of a teacher's signals for the training called `label`, and the data to train on.

    module: the teacher; `None` where nothing is asked of it: the data are the same then.
    views: how many augmentations of each example the teacher is asked about, once; its answers are
        kept in `store`, and the data's training split goes through these views in turn. `None`: a
        live teacher, unless examples aren't augmented: then each has one view, and stored answers
        are the live ones.
    layers: inner layers that are wanted. storing: how answers are kept.
    Raises `UsageError` where `views` are asked for and can't be had.
    """
    split = data.train
    if views is not None:
        _require_storable(data)
    elif storing is not None or not layers:
        views = 1 if _never_changes(data) else None
    if storing is not None and views is None:
        raise UsageError(
            "distill: `store` keeps answers to a stated number of augmentations of each example: "
            "give `views` as well"
        )
    seen = None
    if views is not None:
        assert isinstance(split, ArraySplit)
        seen = split.with_views(views)
        data = replace(data, train=seen)
    if module is None:
        return Nobody(), data
    passes = training.epochs if views is None else views
    calls = passes * math.ceil(len(split) / training.batch_size)
    teacher = Teacher(module, task, layers=layers, calls=calls, tell=tell)
    if seen is None or views is None:
        return teacher, data
    answers = stored(
        teacher,
        seen,
        views=views,
        seed=augmentation_seed(seed, label),
        store=store,
        storing=storing,
        tell=tell,
    )
    return answers, data


def _require_storable(data: Data) -> None:
    if not isinstance(data.train, ArraySplit):
        raise UsageError("distill: `views` needs examples that Attar holds in memory")


def _never_changes(data: Data) -> bool:
    """Whether every epoch shows the same examples, and their answers are small enough to keep."""
    split = data.train
    if not isinstance(split, ArraySplit) or split.augmentation:
        return False
    return len(split) * max(1, len(data.classes)) * 4 <= STORED_UNASKED
