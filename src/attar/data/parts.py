"""What a data source gives: the images and labels it has, split as their makers split them."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from attar.data.config import DataConfig
from attar.errors import DataError, UsageError
from attar.registry import Registry


@dataclass(frozen=True)
class Examples:
    """Images with their labels.

    images: uint8 pixels, or float32 of 0 to 1, (N, C, H, W); may be a file mapped to memory.
    targets: int64 (N,).
    """

    images: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Parts:
    """A source's own splits. What is missing is carved by `attar.data.load_data`."""

    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, classes: tuple[str, ...], splits: dict[str, Examples]) -> Parts:
        """The parts from splits by name, of which `train` must be there."""
        return cls(name, classes, splits["train"], splits.get("validation"), splits.get("test"))

    @property
    def splits(self) -> dict[str, Examples]:
        """The splits there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in found.items() if examples is not None}


class Source(ABC):
    """Where examples come from. A subclass is one file, registered by name.

    Example:
        >>> @sources.register("noise")
        ... class Noise(Source):
        ...     "Random images, to try a pipeline on."
        ...     def load(self, config):
        ...         images = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), np.uint8)
        ...         return Parts("noise", ("a", "b"), Examples(images, np.arange(64) % 2))
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    """Which of `name`, `root`, `path`, `columns`, `download`, `arguments` it heeds; the rest are
    refused. Everything else in the configuration is seen to for every source."""

    @abstractmethod
    def load(self, config: DataConfig) -> Parts:
        """Reads everything. Raises `DataError` for what can't be read."""


sources: Registry[type[Source]] = Registry("data source", "attar.data.sources")


def location(text: str | None, what: str) -> Path:
    """The path that a recipe's `root` or `path` names, variables and `~` filled in.

    Raises `UsageError` where it is not given or a variable isn't set, `DataError` where nothing is.
    """
    if text is None:
        raise UsageError(f"this data source needs `{what}`: where the data are")
    filled = os.path.expandvars(text)
    unset = re.search(r"\$\{?(\w+)", filled)
    if unset:
        raise UsageError(f"the data's `{what}` is {text}, but {unset[1]} is not set")
    path = Path(filled).expanduser()
    if not path.exists():
        raise DataError(f"no data at {path}: there is no such file or folder")
    return path


def numbered(labels: np.ndarray, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 (N,), and the class names they imply. Takes integers, strings (sorted), a
    column (N, 1) and one-hot rows (N, k). Raises `DataError` for several labels an example."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        if not ((labels == 0) | (labels == 1)).all() or not (labels.sum(1) == 1).all():
            raise DataError(f"{where} has {labels.shape[1]} labels an example: one was expected")
        labels = labels.argmax(1)
    labels = labels.reshape(len(labels))
    if labels.dtype.kind in "USO":
        names, numbers = np.unique(labels.astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(names.tolist())
    numbers = labels.astype(np.int64)
    if not np.array_equal(numbers, labels):
        raise DataError(f"{where} has labels that are not whole numbers, so they name no classes")
    return numbers, tuple(str(i) for i in range(int(numbers.max(initial=-1)) + 1))
