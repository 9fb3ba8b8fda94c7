"""Tensors one after another: type, shape and elements of each, and which of them are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from attar.errors import CheckpointError
from attar.student.packed.ans import Reader, Writer
from attar.student.packed.damage import damaged
from attar.student.packed.elements import NAMES, PLACES, Elements, width_of
from attar.student.packed.forms import Block, read_block, write_block
from attar.student.packed.models import Models
from attar.student.packed.rows import Steps

RECENT = 15
"""Dimensions that are referred to rather than written again."""
MOST_DIMENSIONS = 64


class Stored(NamedTuple):
    """How a tensor is stored: its form, and its bits as they are counted while it is written."""

    form: str
    bits: float
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return prod(self.shape)


class Hint(NamedTuple):
    """What is known of a tensor. run: how many elements in a row are one of a few vectors. steps:
    what the elements may be multiples of."""

    run: int = 1
    steps: Steps | None = None


class _Shapes:
    """Dimensions as most of them are: the same as one not long ago."""

    def __init__(self) -> None:
        self._recent: list[int] = []

    def write(self, writer: Writer, shape: tuple[int, ...]) -> None:
        writer.symbol("dimensions", min(len(shape), 7), 8)
        if len(shape) >= 7:
            writer.number("dimensions", len(shape))
        for size in shape:
            known = size in self._recent
            place = self._recent.index(size) if known else RECENT
            writer.symbol("dimension", place, RECENT + 1)
            if not known:
                writer.number("dimension", size)
            self._note(size)

    def read(self, reader: Reader) -> tuple[int, ...]:
        count = reader.symbol("dimensions", 8)
        if count == 7:
            count = reader.number("dimensions")
        if count > MOST_DIMENSIONS:
            raise damaged(f"it has a tensor of {count} dimensions")
        shape = []
        for _ in range(count):
            place = reader.symbol("dimension", RECENT + 1)
            if place < RECENT and place >= len(self._recent):
                raise damaged("it refers to a dimension that isn't there")
            size = self._recent[place] if place < RECENT else reader.number("dimension")
            shape.append(size)
            self._note(size)
        return tuple(shape)

    def _note(self, size: int) -> None:
        others = [other for other in self._recent if other != size]
        self._recent = [size, *others][:RECENT]


def write_tensors(
    writer: Writer, tensors: Sequence[Elements], hints: Sequence[Hint]
) -> list[Stored]:
    """Notes the tensors, and says how each is stored. hints: what is known of each."""
    shapes, models, stored = _Shapes(), Models(), []
    known: list[Elements] = []
    for elements, hint in zip(tensors, hints, strict=True):
        before = writer.bits
        twin = _twin(known, elements)
        if known:
            writer.symbol("same", int(twin is not None), 2)
        if twin is not None:
            writer.number("same as", len(known) - 1 - twin)
            form = "same"
        else:
            writer.symbol("type", NAMES.index(elements.type), PLACES)
            shapes.write(writer, elements.shape)
            block = Block(elements.type, elements.bits, elements.shape, hint.run, hint.steps)
            form = write_block(writer, block, models)
        if form == "rows" and hint.steps:
            known.append(hint.steps.elements())
        known.append(elements)
        stored.append(Stored(form, writer.bits - before, elements.shape))
    return stored


def read_tensors(reader: Reader, count: int, limit: int) -> Iterator[Elements]:
    """The tensors, in turn. limit: bytes that they may take together.

    Raises `CheckpointError` before more is allocated, and for what can't be.
    """
    shapes, models = _Shapes(), Models()
    found: list[Elements] = []
    taken = 0
    for _ in range(count):
        if found and reader.symbol("same", 2):
            back = reader.number("same as")
            if back >= len(found):
                raise damaged("it refers to a tensor that isn't there")
            found.append(found[-1 - back])
            yield found[-1]
            continue
        number = reader.symbol("type", PLACES)
        if number >= len(NAMES):
            raise damaged("it has a tensor of unknown type")
        kind = NAMES[number]
        shape = shapes.read(reader)
        taken += prod(size or 1 for size in shape) * width_of(kind)
        if taken > limit:
            raise CheckpointError(
                f"the packed student's tensors take {taken:,} bytes or more, over the limit of "
                f"{limit:,}: it is damaged, or belongs to another network"
            )
        steps: list[Elements] = []
        bits = read_block(reader, kind, shape, models, beside=steps)
        taken += sum(each.bits.nbytes for each in steps)
        found += [*steps, Elements(kind, shape, bits)]
        yield found[-1]
    reader.finish()


def _twin(earlier: Sequence[Elements], elements: Elements) -> int | None:
    """The place of an equal tensor of at least two elements, as tied ones are."""
    if elements.bits.size < 2:
        return None
    for place, other in enumerate(earlier):
        alike = (other.type, other.shape) == (elements.type, elements.shape)
        if alike and _equal(other.bits, elements.bits):
            return place
    return None


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """The few first ones tell most apart."""
    return np.array_equal(first[:64], second[:64]) and np.array_equal(first, second)
