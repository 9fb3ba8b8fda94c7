"""What a path or a name says about data: which source reads it, which splits it has, how large its
images are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attar.data.config import DataConfig
from attar.data.images import open_image
from attar.data.parts import sources
from attar.data.sources import folder as folders
from attar.data.sources import npz
from attar.errors import DataError, UsageError
from attar.registry import near

LOOKED_AT = 64
"""How many images of a folder are opened to learn their sizes."""


@dataclass(frozen=True)
class Detected:
    """fields: for the recipe's `data`. splits: those the data come with, as far as that is known.
    sizes: (width, height) of some images, where they are files of their own; gray: whether those
    have no colors."""

    fields: dict[str, Any]
    splits: frozenset[str] = frozenset()
    sizes: list[tuple[int, int]] = field(default_factory=list)
    gray: bool = False


def detect(data: str, root: Path = Path("data")) -> Detected:
    """Finds out what `data` is: a folder of class folders, an .npz, Parquet files, one of Attar's
    sources (`digits`), torchvision's data set of that name in `root`, or a hub name (`owner/name`).

    Raises `UsageError` for what is none of these, `DataError` for an empty folder.

    Example:
        >>> detect("CIFAR10").fields
        {'source': 'torchvision', 'name': 'CIFAR10', 'root': 'data'}
    """
    path = Path(data).expanduser()
    if path.exists():
        return _of_path(path)
    if data in sources.names() and not sources.get(data).takes:
        return Detected({"source": data})
    if data in torchvision_sets():
        fields = {"source": "torchvision", "name": data, "root": str(root)}
        return Detected(fields, frozenset({"train", "test"}))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not path.suffix and not path.parent.exists():
        return Detected({"source": "huggingface", "name": data})
    known = [*sources.names(), *torchvision_sets()]
    raise UsageError(f"no data at {data}, and none of that name{near(data, known)}")


def prepared_for(inputs: list[dict[str, Any]], data: Detected) -> DataConfig:
    """The data set, prepared as a bundle's manifest says that its input wants images.

    Raises `UsageError` for a bundle that takes no images.
    """
    wanted = inputs[0]
    if "color" not in wanted:
        raise UsageError("the bundle takes no images: it can only be evaluated on its run's data")
    prepared: dict[str, Any] = {"color": wanted["color"]}
    if resize := wanted.get("resize"):
        stretched = resize.get("fit") == "stretch" or resize["width"] != resize["height"]
        prepared["size"] = (resize["height"], resize["width"]) if stretched else resize["width"]
    normalize = {"mean": wanted["mean"], "std": wanted["std"]}
    return DataConfig.model_validate({**data.fields, **prepared, "normalize": normalize})


def torchvision_sets() -> list[str]:
    """The names of torchvision's data sets."""
    from torchvision import datasets

    return [
        name
        for name in datasets.__all__
        if name not in {"FakeData", "ImageFolder", "DatasetFolder"}
    ]


def _of_path(path: Path) -> Detected:
    if path.suffix == ".npz":
        return Detected({"source": "npz", "path": str(path)}, _npz_splits(path))
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        return Detected({"source": "huggingface", "path": str(path)}, _parquet_splits(path))
    if path.is_dir():
        return _of_folder(path)
    raise UsageError(f"{path} is no data: give a folder, an .npz or a .parquet file")


def _npz_splits(path: Path) -> frozenset[str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = set(archive.files)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    return frozenset(
        split for split, pairs in npz.KEYS.items() if any(keys >= set(pair) for pair in pairs)
    )


def _parquet_splits(path: Path) -> frozenset[str]:
    names = [file.relative_to(path).as_posix() for file in path.rglob("*.parquet")]
    return _named_splits(lambda name: any(re.search(rf"\b{name}\b", n) for n in names))


def _named_splits(there: Callable[[str], bool]) -> frozenset[str]:
    return frozenset(
        split for split, names in folders.SPLITS.items() if any(there(name) for name in names)
    )


def _of_folder(path: Path) -> Detected:
    splits = _named_splits(lambda name: (path / name).is_dir())
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in folders.SUFFIXES)
    if not files:
        raise DataError(f"{path} holds no images, no .parquet and no .npz")
    images = [open_image(f, str(f)) for f in files[:: max(1, len(files) // LOOKED_AT)]]
    return Detected(
        {"source": "folder", "path": str(path)},
        splits if "train" in splits else frozenset(),
        sizes=[image.size for image in images],
        gray=all(image.mode in {"1", "L"} for image in images),
    )
