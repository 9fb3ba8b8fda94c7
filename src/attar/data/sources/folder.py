"""Images in class folders: `root/cat/1.jpg`, or `root/train/cat/1.jpg` with `val` and `test`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from attar.data.config import DataConfig
from attar.data.decoding import Encoded, decoded, file_stamp
from attar.data.images import open_image
from attar.data.parts import Examples, Parts, Source, location, sources
from attar.errors import DataError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@sources.register("folder")
class Folder(Source):
    """Images in class folders, all together or under train, val and test."""

    takes = frozenset({"path"})

    def load(self, config: DataConfig) -> Parts:
        root = location(config.path, "path")
        if not root.is_dir():
            raise DataError(f"{root} is not a folder: class folders with images were expected")
        splits = _split_folders(root)
        classes = _class_names(splits["train"])
        found = {split: _files(folder, classes) for split, folder in splits.items()}
        parts = {split: read_files(files, splits[split], config) for split, files in found.items()}
        return Parts.of(root.resolve().name, tuple(classes), parts)


def _split_folders(root: Path) -> dict[str, Path]:
    """Each split's folder; the root alone where there is no `train`."""
    below = {folder.name.lower(): folder for folder in _folders(root)}
    found = {
        split: below[name] for split, names in SPLITS.items() for name in names if name in below
    }
    return found if "train" in found else {"train": root}


def _class_names(folder: Path) -> list[str]:
    names = [f.name for f in _folders(folder)]
    if len(names) < 2:
        raise DataError(
            f"{folder} has {len(names)} class folder{'s' * (len(names) != 1)}: at least two were "
            f"expected, such as {folder / 'cat'} and {folder / 'dog'}, with the images inside"
        )
    return names


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """All images under one split's folder with their class's place, in a fixed order."""
    unknown = {f.name for f in _folders(folder)} - set(classes)
    if unknown:
        raise DataError(f"{folder} has a class {min(unknown)!r} that the training images lack")
    files = []
    for label, name in enumerate(classes):
        own = images_under(folder / name)
        if not own:
            raise DataError(f"the class {name!r} is empty: {folder / name} has no images")
        files += [(path, label) for path in own]
    return files


def images_under(folder: Path) -> list[Path]:
    """All image files in a folder, at any depth, in a fixed order."""
    return sorted(
        Path(at) / name
        for at, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )


def read_files(files: list[tuple[Path, int]], folder: Path, config: DataConfig) -> Examples:
    """The decoded images of files under `folder`, each with its label."""

    def items() -> Iterator[Encoded]:
        for path, label in files:
            yield Encoded(str(path), partial(_open, path, label))

    stamps = [[*file_stamp(path, folder), label] for path, label in files]
    return decoded(items, len(files), config, [str(folder.resolve()), stamps])


def _open(path: Path, label: int) -> tuple[Image.Image, int]:
    return open_image(path, str(path)), label


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
