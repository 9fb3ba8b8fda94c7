"""Where a tensor's zeros are: alike everywhere, or denser in some rows or columns.

Read as a matrix (first axis by the others), a row at a time: how probable a weight is at a place
follows from how many the earlier rows have there and beside it. What that means is learnt on the
way, so nothing is stored for it. Read by columns it is the same the other way round.
"""

from __future__ import annotations

from math import prod

import numpy as np

from attar.student.packed.ans import BLOCK, Reader, Writer
from attar.student.packed.models import Models, Symbols
from attar.student.packed.slices import FLAG
from attar.student.packed.tables import table_of

ALIKE, BY_ROWS, BY_COLUMNS, ORDERS = 0, 1, 2, 3
SCALE = 6
LEVELS = SCALE + 2
DEPTHS = 12
"""Levels of density where there is any; where there is none, of how many rows say so."""
GAIN = 0.02
"""Share of its bits that looking at rows or columns must promise: it takes its time."""


def write_zeros(writer: Writer, flags: np.ndarray, models: Models) -> None:
    """flags: bool, true where a weight isn't zero."""
    flat = flags.reshape(len(flags), -1)
    ones = np.count_nonzero(flat)
    counts = np.array([flat.size - ones, ones])
    best, kept = writer.fork(), models.copy()
    best.symbol("order", ALIKE, ORDERS)
    best.symbol("zeros", int(counts[0] > 0), 2)
    if counts[0]:  # not all of them came in whole slices
        kept.write(best, Symbols(flat.ravel().view(np.uint8), FLAG, counts))
    for order, matrix in ((BY_ROWS, flat), (BY_COLUMNS, flat.T)):
        if counts[0] and _promises(matrix):
            fork = writer.fork()
            fork.symbol("order", order, ORDERS)
            _write_rows(fork, np.ascontiguousarray(matrix))
            if fork.bits < best.bits:
                best, kept = fork, models.copy()
    writer.adopt(best)
    models.known = kept.known


def read_zeros(reader: Reader, shape: tuple[int, ...], models: Models) -> np.ndarray:
    """The flags, of the tensor's shape."""
    order = reader.symbol("order", ORDERS)
    if order == ALIKE:
        if not reader.symbol("zeros", 2):
            return np.ones(shape, bool)
        return models.read(reader, prod(shape), FLAG, FLAG.astype(bool)).reshape(shape)
    rows, columns = shape[0], prod(shape[1:])
    if order == BY_ROWS:
        return _read_rows(reader, rows, columns).reshape(shape)
    return np.ascontiguousarray(_read_rows(reader, columns, rows).T).reshape(shape)


def uneven(flags: np.ndarray) -> bool:
    """Whether some rows or columns are so much denser that it pays to look at them."""
    flat = flags.reshape(len(flags), -1)
    return _promises(flat) or _promises(flat.T)


def _promises(matrix: np.ndarray) -> bool:
    """Whether columns differ by more than chance, in what their densities save."""
    rows, columns = matrix.shape
    if rows < 4 or not 1 < columns < BLOCK:
        return False
    dense = np.count_nonzero(matrix, axis=0)
    alike = matrix.size * float(_entropy(dense.sum() / matrix.size))
    learnt = np.minimum(np.log2(rows), 2 * dense + 1).sum() / 2
    apart = rows * float(_entropy(dense / rows).sum()) + learnt
    return bool(apart < (1 - GAIN) * alike)


def _entropy(share: np.ndarray) -> np.ndarray:
    inside = np.clip(share, 1e-12, 1 - 1e-12)
    bits: np.ndarray = -(inside * np.log2(inside) + (1 - inside) * np.log2(1 - inside))
    return bits


class _Densities:
    """What the rows so far say of the next one."""

    def __init__(self, columns: int) -> None:
        self._seen = np.zeros(columns + 2, np.int64)
        self._rows = 0
        self._counts = np.ones((LEVELS + DEPTHS, 2), np.int64)
        self._levels = np.zeros(columns, np.int64)

    def tables(self) -> np.ndarray:
        """Each column's table of zero and not, (columns, 2)."""
        seen = self._seen
        beside = 2 * seen[1:-1] + seen[:-2] + seen[2:]
        depth = LEVELS + min(self._rows.bit_length(), DEPTHS - 1)
        share = (beside << SCALE) // (4 * max(self._rows, 1))
        lengths = np.frexp(share.astype(np.float64))[1]
        self._levels = np.where(beside > 0, lengths, depth)
        return table_of(self._counts)[self._levels]

    def saw(self, row: np.ndarray) -> None:
        """row: 0 or 1 each."""
        np.add.at(self._counts, (self._levels, row.astype(np.int64)), 2)
        self._seen[1:-1] += row
        self._rows += 1


def _write_rows(writer: Writer, matrix: np.ndarray) -> None:
    densities = _Densities(matrix.shape[1])
    for row in matrix.view(np.uint8):
        writer.each(row, densities.tables())
        densities.saw(row)


def _read_rows(reader: Reader, rows: int, columns: int) -> np.ndarray:
    densities = _Densities(columns)
    found = np.zeros((rows, columns), np.uint8)
    for row in found:
        row[:] = reader.each(densities.tables())
        densities.saw(row)
    return found.astype(bool)
