"""Symbols' low bits, apart from the high ones and as they are.

Weights on a fine grid are smooth: eight neighbouring values are about equally frequent. Then a
table for all of them says little that one for the eights doesn't, and takes the longer to search.
"""

from __future__ import annotations

import numpy as np

from attar.student.packed.ans import GROUPED_FROM, PAIRED_UP_TO, Reader, Writer

LOW_BITS = 16
LOSS = 1 / 1500
"""Of the symbols' entropy, that may be lost: one 1,500th."""


def spare_bits(counts: np.ndarray) -> int:
    """How many low bits of symbols that are counted so often say hardly anything: the most by which
    the code grows by no more than `LOSS`. 0 where there is little to gain in time.

    >>> spare_bits(np.full(256, 1000))
    8
    >>> spare_bits(np.full(16, 100_000))
    0
    """
    if counts.sum() < GROUPED_FROM or len(counts) <= PAIRED_UP_TO:
        return 0
    least = _information(counts)
    best = 0
    for bits in range(1, (len(counts) - 1).bit_length() + 1):
        if _information(grouped_counts(counts, bits)) + bits * counts.sum() > least * (1 + LOSS):
            break
        best = bits
    return best


def grouped_counts(counts: np.ndarray, bits: int) -> np.ndarray:
    """Of symbols without their low bits."""
    sums: np.ndarray = np.pad(counts, (0, -len(counts) % (1 << bits))).reshape(-1, 1 << bits).sum(1)
    return sums


def _information(counts: np.ndarray) -> float:
    """What the symbols say together, in bits."""
    some = counts[counts > 0]
    return float(some @ (np.log2(counts.sum()) - np.log2(some)))


def write_low(writer: Writer, symbols: np.ndarray, bits: int) -> None:
    """Bit by bit, the highest of the low ones first, that of eight symbols a byte."""
    for bit in reversed(range(bits)):
        flags = symbols >> symbols.dtype.type(bit) & symbols.dtype.type(1)
        writer.plain(np.packbits(flags.astype(np.uint8), bitorder="little"))


def read_low(reader: Reader, symbols: np.ndarray, bits: int) -> None:
    """Sets the low bits of symbols that have none yet."""
    low = np.zeros_like(symbols)
    for _ in range(bits):
        packed = reader.plain(-(-len(symbols) // 8))
        low += low  # far quicker than shifting
        low |= np.unpackbits(packed, count=len(symbols), bitorder="little")
    symbols |= low
