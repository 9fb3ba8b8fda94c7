"""Asking a teacher about every training example, in a way that survives a kill."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attar
from attar import numbers
from attar.data.base import Batch, Split
from attar.distill.answers import (
    INDEX,
    LOGITS,
    PROGRESS,
    SCHEMA,
    Asked,
    Column,
    answers_bytes,
    open_columns,
    read_index,
)
from attar.distill.signal import Signal
from attar.distill.teacher import Teacher
from attar.errors import StorageError, TrainingError
from attar.events import Listener, silent
from attar.store import full_disk_as_error, write_whole

BATCH = 256
SAVED_EVERY = 10.0
"""Seconds after which what was answered is safe from a kill."""
SKETCHED = 32
"""Pictures by which it is seen that augmentation draws what it drew."""


def ask(
    teacher: Teacher, split: Split, asked: Asked, folder: Path, tell: Listener = silent
) -> None:
    """Asks the teacher about every example of `split` in each view, and keeps what it answers.

    folder: gets an array or more for the logits and each inner layer, (views, examples, …), and
    `answers.json`, which is written last. Asking goes on there after a kill. Size and time are told
    before. Raises `StorageError` when there is no room for it, `TrainingError` for answers that are
    no numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk_as_error(folder):
        asking = _Asking(teacher, split, asked, folder, tell)
        asking.go_on()
        index = {**asking.state(), **versions(), "sketch": sketch(split, asked.seed).tolist()}
        write_whole(folder / INDEX, json.dumps(index, indent=1) + "\n")
        (folder / PROGRESS).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What answers may hang on besides what was asked."""
    return {"attar": attar.__version__, "torch": str(torch.__version__)}


def sketch(split: Split, seed: int | None) -> np.ndarray:
    """A number for each of the first pictures of the first view, (n,), which changes with any of
    their pixels."""
    inputs = next(split.batches(SKETCHED, augment=True, seed=seed or 0, epoch=0)).inputs.flatten(1)
    along = torch.randn(inputs.shape[1], generator=torch.Generator().manual_seed(0))
    return (inputs.float() @ along / math.sqrt(len(along))).numpy()


class _Asking:
    """Answers while they are asked for."""

    def __init__(
        self, teacher: Teacher, split: Split, asked: Asked, folder: Path, tell: Listener
    ) -> None:
        self.teacher, self.split, self.asked = teacher, split, asked
        self.folder, self.tell = folder, tell
        self.columns: dict[str, Column] = {}
        self.checksums: dict[str, list[int]] = {}
        self.choice: dict[str, Any] = {}
        self.settled = False
        self.view, self.done = 0, 0  # how far it is: views, and examples of the next

    def go_on(self) -> None:
        self._restore()
        for view in range(self.view, self.asked.views):
            self._one_view(view)
            for column in self.columns.values():
                for name, checksum in column.checksums(view).items():
                    self.checksums.setdefault(name, []).append(checksum)
            self.view, self.done = view + 1, 0
            self._save()

    def state(self) -> dict[str, Any]:
        """What is there so far."""
        return {
            "schema": SCHEMA,
            **self.asked.written(),
            "count": len(self.split),
            "columns": {name: list(column.shape) for name, column in self.columns.items()},
            "checksums": self.checksums,
            "choice": self.choice,
        }

    def _one_view(self, view: int) -> None:
        """One pass over the examples in their order, as augmented in epoch `view`."""
        saved = time.monotonic()
        steps = math.ceil(len(self.split) / BATCH)
        batches = self.split.batches(BATCH, augment=True, seed=self.asked.seed or 0, epoch=view)
        for step, batch in enumerate(batches):
            if int(batch.indices[-1]) < self.done:
                continue
            self._answer(batch, view)
            if time.monotonic() - saved > SAVED_EVERY:
                saved, self.done = time.monotonic(), int(batch.indices[-1]) + 1
                self._save()
            if step % 20 == 0:
                self._progress(view, step, steps)

    def _answer(self, batch: Batch, view: int) -> None:
        if not self.settled:
            self.teacher.settle(batch)  # in a process that goes on, too: to answer alike, and fast
            self.settled = True
        # beside the answers: the process that ends may not be the one that chose
        self.choice = dict(self.teacher.choice)
        started = time.perf_counter()
        signal = self.teacher.signal(batch)
        shapes, rows = shapes_of(signal), _rows(signal)
        if not self.columns:
            seconds = time.perf_counter() - started
            self._begin(shapes, seconds)
        for name, x in rows.items():
            if not np.isfinite(x).all():
                raise TrainingError(
                    f"the teacher's {name} hold infinities or NaN: nothing to learn"
                )
            self.columns[name].write(view, batch.indices.numpy(), x)

    def _begin(self, shapes: dict[str, tuple[int, ...]], seconds: float) -> None:
        """Says what is coming, sees that there is room, and makes the files."""
        row = answers_bytes(shapes, self.asked.format, self.asked.top_k)
        size = row * self.asked.views * len(self.split)
        seconds *= self.asked.views * math.ceil(len(self.split) / BATCH)
        _require_room(self.folder, size)
        several = "once" if self.asked.views == 1 else f"in {self.asked.views} views each"
        text = (
            f"the teacher is asked about {len(self.split):,} examples {several}: about "
            f"{numbers.seconds(seconds)}, and {numbers.size(size)} to keep its answers"
        )
        self.tell({"event": "note", "text": text})
        self.columns = open_columns(self.folder, self.asked, shapes, len(self.split), "w+")

    def _save(self) -> None:
        for column in self.columns.values():
            column.flush()
        state = {**self.state(), "view": self.view, "done": self.done}
        write_whole(self.folder / PROGRESS, json.dumps(state))

    def _restore(self) -> None:
        if not (self.folder / PROGRESS).exists():
            return
        state = read_index(self.folder, PROGRESS)
        self.view, self.done = state["view"], state["done"]
        self.checksums, self.choice = state["checksums"], state["choice"]
        shapes = state["columns"]
        self.columns = open_columns(self.folder, self.asked, shapes, len(self.split), "r+")

    def _progress(self, view: int, step: int, steps: int) -> None:
        event = {
            "event": "step",
            "label": "the teacher answers",
            "epoch": view + 1,
            "epochs": self.asked.views,
            "step": step + 1,
            "steps": steps,
            "loss": None,
        }
        self.tell(event)


def shapes_of(signal: Signal) -> dict[str, tuple[int, ...]]:
    """Of one example's logits and inner layers, by the name of their column."""
    return {name: tuple(x.shape[1:]) for name, x in _columns(signal).items()}


def _rows(signal: Signal) -> dict[str, np.ndarray]:
    """Logits and inner layers as float32 arrays."""
    return {name: x.detach().float().cpu().numpy() for name, x in _columns(signal).items()}


def _columns(signal: Signal) -> dict[str, Tensor]:
    return {LOGITS: signal.logits, **signal.features}


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StorageError(
            f"the teacher's answers would take {numbers.size(size)} and {folder} has "
            f"{numbers.size(free)} left: ask for fewer `views`, or keep less of each with "
            "`store: {format: float16}` or `store: {top_k: 10}`"
        )
