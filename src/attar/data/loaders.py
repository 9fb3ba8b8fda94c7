"""A person's own loaders as splits: PyTorch `DataLoader`s, data sets, and anything iterable."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from attar.data.arrays import shares, visiting_order
from attar.data.augment import mixed
from attar.data.base import Batch, Data, Split
from attar.data.randomness import fresh_states, randomness, reproducibly
from attar.errors import DataError, UsageError

Loader = DataLoader | Dataset | Iterable[Any] | Callable[[], Iterable[Any]] | Split
INPUTS = ("inputs", "image", "images", "img", "pixel_values", "x")
TARGETS = ("targets", "target", "label", "labels", "y")
SAMPLED = 64
COUNTING_BATCH = 256


def from_loaders(
    train: Loader,
    validation: Loader,
    test: Loader,
    *,
    classes: int | Sequence[str] | None = None,
    name: str = "data",
    preparation: dict[str, Any] | None = None,
) -> Data:
    """Data from loaders of (inputs, targets) pairs, or of dicts with such entries.

    train, validation, test: each a `DataLoader`, a map-style `Dataset`, an iterable that can be
        read again, a function that gives a fresh iterator, or a `Split`.
    classes: names in the order of the labels, or their number; default: the data set's `classes`,
        else the labels are counted.
    preparation: how an image file becomes an input, in the manifest's words (`color`, `resize`,
        `scale`, `mean`, `std`). Without it `predict` can't read files: only you know how.

    Raises `DataError` for what can be read only once or does not hold such pairs.

    Example:
        >>> pairs = [(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 1]))] * 3
        >>> data = from_loaders(pairs, pairs, pairs)
        >>> data.classes, data.shape, len(data.test)
        (('0', '1', '2'), (1, 8, 8), 12)
    """
    given = {"train": train, "validation": validation, "test": test}
    made = {split: as_split(split, loader) for split, loader in given.items()}
    splits = list(made.values())
    shape = tuple(_first(splits[0]).inputs.shape[1:])
    for split in splits[1:]:
        other = tuple(_first(split).inputs.shape[1:])
        if other != shape:
            raise DataError(f"inputs have shape {shape} in train and {other} in {split.name}")
    names, notes = _class_names(classes, splits[0])
    for split in splits:
        _require_labels(split, len(names))
    if preparation is None:
        preparation = {"layout": "NCHW"} if len(shape) == 3 else {}
        notes.append("How the loaders prepare their inputs is not known, so no file can be read.")
    return Data(name=name, classes=names, shape=shape, preparation=preparation, notes=notes, **made)


def as_split(name: str, given: Loader) -> Split:
    """The split that a loader is."""
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        given = DataLoader(given)
    if isinstance(given, DataLoader):
        rebuilt = not isinstance(given.dataset, IterableDataset) and given.batch_sampler is not None
        if rebuilt:
            return LoaderSplit(name, given)
    if hasattr(given, "batches"):
        return given  # type: ignore[return-value]
    return StreamSplit(name, given)


class LoaderSplit:
    """A `DataLoader` over a map-style data set.

    Its data set, `collate_fn` and workers are used, and its sampler if it is one of the person's
    own; batches are made anew, so that size, order and places are the caller's. The data set
    transforms its examples itself, so `augment` changes nothing, but every random draw from torch,
    NumPy or `random` repeats by (seed, epoch).
    """

    def __init__(self, name: str, loader: DataLoader) -> None:
        self.name = name
        self._loader = loader
        self._dataset: Any = loader.dataset
        self._places: Tensor | None = None  # of what is left of it, in the loader's data set
        if not len(self):
            raise DataError(f"{name} has no examples")

    def __len__(self) -> int:
        return len(self._dataset)

    def only(self, places: Sequence[int] | np.ndarray) -> LoaderSplit:
        """The examples at these places, in this order, as a split of its own. A sampler of the
        person's own draws as before; of what it draws, these examples stay."""
        chosen = torch.as_tensor(places, dtype=torch.int64).reshape(-1)
        held = copy.copy(self)
        held._dataset = Subset(self._dataset, chosen.tolist())
        held._places = chosen if self._places is None else self._places[chosen]
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
        """See `attar.data.base.Split`."""
        order = self._order(shuffle, seed, epoch)
        indices = list(shares(order, batch_size, drop_last=drop_last, rank=rank, world=world))
        source = mixed(seed, epoch, "loader")
        loader = DataLoader(
            self._dataset,
            batch_sampler=[i.tolist() for i in indices],
            num_workers=self._loader.num_workers,
            collate_fn=self._loader.collate_fn,
            worker_init_fn=self._loader.worker_init_fn,
            generator=torch.Generator().manual_seed(source),
        )
        for own, batch in zip(indices, reproducibly(loader, source), strict=True):
            yield Batch(*_pair(batch, self.name), own)

    def pick(self, indices: Sequence[int]) -> Batch:
        """The examples at these places."""
        places = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        with randomness(fresh_states(0)):
            batch = self._loader.collate_fn([self._dataset[i] for i in places.tolist()])
        return Batch(*_pair(batch, self.name), places)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the number of examples and of 64 evenly spaced ones: sets that differ only
        between those are taken for equal."""
        count = len(self)
        places = sorted({i * count // SAMPLED for i in range(SAMPLED)})
        batch = self.pick(places)
        return _hashed(count, batch.inputs, batch.targets)

    def _order(self, shuffle: bool, seed: int, epoch: int) -> Tensor:
        sampler = self._loader.sampler
        if not shuffle or isinstance(sampler, RandomSampler | SequentialSampler):
            return visiting_order(len(self), shuffle=shuffle, seed=seed, epoch=epoch)
        with randomness(fresh_states(mixed(seed, epoch, "order"))):
            drawn = torch.tensor(list(sampler), dtype=torch.int64)
        if self._places is None:
            return drawn
        place_of = torch.full((len(self._loader.dataset),), -1)  # type: ignore[arg-type]
        place_of[self._places] = torch.arange(len(self))
        own = place_of[drawn]
        return own[own >= 0]


class StreamSplit:
    """Batches from an iterable, or from a function that gives one, in their own order.

    They are cut anew to the size asked for. `shuffle` and `augment` are the iterable's own affair.
    It is read through once to count, and its beginning twice to see that it repeats.
    """

    def __init__(self, name: str, source: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        self.name = name
        self._open: Callable[[], Iterable[Any]] = source if callable(source) else lambda: source
        first = self._require_repeatable()
        digest, self._count = hashlib.sha256(), 0
        for inputs, targets in self._pairs(0):
            digest.update(_hashed(len(inputs), inputs[:1], targets).encode())
            self._count += len(inputs)
        self.fingerprint = digest.hexdigest()
        """A hash of all labels and of each batch's first input, in their order."""
        if name != "train" and not torch.equal(first, self._first_inputs()):
            raise DataError(
                f"{name} gives other examples when it is read again: turn its shuffling off, so "
                "that two models are compared on the same examples"
            )

    def __len__(self) -> int:
        return self._count

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
        """See `attar.data.base.Split`; order and augmentation are the iterable's."""
        places = torch.arange(len(self))
        cut = _cut(self._pairs(mixed(seed, epoch, "stream")), batch_size)
        for (inputs, targets), own in zip(cut, places.split(batch_size), strict=False):
            if len(own) < batch_size and drop_last:
                return
            if len(own[rank::world]):
                yield Batch(inputs[rank::world], targets[rank::world], own[rank::world])

    def pick(self, indices: Sequence[int]) -> Batch:
        """The examples at these places; reads up to the last of them."""
        places = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in self.batches(COUNTING_BATCH):
            assert batch.targets is not None
            wanted = {int(p) for p in places} & set(batch.indices.tolist())
            start = int(batch.indices[0])
            found |= {i: (batch.inputs[i - start], batch.targets[i - start]) for i in wanted}
            if len(found) == len(set(places.tolist())):
                break
        inputs, targets = zip(*(found[int(p)] for p in places), strict=True)
        return Batch(torch.stack(inputs), torch.stack(targets), places)

    def _pairs(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in reproducibly(self._open(), seed):
            yield _pair(batch, self.name)

    def _first_inputs(self) -> Tensor:
        pairs = self._pairs(0)
        try:
            return next(pairs)[0]
        except StopIteration:
            raise DataError(f"{self.name} gives no examples") from None
        finally:
            pairs.close()  # type: ignore[attr-defined]

    def _require_repeatable(self) -> Tensor:
        opened = self._open()
        if not isinstance(opened, Iterable):
            raise DataError(f"{self.name} is a {type(opened).__name__}, which holds no batches")
        if isinstance(opened, Iterator) and opened is self._open():
            raise DataError(
                f"{self.name} is an iterator, which can be read only once: hand in a DataLoader, a "
                "list, or a function that gives a fresh iterator"
            )
        return self._first_inputs()


def _pair(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """A batch's inputs, float32 where they are not token ids, and its labels, int64 (N,)."""
    inputs, targets = _entries(batch, where)
    inputs, targets = torch.as_tensor(inputs), torch.as_tensor(targets)
    if inputs.is_floating_point() or inputs.dtype == torch.uint8:
        inputs = inputs.float()
    if not inputs.ndim or targets.numel() != len(inputs):
        raise DataError(
            f"{where} gives inputs of shape {tuple(inputs.shape)} with labels of shape "
            f"{tuple(targets.shape)}: one label an input was expected"
        )
    return inputs, targets.reshape(-1).to(torch.int64)


def _entries(batch: Any, where: str) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        keys = [next((k for k in names if k in batch), None) for names in (INPUTS, TARGETS)]
        if None not in keys:
            return batch[keys[0]], batch[keys[1]]
        raise DataError(
            f"{where} gives dicts with {', '.join(map(str, batch))}; expected are an input "
            f"({', '.join(INPUTS)}) and a label ({', '.join(TARGETS)})"
        )
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise DataError(
        f"{where} gives {type(batch).__name__}s"
        + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        + " where (inputs, targets) or a dict of them were expected"
    )


def _cut(pairs: Iterator[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same examples in batches of `size`; the last may be smaller."""
    held: list[tuple[Tensor, Tensor]] = []
    count = 0
    for pair in pairs:
        held.append(pair)
        count += len(pair[0])
        if count < size:
            continue
        inputs, targets = (torch.cat(part) for part in zip(*held, strict=True))
        whole = count - count % size
        yield from zip(inputs[:whole].split(size), targets[:whole].split(size), strict=True)
        count -= whole
        held = [(inputs[whole:], targets[whole:])] if count else []
    if held:
        inputs, targets = (torch.cat(part) for part in zip(*held, strict=True))
        yield inputs, targets


def _hashed(count: int, inputs: Tensor, targets: Tensor | None) -> str:
    digest = hashlib.sha256(repr((count, tuple(inputs.shape), inputs.dtype)).encode())
    digest.update(inputs.contiguous().numpy().data)
    if targets is not None:
        digest.update(targets.contiguous().numpy().data)
    return digest.hexdigest()


def _first(split: Split) -> Batch:
    return split.pick([0])


def _class_names(
    classes: int | Sequence[str] | None, train: Split
) -> tuple[tuple[str, ...], list[str]]:
    if classes is None:
        loader = getattr(train, "_loader", None)
        classes = getattr(getattr(loader, "dataset", None), "classes", None)
    if classes is None:
        largest = max(
            int(b.targets.max()) for b in train.batches(COUNTING_BATCH) if b.targets is not None
        )
        names = tuple(str(i) for i in range(largest + 1))
        return names, [f"The training labels run from 0 to {largest}: {len(names)} classes."]
    if isinstance(classes, int):
        return tuple(str(i) for i in range(classes)), []
    return tuple(str(c) for c in classes), []


def _require_labels(split: Split, count: int) -> None:
    """Looks at the first examples: labels out of range are mostly so from the start."""
    targets = next(split.batches(COUNTING_BATCH)).targets
    if targets is None or not len(targets):
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= count:
        raise UsageError(
            f"{split.name} has the label {low if low < 0 else high}, but there are {count} classes"
        )
