"""From a recipe's `data` to three splits, prepared, checked and described."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attar.data.arrays import ArraySplit
from attar.data.augment import Augmentation
from attar.data.base import UNLABELLED, Data
from attar.data.config import DataConfig, Normalize
from attar.data.images import SCALE, fit_images, preparation
from attar.data.parts import Examples, Parts, Source, location, sources
from attar.data.splits import Rows, divided, reduced
from attar.data.unlabelled import unlabelled_images
from attar.errors import DataError, UsageError
from attar.files import Trust, from_file, is_reference

SOURCE_FIELDS = ("name", "root", "path", "columns", "download", "arguments")
STATISTICS_BLOCK = 1024


def load_data(config: DataConfig, *, seed: int = 0, trusted: Trust = False) -> Data:
    """Reads the data set and divides it into train, validation and test.

    Splits are drawn by `config.seed`; `seed` is the run's and draws only the training `subset`.
    Validation is the data's own, or a stratified tenth of train, or what `config.validation` says;
    without a test split, a fifth of train is the test. Mean and standard deviation come from the
    training examples that are left. `Data.notes` says what was decided.
    trusted: whether a person's own file may be run (see `attar.files.allow`).

    Raises `DataError` for data that can't be read or don't fit together, `UsageError` for settings
    that can't be followed.

    Example:
        >>> data = load_data(DataConfig(source="digits"))
        >>> len(data.train), len(data.validation), len(data.test), data.shape
        (1294, 144, 359, (1, 8, 8))
    """
    parts = _fitted(_checked(_read(config, trusted), config), config)
    train, validation, test, notes = divided(parts, config.validation, config.seed)
    if config.subset is not None:
        train = reduced(train, config.subset, seed)
        _require_every_class(train.targets, parts.classes, "the training subset")
        notes.append(
            f"A {config.subset.method} subset of {len(train.rows):,} examples is learnt from."
        )
    shape = parts.train.images.shape[1:]
    mean, std = _normalization(train, config)
    augmentation = Augmentation(config.augment, shape)
    if augmentation and parts.train.images.dtype != np.uint8:
        raise DataError(f"{parts.name} has float pixels: augmentation wants them as uint8")

    def split(name: str, part: Rows, augmentation: Augmentation | None = None) -> ArraySplit:
        images, targets = map(torch.from_numpy, (part.examples.images, part.examples.targets))
        rows = torch.from_numpy(part.rows)
        return ArraySplit(
            name, images, targets, rows=rows, mean=mean, std=std, augmentation=augmentation
        )

    extra = _unlabelled(config, parts) if config.unlabelled is not None else None
    if extra is not None:
        notes.append(f"{len(extra.rows):,} images without labels are there for `distill` to use.")
    return Data(
        name=parts.name,
        train=split("train", train, augmentation),
        validation=split("validation", validation),
        test=split("test", test),
        classes=parts.classes,
        shape=tuple(shape),
        preparation=preparation(shape, config, mean, std),
        notes=[*parts.notes, *notes],
        unlabelled=None if extra is None else split("unlabelled", extra, augmentation),
    )


def _unlabelled(config: DataConfig, parts: Parts) -> Rows:
    """The images without labels, in the form of the training images."""
    path = location(config.unlabelled, "unlabelled")
    images, train = unlabelled_images(path, config), parts.train.images
    if images.shape[1:] != train.shape[1:]:
        raise DataError(
            f"the unlabelled images in {path} are {images.shape[1:]} and those of {parts.name} "
            f"{train.shape[1:]} (channels, height, width): give the data a `size` and a `color`"
        )
    if images.dtype != train.dtype:
        raise DataError(
            f"the unlabelled images in {path} are {images.dtype} and those of {parts.name} "
            f"{train.dtype}: save both as uint8"
        )
    targets = np.full(len(images), UNLABELLED, np.int64)
    return Rows(Examples(images, targets), np.arange(len(images)))


def _read(config: DataConfig, trusted: Trust) -> Parts:
    own = is_reference(config.source)
    kind = _own_source(config.source, trusted) if own else sources.get(config.source)
    for field in SOURCE_FIELDS:
        if getattr(config, field) and field not in kind.takes:
            raise UsageError(f"the data source {config.source!r} takes no `{field}`")
    return kind().load(config)


def _own_source(reference: str, trusted: Trust) -> type[Source]:
    found = from_file(reference, trusted)
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise UsageError(
            f"{reference} is no data source: it must be a subclass of attar.data.Source"
        )
    return found


def _checked(parts: Parts, config: DataConfig) -> Parts:
    """The parts with the recipe's class names, unlabelled splits left out, labels in range."""
    classes = tuple(config.classes or parts.classes)
    if config.classes and len(classes) != len(parts.classes):
        raise UsageError(
            f"`classes` names {len(classes)} classes and {parts.name} has {len(parts.classes)}"
        )
    if len(classes) < 2:
        raise DataError(f"{parts.name} has {len(classes)} class: at least two are needed")
    unlabelled = [n for n, e in parts.splits.items() if n != "train" and (e.targets < 0).all()]
    notes = [f"The {name} split has no labels, so it is not used." for name in unlabelled]
    kept = {name: e for name, e in parts.splits.items() if name not in unlabelled}
    for name, examples in kept.items():
        _require_known_classes(examples.targets, classes, f"{name} of {parts.name}")
    _require_every_class(parts.train.targets, classes, f"train of {parts.name}")
    return replace(Parts.of(parts.name, classes, kept), notes=[*parts.notes, *notes])


def _require_known_classes(targets: np.ndarray, classes: tuple[str, ...], where: str) -> None:
    wrong = targets[(targets < 0) | (targets >= len(classes))]
    if len(wrong):
        raise DataError(
            f"{where} has the label {wrong[0]}, but there are {len(classes)} classes, "
            f"so labels from 0 to {len(classes) - 1}"
        )


def _require_every_class(targets: np.ndarray, classes: tuple[str, ...], where: str) -> None:
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    if len(empty):
        raise DataError(f"the class {classes[empty[0]]!r} is empty: {where} has no example of it")


def _fitted(parts: Parts, config: DataConfig) -> Parts:
    """The parts with all images in the color and size that the recipe asks for."""
    fitted = {
        name: replace(e, images=fit_images(e.images, config, f"{name} of {parts.name}"))
        for name, e in parts.splits.items()
    }
    shapes = {name: e.images.shape[1:] for name, e in fitted.items()}
    for name, shape in shapes.items():
        if shape != shapes["train"]:
            raise DataError(
                f"{parts.name} has images of {shapes['train']} in train and {shape} in {name} "
                "(channels, height, width): give the data a `size` and a `color`"
            )
    return replace(Parts.of(parts.name, parts.classes, fitted), notes=parts.notes)


def _normalization(train: Rows, config: DataConfig) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixels scaled to 0–1."""
    channels = train.examples.images.shape[1]
    if isinstance(config.normalize, Normalize):
        pair = (config.normalize.mean, config.normalize.std)
        for values in pair:
            if len(values) not in (1, channels):
                raise UsageError(
                    f"`normalize` has {len(values)} values and the images have {channels} "
                    f"channel{'s' * (channels > 1)}"
                )
        mean, std = (list(v) * channels if len(v) == 1 else list(v) for v in pair)
        return mean, std
    return _moments(torch.from_numpy(train.examples.images), torch.from_numpy(train.rows))


def _moments(images: Tensor, rows: Tensor) -> tuple[list[float], list[float]]:
    """Rounded to six digits, so that they are the same on every machine."""
    scale = SCALE if images.dtype == torch.uint8 else 1.0
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for block in rows.split(STATISTICS_BLOCK):
        pixels = images.index_select(0, block).transpose(0, 1).flatten(1).float()
        total += torch.stack([pixels.sum(1), (pixels * pixels).sum(1)]).double()
    count = len(rows) * images[0, 0].numel()
    mean, square = total / count
    std = (square - mean * mean).clamp_min(0).sqrt() * scale
    std[std == 0] = 1  # a channel that never changes
    return [round(v, 6) for v in (mean * scale).tolist()], [
        max(round(v, 6), 1e-6) for v in std.tolist()
    ]
