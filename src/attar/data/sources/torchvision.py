"""Torchvision's classification data sets, by the name of their class."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attar.data.config import DataConfig
from attar.data.decoding import Encoded, decoded, file_stamp
from attar.data.images import as_images
from attar.data.parts import Examples, Parts, Source, numbered, sources
from attar.errors import DataError, UsageError
from attar.registry import near

SPLITS = {
    "train": ("train", "trainval"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}


@sources.register("torchvision")
class Torchvision(Source):
    """Any of torchvision's classification data sets by its class's name, such as CIFAR10."""

    takes = frozenset({"name", "root", "download", "arguments"})

    def load(self, config: DataConfig) -> Parts:
        name, kind = config.name, _kind(config.name)
        assert name is not None
        found = _splits(kind, config)
        if "train" not in found:
            raise DataError(f"torchvision's {name} has no train split to learn from")
        parts = {split: _read(dataset, split, config) for split, dataset in found.items()}
        return Parts.of(name, _class_names(found["train"], parts), parts)


def _kind(name: str | None) -> type:
    from torchvision import datasets

    known = [n for n in datasets.__all__ if n not in ("FakeData", "ImageFolder", "DatasetFolder")]
    if name is None:
        raise UsageError("the data source 'torchvision' needs `name`, such as CIFAR10")
    if name not in known:
        raise UsageError(f"torchvision has no data set {name!r}{near(name, known)}")
    return getattr(datasets, name)


def _splits(kind: type, config: DataConfig) -> dict[str, Any]:
    """The data set's own splits, whichever way its class asks for them."""
    accepted = {p for c in kind.__mro__ for p in inspect.signature(c.__init__).parameters}  # type: ignore[misc]
    if "train" in accepted:
        return {split: _made(kind, config, train=split == "train") for split in ("train", "test")}
    if "split" not in accepted or "split" in config.arguments:
        return {"train": _made(kind, config)}
    found = {}
    for split, names in SPLITS.items():
        for name in names:
            try:
                found[split] = _made(kind, config, split=name)
                break
            except ValueError:  # this class has no split of that name
                continue
    return found


def _made(kind: type, config: DataConfig, **which: Any) -> Any:
    """The data set, downloaded if it must and may be. A `ValueError` says: no such split."""
    root = _root(config)
    arguments = {**config.arguments, **which}
    try:
        return kind(root, **arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) and "split" in which:
            raise
        raise UsageError(f"torchvision's {kind.__name__} refuses its arguments: {error}") from None
    except (RuntimeError, OSError) as error:
        if not config.download:
            raise DataError(
                f"torchvision's {kind.__name__} is not in {root}: give its `root`, or "
                f"`download: true` to fetch it ({_first_line(error)})"
            ) from None
    try:
        return kind(root, download=True, **arguments)
    except TypeError:
        raise UsageError(
            f"torchvision can't download {kind.__name__}: put it into {root} by hand"
        ) from None
    except Exception as error:  # a remote service has many ways to fail
        raise DataError(f"can't download {kind.__name__}: {_first_line(error)}") from None


def _root(config: DataConfig) -> Path:
    """Unlike other paths, it need not exist: `download` makes it."""
    text = os.path.expandvars(config.root or "data")
    if "$" in text:
        raise UsageError(f"the data's `root` is {config.root}, but its variable is not set")
    return Path(text).expanduser()


def _read(dataset: Any, split: str, config: DataConfig) -> Examples:
    """Straight from the arrays that small data sets hold, else by decoding every image."""
    where = f"the {split} split of {type(dataset).__name__}"
    data = getattr(dataset, "data", None)
    labels = next(
        (v for v in (getattr(dataset, n, None) for n in ("targets", "labels")) if v is not None),
        None,
    )
    if data is not None and labels is not None and np.ndim(data) >= 3 and np.ndim(labels) == 1:
        return Examples(as_images(np.asarray(data), where), numbered(np.asarray(labels), where)[0])
    return _decode(dataset, where, config)


def _decode(dataset: Any, where: str, config: DataConfig) -> Examples:
    def items() -> Iterator[Encoded]:
        for i in range(len(dataset)):
            yield Encoded(f"{i} of {where}", partial(_open, dataset, i, where))

    root = Path(dataset.root)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    key = [where, repr(config.arguments), str(root.resolve()), [file_stamp(p, root) for p in files]]
    return decoded(items, len(dataset), config, key)


def _open(dataset: Any, i: int, where: str) -> tuple[Image.Image, int]:
    try:
        image, label, *_ = dataset[i]
    except (OSError, ValueError) as error:
        raise DataError(f"can't read the image {i} of {where}: {error}") from None
    if not isinstance(image, Image.Image) or not isinstance(label, int | np.integer):
        raise DataError(f"{where} has no image with a class in each example, so it is not for this")
    return image, int(label)


def _class_names(dataset: Any, parts: dict[str, Examples]) -> tuple[str, ...]:
    """The names the data set carries ("0" for MNIST's "0 - zero"); else numbers."""
    names = getattr(dataset, "classes", None) or ()
    count = max(int(examples.targets.max(initial=0)) + 1 for examples in parts.values())
    if len(names) < count:
        return tuple(str(i) for i in range(count))
    names = [n[0] if isinstance(n, tuple | list) else n for n in names]  # ImageNet has synonyms
    return tuple(str(n).split(" - ")[0] for n in names)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")
