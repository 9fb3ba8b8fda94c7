"""A teacher's answers, asked for once and kept: training then costs the student's time alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from attar.data.base import Batch, Split
from attar.distill.signal import Signal
from attar.distill.teacher import Teacher
from attar.events import Listener, silent
from attar.store import full_disk_as_error, write_whole

BATCH = 256


class StoredTeacher:
    """The logits of a live teacher for every training example in each of `views` augmentations.

    Augmentation depends on (seed, epoch, example) alone, so epoch `e` of a training whose split
    repeats its draws after `views` epochs (`ArraySplit.with_views`) sees exactly the pictures that
    the answers of view `e % views` were given to: a stored step has the gradients of a live one.
    Inner layers are not stored.

    seed: what the training draws its augmentation by. folder: where `answers.npy`, float32 (views,
    examples, classes), is kept; building goes on there after a kill, a view at a time.

    Example:
        >>> source = StoredTeacher(teacher, split, views=8, seed=0, folder=path)  # doctest: +SKIP
        >>> source.signal(batch).logits.shape  # doctest: +SKIP
        torch.Size([128, 10])
    """

    def __init__(
        self,
        source: Teacher,
        split: Split,
        *,
        views: int,
        seed: int,
        folder: Path,
        tell: Listener = silent,
    ) -> None:
        self._views = views
        self._view = 0
        path = folder / "answers.npy"
        folder.mkdir(parents=True, exist_ok=True)
        with full_disk_as_error(path):
            _build(source, split, views, seed, path, tell)
        self._answers = np.load(path, mmap_mode="r")
        self.choice = {**source.choice, "views": views}
        """Which form of the teacher answered, and to how many views of each example."""

    def start_epoch(self, epoch: int) -> None:
        """Turns to the view that this epoch's augmentation repeats."""
        self._view = epoch % self._views

    def settle(self, batch: Batch) -> None:
        """Nothing to choose: the answers are there."""

    def signal(self, batch: Batch) -> Signal:
        rows = self._answers[self._view, batch.indices.cpu().numpy()]
        return Signal(torch.from_numpy(rows).to(batch.inputs.device))


def _build(
    source: Teacher, split: Split, views: int, seed: int, path: Path, tell: Listener
) -> None:
    progress = path.with_name("views.json")
    done = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else 0
    for view in range(done, views):
        _answer(source, split, view, views, seed, path, tell)
        write_whole(progress, json.dumps(view + 1))


def _answer(
    source: Teacher,
    split: Split,
    view: int,
    views: int,
    seed: int,
    path: Path,
    tell: Listener,
) -> None:
    """One pass over the examples in their order, as augmented in epoch `view`."""
    answers: np.ndarray | None = None
    steps = math.ceil(len(split) / BATCH)
    for step, batch in enumerate(split.batches(BATCH, augment=True, seed=seed, epoch=view)):
        if view == step == 0:
            source.settle(batch)
        logits = source.signal(batch).logits.float().cpu().numpy()
        if answers is None:
            answers = _table(path, (views, len(split), *logits.shape[1:]), fresh=view == 0)
        answers[view, batch.indices.numpy()] = logits
        if step % 20 == 0:
            tell(
                {
                    "event": "step",
                    "label": "the teacher answers",
                    "epoch": view + 1,
                    "epochs": views,
                    "step": step + 1,
                    "steps": steps,
                    "loss": None,
                }
            )
    if isinstance(answers, np.memmap):
        answers.flush()


def _table(path: Path, shape: tuple[int, ...], *, fresh: bool) -> np.memmap:
    if fresh:
        return open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    return open_memmap(path, mode="r+")
