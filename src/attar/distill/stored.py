"""A teacher's answers, asked for once and kept: training then costs the student's time alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attar.data.arrays import ArraySplit
from attar.data.base import Batch
from attar.distill.answers import (
    INDEX,
    LOGITS,
    PROGRESS,
    SCHEMA,
    Asked,
    Storing,
    asked_in,
    clear,
    open_columns,
    read_index,
)
from attar.distill.asking import ask, sketch, versions
from attar.distill.signal import Signal
from attar.distill.teacher import Teacher
from attar.errors import StorageError, UsageError
from attar.events import Listener, silent
from attar.store import Store, key_of, locked

AGAIN = "to ask again, delete that folder, or say `--set stages.distill.store.rebuild=true`"
DIFFERS = {
    "teacher": "another teacher (its weights, its structure or its code)",
    "examples": "other examples, or the same prepared or augmented otherwise",
    "seed": "other draws of the augmentation (another `seed`)",
    "format": "another `format`",
    "top_k": "another `top_k`",
}
"""What answers are of, where what was asked differs."""


class StoredTeacher:
    """A teacher's answers to every training example in each of some views, from a folder that
    `stored` filled: logits, and the inner layers that were asked for.

    Augmentation depends on (seed, epoch, example) alone, so epoch `e` of a training whose split
    repeats its draws after that many views (`ArraySplit.with_views`) sees exactly the pictures that
    the answers of view `e % views` were given to: a stored step has the gradients of a live one.
    Files are mapped to memory, and each view is held against its checksum when it is first used.

    views: how many of the stored ones to go through. layers: which of the stored inner layers its
    signals hold. Default: all.
    Raises `StorageError` for a folder that isn't whole, and for a view that was damaged.

    Example:
        >>> StoredTeacher(folder).signal(batch).logits.shape  # doctest: +SKIP
        torch.Size([128, 10])
    """

    def __init__(
        self, folder: Path, views: int | None = None, layers: Sequence[str] | None = None
    ) -> None:
        self._folder = folder
        self.made = read_index(folder)
        """What the answers depend on, and by which versions they were made."""
        self._views = views or self.made["views"]
        shapes = {
            name: shape
            for name, shape in self.made["columns"].items()
            if layers is None or name in (LOGITS, *layers)
        }
        self._columns = open_columns(folder, asked_in(self.made), shapes, self.made["count"], "r")
        self._verified: set[int] = set()
        self._view = 0
        self.choice = {**self.made["choice"], "views": self._views}
        """Which form of the teacher answered, and to how many views of each example."""

    def start_epoch(self, epoch: int) -> None:
        """Turns to the view that this epoch's augmentation repeats."""
        self._view = epoch % self._views

    def settle(self, batch: Batch) -> None:
        """Nothing to choose: the answers are there."""

    def signal(self, batch: Batch) -> Signal:
        self._verify(self._view)
        places, device = batch.indices.cpu().numpy(), batch.inputs.device
        rows = {
            name: torch.from_numpy(column.read(self._view, places)).to(device)
            for name, column in self._columns.items()
        }
        return Signal(rows.pop(LOGITS), rows)

    def _verify(self, view: int) -> None:
        if view in self._verified:
            return
        for column in self._columns.values():
            for name, found in column.checksums(view).items():
                if found != self.made["checksums"][name][view]:
                    raise StorageError(
                        f"{self._folder / name} is damaged: it no longer holds what the teacher "
                        f"answered; {AGAIN}"
                    )
        self._verified.add(view)


def stored(
    teacher: Teacher,
    split: ArraySplit,
    *,
    views: int,
    seed: int,
    store: Store,
    storing: Storing | None = None,
    tell: Listener = silent,
) -> StoredTeacher:
    """The teacher's answers from the store, whoever asked for them first, or asked for now.

    What is answered depends on the teacher, the pictures, and how they are augmented, and on no
    student: another student, another stage or another run finds the answers there. Of several
    processes that want them, one asks and the others wait.

    seed: what the training draws its augmentation by. Inner layers are those of the teacher.
    Raises `UsageError` where `storing.folder` holds answers of another teacher, to other examples
    or in another form, and where the augmentation no longer draws what was answered;
    `StorageError` where there is no room.
    """
    storing = storing or Storing()
    asked = Asked(
        teacher=teacher.fingerprint,
        examples=split.fingerprint,
        views=views,
        seed=seed if split.augmentation else None,
        format=storing.format,
        top_k=storing.top_k,
        layers=teacher.layers,
    )

    def make(folder: Path) -> None:
        ask(teacher, split, asked, folder, tell)

    if storing.folder:
        folder = _in_folder(Path(storing.folder), asked, storing.rebuild, make)
    else:
        folder = _in_store(store, asked, storing.rebuild, make)
    answers = StoredTeacher(folder, views, teacher.layers)
    _require_pictures(answers.made, split, folder)
    _tell_versions(answers.made, folder, tell)
    return answers


def _in_store(store: Store, asked: Asked, rebuild: bool, make: Callable[[Path], None]) -> Path:
    key = key_of(answers=asked.written(), schema=SCHEMA)
    if rebuild:
        store.discard(key)

    def entry(folder: Path, work: Path) -> None:
        make(work)
        for path in work.iterdir():
            shutil.move(path, folder / path.name)

    return store.compute(key, entry)[0]


def _in_folder(folder: Path, asked: Asked, rebuild: bool, make: Callable[[Path], None]) -> Path:
    """The person's own folder, filled if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        if rebuild:
            clear(folder)
        if (folder / INDEX).exists():
            _require_same(asked_in(read_index(folder)), asked, folder)
            return folder
        if (folder / PROGRESS).exists():
            begun = asked_in(read_index(folder, PROGRESS))
            _require_same(begun, asked, folder)
            if begun != asked:
                raise UsageError(
                    f"the answers in {folder} were begun for {begun.views} views with "
                    f"{len(begun.layers)} inner layers and are not finished: go on with these; "
                    f"{AGAIN}"
                )
        make(folder)
    return folder


def _require_same(found: Asked, asked: Asked, folder: Path) -> None:
    """More views and layers than are asked for do no harm."""
    differs = [
        said for name, said in DIFFERS.items() if getattr(found, name) != getattr(asked, name)
    ]
    if found.views < asked.views:
        differs.append(f"{found.views} views instead of {asked.views}")
    lacking = [path for path in asked.layers if path not in found.layers]
    if lacking:
        differs.append(f"no inner layer {', '.join(map(repr, lacking))}")
    if differs:
        raise UsageError(
            f"the answers in {folder} are of {'; '.join(differs)}: name another `store.folder`; "
            f"{AGAIN}"
        )


def _require_pictures(made: Mapping[str, Any], split: ArraySplit, folder: Path) -> None:
    now, then = sketch(split, made["seed"]), np.asarray(made["sketch"])
    if now.shape != then.shape or not np.allclose(now, then, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"the answers in {folder} were given to other pictures than the augmentation draws now "
            f"(made by {_said(made)}; this is {_said(versions())}): {AGAIN}"
        )


def _tell_versions(made: Mapping[str, Any], folder: Path, tell: Listener) -> None:
    if any(made[name] != version for name, version in versions().items()):
        text = (
            f"the teacher's answers in {folder} were made by {_said(made)} and this is "
            f"{_said(versions())}; they are used as they are; {AGAIN}"
        )
        tell({"event": "note", "text": text})


def _said(made: Mapping[str, Any]) -> str:
    return f"Attar {made['attar']} with PyTorch {made['torch']}"
