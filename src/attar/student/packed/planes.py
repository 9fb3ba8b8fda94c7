"""Elements byte by byte, for tensors of many values."""

from __future__ import annotations

import numpy as np

from attar.student.packed.ans import Reader, Writer
from attar.student.packed.elements import is_float, width_of
from attar.student.packed.models import Models, Symbols, flat_bits

SIDE = 24
"""Bits that a plane's range and table take at least."""


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
