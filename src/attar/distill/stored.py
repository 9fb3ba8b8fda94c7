"""A teacher's answers, asked for once and kept: training then costs the student's time alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

import attar
from attar.data.arrays import ArraySplit
from attar.data.base import Batch, Split
from attar.distill.signal import Signal
from attar.distill.teacher import Teacher
from attar.events import Listener, silent
from attar.store import Store, full_disk_as_error, key_of, write_whole

BATCH = 256
ANSWERS, CHOICE, PROGRESS = "answers.npy", "choice.json", "views.json"


class StoredTeacher:
    """The logits of a teacher for every training example in each of some views, from a folder that
    `store_answers` filled.

    Augmentation depends on (seed, epoch, example) alone, so epoch `e` of a training whose split
    repeats its draws after that many views (`ArraySplit.with_views`) sees exactly the pictures that
    the answers of view `e % views` were given to: a stored step has the gradients of a live one.
    Inner layers are not stored.

    Example:
        >>> store_answers(teacher, split, views=8, seed=0, folder=path)  # doctest: +SKIP
        >>> StoredTeacher(path).signal(batch).logits.shape  # doctest: +SKIP
        torch.Size([128, 10])
    """

    def __init__(self, folder: Path) -> None:
        self._answers = np.load(folder / ANSWERS, mmap_mode="r", allow_pickle=False)
        self._view = 0
        self.choice = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
        """Which form of the teacher answered, and to how many views of each example."""

    def start_epoch(self, epoch: int) -> None:
        """Turns to the view that this epoch's augmentation repeats."""
        self._view = epoch % len(self._answers)

    def settle(self, batch: Batch) -> None:
        """Nothing to choose: the answers are there."""

    def signal(self, batch: Batch) -> Signal:
        rows = self._answers[self._view, batch.indices.cpu().numpy()]
        return Signal(torch.from_numpy(rows).to(batch.inputs.device))


def stored(
    teacher: Teacher,
    split: ArraySplit,
    *,
    views: int,
    seed: int,
    store: Store,
    tell: Listener = silent,
) -> StoredTeacher:
    """The teacher's answers from the store, whoever asked for them first, or asked for now.

    What is answered depends on the teacher, the pictures, and how they are augmented, and on no
    student: another student, another stage or another run finds the answers there.
    """
    key = key_of(
        answers=teacher.fingerprint,
        split=split.fingerprint,
        views=views,
        seed=seed if split.augmentation else None,
        attar=attar.__version__,
        torch=torch.__version__,
    )

    def make(folder: Path, work: Path) -> None:
        store_answers(teacher, split, views=views, seed=seed, folder=work, tell=tell)
        for name in (ANSWERS, CHOICE):
            shutil.move(work / name, folder / name)

    entry, _ = store.compute(key, make)
    return StoredTeacher(entry)


def store_answers(
    teacher: Teacher,
    split: Split,
    *,
    views: int,
    seed: int,
    folder: Path,
    tell: Listener = silent,
) -> None:
    """Asks the teacher about every example of `split` in each view, and keeps what it answers.

    seed: what the training draws its augmentation by. folder: gets `answers.npy`, float32 (views,
    examples, classes), and `choice.json`; building goes on there after a kill, a view at a time.
    Raises `StorageError` when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / PROGRESS
    done = json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else 0
    with full_disk_as_error(folder):
        for view in range(done, views):
            _answer(teacher, split, view, views, seed, folder / ANSWERS, tell)
            # beside each view: the process that ends may not be the one that chose
            write_whole(folder / CHOICE, json.dumps({**teacher.choice, "views": views}))
            write_whole(progress, json.dumps(view + 1))


def _answer(
    teacher: Teacher,
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
            teacher.settle(batch)
        logits = teacher.signal(batch).logits.float().cpu().numpy()
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
