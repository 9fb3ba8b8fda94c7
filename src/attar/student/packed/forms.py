"""The forms in which a tensor's elements are stored, whichever is smallest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from attar.student.packed.ans import Reader, Writer
from attar.student.packed.codebook import Codebook, few_values
from attar.student.packed.elements import Elements, is_float, width_of
from attar.student.packed.models import Models, Symbols, flat_bits

CONSTANT, PLANES, CODEBOOK = 0, 1, 2
FORMS = ("constant", "planes", "codebook")
QUARTER = 2
"""Bits a byte: planes hardly ever come to less."""
SIDE = 24
"""Bits that a plane's range and table take at least."""


class Context(NamedTuple):
    """What the tensors of a file share: the tables seen so far."""

    models: Models


def write_elements(writer: Writer, elements: Elements, context: Context) -> str:
    """Notes a tensor's elements in the cheapest form, and returns its name."""
    if not elements.bits.size:
        return "empty"
    ways = list(_ways(writer, elements, context))
    best, form, models = min(ways, key=lambda way: way[0].bits)
    writer.adopt(best)
    context.models.known = models.known
    return FORMS[form]


def read_elements(reader: Reader, kind: str, count: int, context: Context) -> np.ndarray:
    """The elements' bits, (count,)."""
    if not count:
        return np.empty(0, f"u{width_of(kind)}")
    form = reader.symbol("form", len(FORMS))
    if form == CONSTANT:
        return np.full(count, read_constant(reader, kind))
    if form == PLANES:
        return read_planes(reader, kind, count, context.models)
    codebook = Codebook.read(reader, kind)
    return context.models.read(reader, count, codebook.places, codebook.values)


def _ways(
    writer: Writer, elements: Elements, context: Context
) -> Iterator[tuple[Writer, int, Models]]:
    bits = elements.bits

    def begun(form: int) -> tuple[Writer, Models]:
        fork = writer.fork()
        fork.symbol("form", form, len(FORMS))
        return fork, context.models.copy()

    if (bits == bits[0]).all():
        fork, models = begun(CONSTANT)
        write_constant(fork, elements.type, int(bits[0]))
        yield fork, CONSTANT, models
        return
    found = few_values(elements.type, bits)
    if found is not None:
        fork, models = begun(CODEBOOK)
        codebook, indices = found
        codebook.write(fork)
        models.write(fork, Symbols.of(indices, codebook.places))
        yield fork, CODEBOOK, models
        if fork.bits < QUARTER * bits.nbytes:
            return
    if found is None or len(bits) <= 1 << 14:
        fork, models = begun(PLANES)
        write_planes(fork, elements.type, bits, models)
        yield fork, PLANES, models


# --- constant


def write_constant(writer: Writer, kind: str, value: int) -> None:
    """One element: short where it is a small integer, or a float with few bits."""
    width = 8 * width_of(kind)
    zeros = (value & -value).bit_length() - 1 if value else width
    if is_float(kind):
        writer.symbol("zero bits", zeros, width + 1)
        writer.raw(value >> zeros, width - zeros)
        return
    length = value.bit_length()
    writer.symbol("integer bits", length, width + 1)
    writer.raw(value, length)


def read_constant(reader: Reader, kind: str) -> np.generic:
    width = 8 * width_of(kind)
    if is_float(kind):
        zeros = reader.symbol("zero bits", width + 1)
        value = reader.raw(width - zeros) << zeros if zeros < width else 0
    else:
        value = reader.raw(reader.symbol("integer bits", width + 1))
    found: np.generic = np.dtype(f"u{width_of(kind)}").type(value)
    return found


# --- planes


def write_planes(writer: Writer, kind: str, bits: np.ndarray, models: Models) -> None:
    """Byte by byte, highest first: all first bytes, all second ones. A float's sign is moved to the
    end, so that the first byte is its exponent."""
    turned = _turned(kind, bits)
    for place in reversed(range(bits.itemsize)):
        plane = (turned >> bits.dtype.type(8 * place)).astype(np.uint8)
        low, high = int(plane.min()), int(plane.max())
        symbols = Symbols.of(plane - plane.dtype.type(low), np.arange(high - low + 1))
        raw = writer.fork()
        raw.symbol("plane", 0, 2)
        raw.plain(plane)
        if flat_bits(symbols.counts) < raw.bits - SIDE:
            coded, kept = writer.fork(), models.copy()
            coded.symbol("plane", 1, 2)
            coded.raw(low, 8)
            coded.raw(high, 8)
            kept.write(coded, symbols)
            if coded.bits < raw.bits:
                writer.adopt(coded)
                models.known = kept.known
                continue
        writer.adopt(raw)


def read_planes(reader: Reader, kind: str, count: int, models: Models) -> np.ndarray:
    width = width_of(kind)
    turned = np.zeros(count, f"u{width}")
    for _ in range(width):
        if width > 1:
            turned <<= turned.dtype.type(8)
        if reader.symbol("plane", 2):
            low, high = reader.raw(8), reader.raw(8)
            values = np.arange(low, max(high, low) + 1).astype(np.uint8)
            turned |= models.read(reader, count, np.arange(len(values)), values)
        else:
            turned |= reader.plain(count)
    return _turned_back(kind, turned)


def _turned(kind: str, bits: np.ndarray) -> np.ndarray:
    """A float's sign last."""
    if not is_float(kind):
        return bits
    one, rest = bits.dtype.type(1), bits.dtype.type(8 * bits.itemsize - 1)
    return (bits << one) | (bits >> rest)


def _turned_back(kind: str, bits: np.ndarray) -> np.ndarray:
    if not is_float(kind):
        return bits
    one, rest = bits.dtype.type(1), bits.dtype.type(8 * bits.itemsize - 1)
    return (bits >> one) | (bits << rest)
