"""Sharing by a hash: which weights are one is left to chance, and training makes the best of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from attar.share import hash_student
from attar.stages.base import Context
from attar.student import Student

if TYPE_CHECKING:
    from attar.stages.share import Share


def share_by_hash(stage: Share, student: Student, run: Context) -> Student:
    """The student with hashed layers, trained where the recipe says so."""
    assert stage.ratio is not None
    hashed, done = hash_student(student, stage.ratio, seed=run.seed, exclude=stage.exclude)
    run.found["layers"] = {path: asdict(layer) for path, layer in done.items()}
    return stage.recover.recovered(hashed, run) if stage.recover else hashed
