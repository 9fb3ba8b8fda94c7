"""The few values that a tensor's elements take: as multiples of one step, or each as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attar.student.packed.ans import Reader, Writer
from attar.student.packed.damage import damaged
from attar.student.packed.elements import by_value, width_of
from attar.student.packed.grid import LARGEST, find_grid, on_grid, trailing

LISTED, STEPPED, KINDS = 0, 1, 2
LIMIT = 4096
"""More different values are no codebook."""
SORTED = 1 << 14
SAMPLE = 4096
PIECE = 1 << 15
MINUS_ZERO = 1 << 31
BOTH = 2
"""Of zeros: those with a plus and those with a minus; 0 stands for plus alone, 1 for minus."""


@dataclass(frozen=True)
class Codebook:
    """values: the elements' bits, (k,), in the order of what they stand for. places: int64 (k,),
    rising (both zeros are at 0): where on the line each lies, in steps, or just its rank. step: of
    the grid, if there is one."""

    values: np.ndarray
    places: np.ndarray
    step: np.float32 | None = None

    @classmethod
    def of(cls, kind: str, values: np.ndarray) -> Codebook:
        """A type's different elements, in any order, as bits."""
        values = values[np.argsort(by_value(kind, values), kind="stable")]
        if kind != "float32":
            return cls(values, _ranks(len(values)))
        negative = np.flatnonzero(values == MINUS_ZERO)  # rounding to a grid makes them, too
        floats = values.view(np.float32)
        grid = find_grid(np.unique(floats))
        if grid is None:
            return cls(values, _ranks(len(values)))
        places = grid.places
        if len(negative) and len(places) < len(values):
            places = np.insert(places, negative, 0)
        return cls(values, places, grid.step)

    def filled(self) -> tuple[Codebook, np.ndarray] | None:
        """The codebook with the multiples that no weight takes, from the least to the largest, and
        where its own values are in it; `None` where that is hardly shorter to say."""
        low, high = int(self.places[0]), int(self.places[-1])
        size = high - low + 1
        both = len(np.unique(self.places)) < len(self.places)
        if self.step is None or both or not len(self.places) < size <= 4 * len(self.places) + 16:
            return None
        places = np.arange(low, high + 1)
        values = on_grid(self.step, places).view(np.uint32)
        values[self.places - low] = self.values
        return Codebook(values, places, self.step), self.places - low

    def write(self, writer: Writer) -> None:
        writer.number("codebook size", len(self.values) - 1)
        kind = LISTED if self.step is None else STEPPED
        if self.values.itemsize == 4:
            writer.symbol("codebook", kind, KINDS)
        if self.step is None:
            for value in self.values.tolist():
                writer.raw(value, 8 * self.values.itemsize)
            return
        _write_step(writer, self.step)
        signs = self.values[self.places == 0] == MINUS_ZERO
        writer.symbol("zeros", len(signs) if signs.any() else 0, 3)
        different = np.unique(self.places)
        first = int(different[0])
        writer.symbol("below zero", int(first < 0), 2)
        writer.number("first place", abs(first))
        gaps = np.diff(different) - 1
        if len(gaps):
            writer.symbol("gaps", int(gaps.any()), 2)
        for gap in gaps.tolist() if gaps.any() else ():
            writer.number("gap", gap)

    @classmethod
    def read(cls, reader: Reader, kind: str) -> Codebook:
        size = reader.number("codebook size") + 1
        if size > LIMIT:
            raise damaged(f"it has a codebook of {size} values")
        width = width_of(kind)
        if width != 4 or reader.symbol("codebook", KINDS) == LISTED:
            listed = [reader.raw(8 * width) for _ in range(size)]
            return cls(np.array(listed, f"u{width}"), _ranks(size))
        step, zeros = _read_step(reader), reader.symbol("zeros", 3)
        sign = -1 if reader.symbol("below zero", 2) else 1
        place = sign * reader.number("first place")
        places = [place]
        count = size - 1 - (zeros == BOTH)
        gaps = reader.symbol("gaps", 2) if count else 0
        for _ in range(count):
            place += 1 + (reader.number("gap") if gaps else 0)
            places.append(place)
        if max(abs(places[0]), abs(places[-1])) > LARGEST:
            raise damaged("its values lie too far from zero")
        found = np.array(places, np.int64)
        values = on_grid(step, found).view(np.uint32)
        if zeros:
            at = int(np.searchsorted(found, 0))
            if at == len(found) or found[at]:
                raise damaged("it has a negative zero, and no zero")
            if zeros == BOTH:
                found, values = np.insert(found, at, 0), np.insert(values, at, MINUS_ZERO)
            values[at] = MINUS_ZERO
        return cls(values, found, step)


def _write_step(writer: Writer, step: np.float32) -> None:
    """A positive float32: its exponent, and its mantissa up to the last bit that isn't zero."""
    bits = int(step.view(np.uint32))
    writer.symbol("exponent", bits >> 23, 256)
    zeros = trailing(step)
    writer.symbol("trailing zeros", zeros, 24)
    writer.raw((bits & (1 << 23) - 1) >> zeros, 23 - zeros)


def _read_step(reader: Reader) -> np.float32:
    exponent, zeros = reader.symbol("exponent", 256), reader.symbol("trailing zeros", 24)
    bits = exponent << 23 | reader.raw(23 - zeros) << zeros
    return np.uint32(bits).view(np.float32)


def _ranks(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int64) - size // 2


def few_values(kind: str, bits: np.ndarray) -> tuple[Codebook, np.ndarray] | None:
    """The codebook of a tensor's elements and their indices into it, uint8 or uint16 (n,); `None`
    where they take more than `LIMIT` values, or most of many are values of their own."""
    found = _by_sorting(bits) if len(bits) <= SORTED else _by_lookup(bits)
    if found is None or len(found[0]) > max(256, len(bits) // 2):
        return None
    values, indices = found
    codebook = Codebook.of(kind, values)
    place = np.empty(len(values), indices.dtype)
    order = np.argsort(values)
    place[order[np.searchsorted(values[order], codebook.values)]] = np.arange(len(values))
    return codebook, place.take(indices, mode="clip")


def _by_sorting(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The different elements, and each one's place among them."""
    values, indices = np.unique(bits, return_inverse=True)
    return (values, _small(indices, len(values))) if len(values) <= LIMIT else None


def _by_lookup(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The same for many: by a table of those that a sample has, and those that come up."""
    values = np.unique(bits[:: len(bits) // SAMPLE])
    if 4 * len(values) > SAMPLE:
        return None
    lookup = _Lookup(values)
    indices = np.empty(len(bits), np.uint16)
    for start in range(0, len(bits), PIECE):
        piece, place = bits[start : start + PIECE], indices[start : start + PIECE]
        lookup.find(piece, place)
        wrong = lookup.values.take(place, mode="clip") != piece
        if wrong.any():
            values = np.append(lookup.values, np.unique(piece[wrong]))
            if len(values) > LIMIT:
                return None
            lookup = _Lookup(values)
            lookup.find(piece, place)
    return lookup.values, _small(indices, len(lookup.values))


def _small(indices: np.ndarray, size: int) -> np.ndarray:
    return indices.astype(np.uint8 if size <= 256 else np.uint16)


class _Lookup:
    """Places of elements among a few known ones, by a hash that tells these apart."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._width = 8 * values.itemsize
        self._factor, self._kept = self._hash()
        self._table = np.zeros(1 << self._kept, np.uint16)
        self._table[self._hashed(values)] = np.arange(len(values))

    def find(self, bits: np.ndarray, places: np.ndarray) -> None:
        """Fills in the places; those of unknown elements are wrong."""
        self._table.take(self._hashed(bits), out=places, mode="clip")

    def _hash(self) -> tuple[int, int]:
        if self._width <= 16:
            return 1, self._width
        for kept in range(max(8, 2 * (len(self.values) - 1).bit_length()), 25):
            for seed in range(8):
                factor = (0x9E3779B97F4A7C15 * (2 * seed + 1) >> 64 - self._width) | 1
                factor &= (1 << self._width) - 1
                self._factor, self._kept = factor, kept
                if len(np.unique(self._hashed(self.values))) == len(self.values):
                    return factor, kept
        raise AssertionError("no hash tells the values apart")

    def _hashed(self, bits: np.ndarray) -> np.ndarray:
        if self._width <= 16:
            return bits
        product: np.ndarray = bits * bits.dtype.type(self._factor)
        return product >> bits.dtype.type(self._width - self._kept)
