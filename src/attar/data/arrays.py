"""A split held in memory, or in a file mapped to it: whole batches by a few array operations."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attar.data.augment import Augmentation, mixed
from attar.data.base import Batch
from attar.errors import DataError, UsageError

HASHED_BYTES = 2**30
HASH_BLOCK = 4096


class Chained:
    """Arrays of images of one form, one after another as if they were one. Nothing is copied, so
    they may be files mapped to memory.

    parts: (N, C, H, W) each, alike but for N. Raises `DataError` for parts of different forms.

    Example:
        >>> both = Chained(torch.zeros(3, 1, 2, 2), torch.ones(2, 1, 2, 2))
        >>> both.index_select(0, torch.tensor([4, 0]))[:, 0, 0, 0].tolist()
        [1.0, 0.0]
    """

    def __init__(self, *parts: Tensor) -> None:
        first = parts[0]
        for part in parts[1:]:
            if (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
                raise DataError(
                    f"images of {tuple(part.shape[1:])} {part.dtype} can't join those of "
                    f"{tuple(first.shape[1:])} {first.dtype}: both must have one form"
                )
        self.parts = parts
        self.dtype = first.dtype
        self.shape = torch.Size([sum(map(len, parts)), *first.shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """As `Tensor.index_select` has it, for `dim` 0."""
        assert dim == 0
        chosen = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        start = 0
        for part in self.parts:
            own = (rows >= start) & (rows < start + len(part))
            chosen[own] = part.index_select(0, rows[own] - start)
            start += len(part)
        return chosen


class ArraySplit:
    """Examples of one split as arrays; no workers, so that an epoch's time is the network's.

    images: (N, C, H, W) uint8 pixels, or float32 of 0 to 1. Several splits may share them.
    targets: int64 (N,). rows: which of them this split holds, in order; default: all.
    mean, std: per channel, of pixels scaled to 0–1; inputs are (pixel / 255 - mean) / std.
    augmentation: for passes with `augment=True`.

    Example:
        >>> images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
        >>> split = ArraySplit("train", images, torch.arange(10) % 2, mean=[0.5], std=[0.5])
        >>> [len(batch.indices) for batch in split.batches(4)]
        [4, 4, 2]
    """

    def __init__(
        self,
        name: str,
        images: Tensor | Chained,
        targets: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rows: Tensor | None = None,
        augmentation: Augmentation | None = None,
        views: int | None = None,
    ) -> None:
        if len(images) != len(targets):
            raise DataError(f"{name} has {len(images):,} images and {len(targets):,} labels")
        self.name = name
        self.images = images
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.targets = targets[self.rows]
        self.augmentation = augmentation
        self._views = views
        scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
        spread = torch.tensor(std, dtype=torch.float64)
        self._factor = (scale / spread).float().view(1, -1, 1, 1)
        self._offset = (-torch.tensor(mean, dtype=torch.float64) / spread).float().view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def with_views(self, views: int) -> ArraySplit:
        """The same examples in `views` augmentations each: epoch `e` draws as epoch `e % views`
        does, in an order of its own. What is known of those views need be computed only once."""
        repeated = copy.copy(self)
        repeated._views = views
        return repeated

    def only(self, places: Sequence[int] | np.ndarray) -> ArraySplit:
        """The examples at these places, in this order, as a split of its own: the images are
        shared, augmentations are drawn by the new places."""
        chosen = torch.as_tensor(places, dtype=torch.int64).reshape(-1)
        return self._holding(self.images, self.rows[chosen], self.targets[chosen])

    def joined(self, other: ArraySplit) -> ArraySplit:
        """These examples and then those of `other`, prepared and augmented as these are.

        Raises `DataError` for images of another form.
        """
        return self._holding(
            Chained(*_parts(self.images), *_parts(other.images)),
            torch.cat([self.rows, other.rows + len(self.images)]),
            torch.cat([self.targets, other.targets]),
        )

    def _holding(self, images: Tensor | Chained, rows: Tensor, targets: Tensor) -> ArraySplit:
        held = copy.copy(self)
        held.images, held.rows, held.targets = images, rows, targets
        held.__dict__.pop("fingerprint", None)
        return held

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """See `attar.data.base.Split`. A rank whose share of the last batch is empty skips it."""
        change = None
        if augment and self.augmentation:
            draw = epoch % self._views if self._views else epoch
            change = self.augmentation.start(len(self), seed, draw)
        order = visiting_order(len(self), shuffle=shuffle, seed=seed, epoch=epoch)
        for indices in shares(order, batch_size, drop_last=drop_last, rank=rank, world=world):
            pixels = self.images.index_select(0, self.rows[indices])
            if change is not None:
                pixels = change(pixels, indices)
            yield Batch(self._normalized(pixels), self.targets[indices], indices)

    def pick(self, indices: Sequence[int]) -> Batch:
        """The examples at these places, not augmented."""
        places = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        pixels = self.images.index_select(0, self.rows[places])
        return Batch(self._normalized(pixels), self.targets[places], places)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of labels, preparation, augmentation and images: of all images up to 1 GiB, of
        evenly spaced ones of that many bytes beyond."""
        size = math.prod(self.images.shape[1:]) * self.images.dtype.itemsize
        step = max(1, -(-len(self) * size // HASHED_BYTES))
        how = (
            tuple(self.images.shape[1:]),
            self.images.dtype,
            self._factor.tolist(),
            self._offset.tolist(),
            self.augmentation.written if self.augmentation else [],
            step,
        )
        digest = hashlib.sha256(repr(how).encode())
        digest.update(self.targets.numpy().data)
        for rows in self.rows[::step].split(HASH_BLOCK):
            digest.update(self.images.index_select(0, rows).numpy().data)
        return digest.hexdigest()

    def _normalized(self, pixels: Tensor) -> Tensor:
        inputs = pixels.float() if pixels.dtype != torch.float32 else pixels
        return inputs.mul_(self._factor).add_(self._offset)


def _parts(images: Tensor | Chained) -> tuple[Tensor, ...]:
    return images.parts if isinstance(images, Chained) else (images,)


def visiting_order(count: int, *, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """The places 0 to count in the order of one pass: int64 (count,)."""
    if not shuffle:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(mixed(seed, epoch, "order"))
    return torch.randperm(count, generator=generator)


def shares(
    order: Tensor, batch_size: int, *, drop_last: bool, rank: int, world: int
) -> Iterator[Tensor]:
    """Each batch's examples that fall to `rank` of `world` processes. Raises `UsageError` for
    batches too small to be shared."""
    if batch_size < world:
        raise UsageError(f"a batch of {batch_size} can't be shared by {world} processes")
    for batch in order.split(batch_size):
        own = batch[rank::world]
        if (len(batch) == batch_size or not drop_last) and len(own):
            yield own
