"""Augmentation: torchvision's v2 transforms by name, the common ones on whole batches.

What is drawn for an example depends on (seed, epoch, its place in the split) alone: not on the
order, the batch size or the number of processes. So a pass repeats, and a teacher's answers can be
stored by (example, epoch).
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from attar.errors import RecipeError
from attar.registry import near

Shape = tuple[int, ...]
PAD_MODES = ("constant", "edge", "reflect", "symmetric")
CHANGE_LABELS = {"MixUp", "CutMix"}


class Transform(ABC):
    """One random change of images: drawn for a whole epoch at once, applied by batch."""

    @abstractmethod
    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """What is drawn for `count` examples of `shape` (C, H, W): a row each."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Images (N, C, H, W) changed as their rows of `drawn` say; the type stays."""


class Crop(Transform):
    """A window at a random place of the padded image.

    size: height, width. padding: left, right, top, bottom. mode: one of `PAD_MODES`.
    """

    def __init__(self, size: Sequence[int], padding: Sequence[int], fill: float, mode: str) -> None:
        self.height, self.width = size
        self.left, self.right, self.top, self.bottom = padding
        self.fill, self.mode = fill, mode

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        rows = shape[1] + self.top + self.bottom - self.height + 1
        columns = shape[2] + self.left + self.right - self.width + 1
        if rows < 1 or columns < 1:
            raise RecipeError(
                f"augment: random_crop takes {self.height}×{self.width} from images of "
                f"{shape[1]}×{shape[2]}; a smaller `size` or more `padding` would work"
            )
        return torch.stack(
            [
                torch.randint(rows, (count,), generator=generator),
                torch.randint(columns, (count,), generator=generator),
            ],
            dim=1,
        )

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        windows = sliding_window_view(
            self._padded(images.numpy()), (self.height, self.width), axis=(2, 3)
        )
        top, left = drawn.numpy().T
        return torch.from_numpy(windows[np.arange(len(images)), :, top, left])

    def _padded(self, images: np.ndarray) -> np.ndarray:
        widths = ((0, 0), (0, 0), (self.top, self.bottom), (self.left, self.right))
        if self.mode != "constant":
            return np.pad(images, widths, mode=self.mode)  # type: ignore[call-overload]
        count, channels, height, width = images.shape
        shape = (count, channels, height + self.top + self.bottom, width + self.left + self.right)
        padded = np.full(shape, self.fill, images.dtype)  # np.pad takes three times as long
        padded[:, :, self.top : self.top + height, self.left : self.left + width] = images
        return padded


class Flip(Transform):
    """A mirror image, with probability `p`. axis: -1 swaps left and right, -2 top and bottom."""

    def __init__(self, p: float, axis: int) -> None:
        self.p, self.axis = p, axis

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator) < self.p

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        # copying whole images is several times faster than choosing pixels by torch.where
        both = torch.cat([images, images.flip(self.axis)])
        return both.index_select(0, torch.arange(len(images)) + drawn * len(images))


class EachImage(Transform):
    """Any other transform of v2, called for every image with a seed of the image's own."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        return torch.randint(2**62, (count,), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return torch.stack(
                [self._one(i, s) for i, s in zip(images, drawn.tolist(), strict=True)]
            )

    def _one(self, image: Tensor, seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)  # a hundredth of torch.manual_seed
        return self.transform(image)


class Augmentation:
    """Transforms in their order, for images of one shape.

    written: as in a recipe, `["random_horizontal_flip", {"random_crop": {"size": 32}}]`.
    Raises `RecipeError` for an unknown transform, wrong arguments, or one that changes an image's
    shape or type.

    Example:
        >>> augmentation = Augmentation(["random_horizontal_flip"], (1, 2, 2))
        >>> change = augmentation.start(count=8, seed=0, epoch=0)
        >>> change(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([5, 0, 7])).shape
        torch.Size([3, 1, 2, 2])
    """

    def __init__(self, written: Sequence[str | dict[str, Any]], shape: Shape) -> None:
        self.written = list(written)
        self.shape = shape
        self._transforms = [transform(step) for step in written]
        self._try()

    def __bool__(self) -> bool:
        return bool(self._transforms)

    def start(self, count: int, seed: int, epoch: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Draws for a whole pass over `count` examples; gives the change of (images, indices)."""
        generator = torch.Generator().manual_seed(mixed(seed, epoch, "augment"))
        drawn = [t.draw(count, self.shape, generator) for t in self._transforms]

        def change(images: Tensor, indices: Tensor) -> Tensor:
            for step, rows in zip(self._transforms, drawn, strict=True):
                images = step.apply(images, rows[indices])
            return images

        return change

    def _try(self) -> None:
        images = torch.zeros(1, *self.shape, dtype=torch.uint8)
        try:
            changed = self.start(1, 0, 0)(images, torch.tensor([0]))
        except (ValueError, TypeError, RuntimeError) as error:
            raise RecipeError(f"augment fails on images of {self.shape}: {error}") from None
        if changed.shape != images.shape or changed.dtype != images.dtype:
            raise RecipeError(
                f"augment turns images of {self.shape} {images.dtype} into "
                f"{tuple(changed.shape[1:])} {changed.dtype}; they must stay as they are, which a "
                f"`size` of {list(self.shape[1:])} does for crops"
            )


def transform(written: str | dict[str, Any]) -> Transform:
    """The transform that one entry of a recipe's `augment` names. Raises `RecipeError`."""
    from torchvision.transforms import v2

    from attar.data.affine import Affine

    name, arguments = (written, None) if isinstance(written, str) else next(iter(written.items()))
    known = _known()
    if name not in known:
        raise RecipeError(
            f"augment: torchvision has no transform {name!r}{near(name, list(known))}"
        )
    try:
        made = known[name](**_objects(arguments or {}))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"augment: {name} refuses its arguments: {error}") from None
    if isinstance(made, v2.RandomHorizontalFlip | v2.RandomVerticalFlip):
        return Flip(made.p, -1 if isinstance(made, v2.RandomHorizontalFlip) else -2)
    plain = isinstance(made, v2.RandomCrop) and not made.pad_if_needed
    if plain and isinstance(made.fill, int | float) and made.padding_mode in PAD_MODES:
        return Crop(made.size, made.padding or [0] * 4, made.fill, made.padding_mode)
    if isinstance(made, v2.RandomAffine) and Affine.takes(made):
        return Affine(made)
    return EachImage(made)


def _objects(arguments: dict[str, Any]) -> dict[str, Any]:
    """A recipe's arguments with what torchvision wants an object for: `interpolation: bilinear`."""
    from torchvision.transforms.v2 import InterpolationMode

    named = arguments.get("interpolation")
    if not isinstance(named, str):
        return arguments
    return {**arguments, "interpolation": InterpolationMode(named)}


def mixed(*parts: object) -> int:
    """One seed from several values: any change in any of them gives an unrelated one."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _known() -> dict[str, type]:
    """Torchvision's transforms of single images, by their names in snake_case."""
    from torchvision.transforms import v2

    return {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): kind
        for name, kind in vars(v2).items()
        if isinstance(kind, type)
        and issubclass(kind, v2.Transform)
        and kind is not v2.Transform
        and name not in CHANGE_LABELS
    }
