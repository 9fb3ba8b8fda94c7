"""Where a tensor's zeros are: alike everywhere, or denser in some rows or columns.

Read as a matrix (first axis by the others), a row at a time, after how many weights each row has,
about: how probable one is at a place follows from that, and from how many the earlier rows have
there and beside it. What it means is learnt on the way, so nothing is stored for it. Read by
columns it is the same the other way round.
"""

from __future__ import annotations

from math import prod

import numpy as np

from attar.student.packed.ans import BLOCK, Reader, Writer
from attar.student.packed.damage import damaged
from attar.student.packed.models import Models, Symbols, as_codes, as_counts
from attar.student.packed.slices import FLAG
from attar.student.packed.tables import table_of

ALIKE, BY_ROWS, BY_COLUMNS, ORDERS = 0, 1, 2, 3
SCALE = 12
LEVELS = 2 * SCALE
"""Levels of density: a share of `2 ** SCALE`, in half octaves."""
UNSEEN = 2
"""What a place counts of which nothing is known; a weight there counts 2, one beside it 1."""
FIRST = 4
"""What a level's own share counts at first, in flags."""
TRIED = 1 << 18
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
            changed = models.copy()
            _write_rows(fork, np.ascontiguousarray(matrix), changed)
            if fork.bits < best.bits:
                best, kept = fork, changed
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
        return _read_rows(reader, rows, columns, models).reshape(shape)
    return np.ascontiguousarray(_read_rows(reader, columns, rows, models).T).reshape(shape)


def uneven(flags: np.ndarray) -> bool:
    """Whether some rows or columns are so much denser that it pays to look at them."""
    flat = flags.reshape(len(flags), -1)
    return _promises(flat) or _promises(flat.T)


def _promises(matrix: np.ndarray) -> bool:
    """Whether columns may differ by more than chance: in a large tensor, by what their densities
    would save."""
    rows, columns = matrix.shape
    if rows < 4 or not 1 < columns < BLOCK:
        return False
    if matrix.size <= TRIED:
        return True
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
    """What the rows so far, and how many weights the next one has, say of it."""

    def __init__(self, columns: int) -> None:
        self._seen = np.zeros(columns + 2, np.int64)
        share = np.maximum(as_counts(np.arange(LEVELS), 1), 1)
        share = np.minimum(share, (1 << SCALE) - 1)
        self._counts = FIRST * np.stack([(1 << SCALE) - share, share], 1)
        self._levels = np.zeros(columns, np.int64)

    def tables(self, dense: int) -> np.ndarray:
        """Each column's table of zero and not, (columns, 2). dense: about how many the row has."""
        seen = self._seen
        beside = 2 * seen[1:-1] + seen[:-2] + seen[2:] + UNSEEN
        share = (beside * dense << SCALE) // (4 * int(seen.sum()) + UNSEEN * len(beside))
        self._levels = as_codes(np.minimum(share, (1 << SCALE) - 1), 1)
        return table_of(self._counts)[self._levels]

    def saw(self, row: np.ndarray) -> None:
        """row: 0 or 1 each."""
        np.add.at(self._counts, (self._levels, row.astype(np.int64)), 1 << SCALE)
        self._seen[1:-1] += row


def _write_rows(writer: Writer, matrix: np.ndarray, models: Models) -> None:
    codes = as_codes(np.count_nonzero(matrix, axis=1), 1)
    places = np.arange(int(codes.max()) + 1)
    writer.number("densest", int(codes.max()))
    models.write(writer, Symbols.of(codes, places))
    densities = _Densities(matrix.shape[1])
    for row, dense in zip(matrix.view(np.uint8), as_counts(codes, 1).tolist(), strict=True):
        writer.each(row, densities.tables(dense))
        densities.saw(row)


def _read_rows(reader: Reader, rows: int, columns: int, models: Models) -> np.ndarray:
    densest = reader.number("densest")
    if densest > as_codes(np.array(columns), 1):
        raise damaged("a row of weights has more than there is room for")
    places = np.arange(densest + 1)
    codes = models.read(reader, rows, places, places)
    densities = _Densities(columns)
    found = np.zeros((rows, columns), np.uint8)
    for row, dense in zip(found, as_counts(codes, 1).tolist(), strict=True):
        row[:] = reader.each(densities.tables(dense))
        densities.saw(row)
    return found.astype(bool)
