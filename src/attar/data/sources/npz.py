"""NumPy archives: MedMNIST's, and those with `x_train`, `y_train`, `x_test`, `y_test`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from attar.data.config import DataConfig
from attar.data.images import as_images
from attar.data.parts import Examples, Parts, Source, location, numbered, sources
from attar.errors import DataError

KEYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val"), ("x_valid", "y_valid")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


@sources.register("npz")
class Npz(Source):
    """A .npz file with MedMNIST's keys, or x_train, y_train, x_test and y_test."""

    takes = frozenset({"path"})

    def load(self, config: DataConfig) -> Parts:
        path = location(config.path, "path")
        arrays = arrays_in(path)
        pairs = {split: _pair(arrays, names) for split, names in KEYS.items()}
        if pairs["train"] is None:
            raise DataError(
                f"{path} has the arrays {', '.join(sorted(arrays)) or 'none'}; expected are "
                "train_images and train_labels, or x_train and y_train"
            )
        found = {split: pair for split, pair in pairs.items() if pair is not None}
        labels, classes = numbered(
            _stacked([arrays[y] for _, y in found.values()], path), str(path)
        )
        parts: dict[str, Examples] = {}
        start = 0
        for split, (x, y) in found.items():
            count = len(arrays[y])
            if len(arrays[x]) != count:
                raise DataError(f"{path} has {len(arrays[x]):,} {x} and {count:,} {y}")
            images = as_images(arrays[x], f"{x} of {path}")
            parts[split] = Examples(images, labels[start : start + count])
            start += count
        return Parts.of(path.stem, classes, parts)


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays. Pickled objects are refused: reading them could run anything."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"can't read {path} as arrays of numbers: {error}") from None


def _pair(
    arrays: dict[str, np.ndarray], names: tuple[tuple[str, str], ...]
) -> tuple[str, str] | None:
    return next((pair for pair in names if arrays.keys() >= set(pair)), None)


def _stacked(labels: list[np.ndarray], path: Path) -> np.ndarray:
    """All splits' labels together, so that a name means the same class in each."""
    columns = [y.reshape(-1) if y.shape[1:] == (1,) else y for y in labels]
    try:
        return np.concatenate(columns)
    except ValueError as error:
        raise DataError(f"the labels in {path} differ in form between splits: {error}") from None
