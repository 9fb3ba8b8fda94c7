"""Packed students on disk: `.attar` files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from attar.errors import AttarError
from attar.models.base import ModelSpec
from attar.store import write_whole
from attar.student.packed.student import Packed, packed, unpack_student
from attar.student.student import Student


def save_packed(student: Student, path: Path) -> Packed:
    """Writes the student's `.attar` file, whole or not at all, and gives what it came to. Raises
    `StorageError` when the disk is full."""
    made = packed(student)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, made.data)
    return made


def load_packed(
    path: Path, *, build: Callable[[ModelSpec], nn.Module], module: nn.Module | None = None
) -> Student:
    """The student of a `.attar` file. Arguments, and what is raised, as of `unpack_student`; the
    message begins with the file."""
    data = path.read_bytes()
    try:
        return unpack_student(data, build=build, module=module)
    except AttarError as error:
        raise type(error)(f"{path}: {error}") from None
