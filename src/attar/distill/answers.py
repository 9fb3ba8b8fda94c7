"""The files that a teacher's answers are kept in: an array or more a column, and what they are."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from pydantic import BaseModel, ConfigDict, Field

from attar.distill.encoding import Encoding, Format, encoding
from attar.errors import StorageError, UsageError

SCHEMA = 1
INDEX, PROGRESS = "answers.json", "progress.json"
ENDING = ".answers.npy"
LOGITS = "logits"
PARTS = ("columns", "checksums", "count", "choice", "sketch", "attar", "torch")
"""What `answers.json` says of its files, beside what was asked."""


class Storing(BaseModel):
    """How a teacher's answers are kept.

    format: what a value takes: 4 bytes, 2, or 1 (`int8`: 256 even steps over each example's range).
    top_k: only each example's largest logits; the others share what is left of the probability.
    folder: where; others may use the same, from other runs and machines. Default: Attar's cache.
    rebuild: ask the teacher again, whatever is there. No part of what a result depends on.
    """

    model_config = ConfigDict(extra="forbid")

    format: Format = "float32"
    top_k: int | None = Field(default=None, ge=1)
    folder: str | None = None
    rebuild: bool = Field(default=False, exclude=True)


@dataclass(frozen=True)
class Asked:
    """What answers depend on.

    teacher, examples: fingerprints. seed: what augmentation is drawn by; `None` where nothing is.
    layers: paths of the inner layers that are kept beside the logits.
    """

    teacher: str
    examples: str
    views: int
    seed: int | None
    format: Format
    top_k: int | None
    layers: tuple[str, ...]

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "layers": list(self.layers)}


def asked_in(index: Mapping[str, Any]) -> Asked:
    """What an index says was asked."""
    found = {name: index[name] for name in Asked.__dataclass_fields__}
    return Asked(**{**found, "layers": tuple(found["layers"])})


def encoding_of(
    column: str, shape: Sequence[int], form: Format, top_k: int | None = None
) -> Encoding:
    """How the rows of a column are kept: of the logits, perhaps the largest few only."""
    return encoding(tuple(shape), form, top_k if column == LOGITS else None)


def answers_bytes(
    shapes: Mapping[str, Sequence[int]], form: Format, top_k: int | None = None
) -> int:
    """What one example's answers take, once. shapes: of its logits and inner layers, by name."""
    return sum(encoding_of(name, shape, form, top_k).row_bytes for name, shape in shapes.items())


class Column:
    """Logits, or one inner layer, of every example in every view: an array or more in files."""

    def __init__(
        self, folder: Path, asked: Asked, name: str, shape: Sequence[int], examples: int, mode: str
    ) -> None:
        """name: `logits`, or the inner layer's path. shape: of one example. mode: as of
        `numpy.memmap`; `w+` makes the files. Raises `StorageError` for damaged ones."""
        self.shape = tuple(shape)
        self._encoding = encoding_of(name, shape, asked.format, asked.top_k)
        title = LOGITS if name == LOGITS else f"layer{asked.layers.index(name)}"
        self._files = {part: f"{title}.{part}{ENDING}" for part in self._encoding.layout}
        self._arrays = {
            part: _mapped(folder / self._files[part], (asked.views, examples, *row), kind, mode)
            for part, (kind, row) in self._encoding.layout.items()
        }

    def write(self, view: int, places: np.ndarray, rows: np.ndarray) -> None:
        for part, encoded in self._encoding.encode(rows).items():
            self._arrays[part][view, places] = encoded

    def read(self, view: int, places: np.ndarray) -> np.ndarray:
        return self._encoding.decode({p: a[view, places] for p, a in self._arrays.items()})

    def flush(self) -> None:
        for array in self._arrays.values():
            array.flush()

    def checksums(self, view: int) -> dict[str, int]:
        """Of each file's part of one view."""
        return {
            self._files[part]: zlib.crc32(np.ascontiguousarray(array[view]).data)
            for part, array in self._arrays.items()
        }


def open_columns(
    folder: Path, asked: Asked, shapes: Mapping[str, Sequence[int]], examples: int, mode: str
) -> dict[str, Column]:
    """The columns by name. shapes: of one example's logits and inner layers."""
    return {
        name: Column(folder, asked, name, shape, examples, mode) for name, shape in shapes.items()
    }


def read_index(folder: Path, name: str = INDEX) -> dict[str, Any]:
    """What `answers.json` says. Raises `StorageError` where it is missing or damaged, `UsageError`
    where a newer Attar wrote it."""
    path = folder / name
    with _damage(path):
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["schema"] != SCHEMA:
            raise UsageError(f"{path} was written by a newer Attar (schema {index['schema']})")
        asked_in(index)
        for part in PARTS if name == INDEX else ():
            index[part]
        return index


def clear(folder: Path) -> None:
    """Removes what answers consist of; anything else in the folder stays."""
    for path in (folder / INDEX, folder / PROGRESS, *folder.glob(f"*{ENDING}")):
        path.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, ...], kind: np.dtype, mode: str) -> np.memmap:
    if mode == "w+":
        return open_memmap(path, mode=mode, dtype=kind, shape=shape)
    with _damage(path):
        array = open_memmap(path, mode=mode)  # refuses pickled objects by itself
        if array.shape != shape or array.dtype != kind:
            raise ValueError
        return array


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What goes wrong in reading a file, as a sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is missing or damaged: to ask the teacher again, delete {path.parent}, or say "
            "`--set stages.distill.store.rebuild=true`"
        ) from error
