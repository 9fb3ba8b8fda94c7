"""Tables of integer frequencies: how probable each symbol is, to 24 bits, alike on any machine.

A table is int64 (k,): at least one for every symbol, `TOTAL` together. Probabilities are never
floats, so that another program finds the same table from the same numbers.
"""

from __future__ import annotations

import numpy as np

PRECISION = 24
TOTAL = 1 << PRECISION

Table = np.ndarray


def table_of(weights: np.ndarray) -> Table:
    """The table in proportion to integer weights: `1 + weight · (TOTAL - k) // sum` each, and what
    rounding leaves goes to the first of the largest weights.

    weights: int64, (..., k), not negative, not all zero; their sum below 2 ** 39.

    >>> table_of(np.array([3, 1, 0])).tolist()
    [12582910, 4194305, 1]
    """
    weights = np.asarray(weights, np.int64)
    free = TOTAL - weights.shape[-1]
    shares = weights * free // weights.sum(-1, keepdims=True)
    first = weights.argmax(-1, keepdims=True)
    left = free - shares.sum(-1, keepdims=True)
    np.put_along_axis(shares, first, np.take_along_axis(shares, first, -1) + left, -1)
    return shares + 1


def bits_of(table: Table) -> np.ndarray:
    """What each symbol costs under a table, in bits."""
    return PRECISION - np.log2(table)


def cost(counts: np.ndarray, table: Table) -> float:
    """What so many of each symbol cost, in bits."""
    return float(counts @ bits_of(table))


def paired(table: Table) -> Table:
    """The table of two symbols in a row, the first one's counting `k`."""
    return table_of((table[:, None] * table[None, :] >> PRECISION).ravel())
