"""Finding that a tensor has only a few different values, or would but for factors of its rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-6
"""How far, of itself, a product may be from what another order of its factors would make it."""


@dataclass(frozen=True)
class FewValues:
    """A tensor as `values[indices]`, in runs, times a factor, its dimensions turned.

    values: (k,), or (k, length) where runs of so many contiguous values are one entry. indices:
    (count,). shape: of the tensor before it is turned. factor: of a number of dimensions that
    multiplies the tensor after it is turned; `None`: none. turned: whether the two dimensions
    change places.
    """

    values: np.ndarray
    indices: np.ndarray
    shape: tuple[int, ...]
    factor: np.ndarray | None = None
    turned: bool = False

    @property
    def bits(self) -> int:
        """What an index takes."""
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def bytes(self) -> int:
        """What the numbers take, without names and nodes."""
        factor = 0 if self.factor is None else self.factor.nbytes
        return -(-len(self.indices) * self.bits // 8) + self.values.nbytes + factor


def few_values(
    array: np.ndarray, own: Mapping[str, np.ndarray], lengths: Collection[int] = ()
) -> FewValues | None:
    """The smallest of the ways to have a tensor by few values; `None` where it has many.

    own: the network's weights by path, of which the tensor may be one with its rows multiplied, as
    folding a batch norm does. lengths: of runs that may be one entry of a codebook.

    Example:
        >>> found = few_values(np.float32([[1, 2], [2, 1]]), {})
        >>> found.values[found.indices].tolist()
        [1.0, 2.0, 2.0, 1.0]
    """
    ways = list(_ways(array, None, lengths))
    # Its rows multiplied, a tensor has more values than before.
    if array.dtype == np.float32 and all(2 * way.bytes > array.nbytes // 4 for way in ways):
        for weight in _alike(array, own):
            factor = _factor(array, weight)
            if factor is not None:
                ways += _ways(weight, factor, lengths)
                break
    return min(ways, key=lambda way: way.bytes, default=None)


def _ways(
    array: np.ndarray, factor: np.ndarray | None, lengths: Collection[int]
) -> Iterator[FewValues]:
    yield _entries(array, 1, factor)
    for length in sorted(set(lengths) - {1}):
        if array.size % length:
            continue
        yield _entries(array, length, factor)
        if array.ndim == 2:
            yield _entries(array.T, length, factor, turned=True)


def _entries(
    array: np.ndarray, length: int, factor: np.ndarray | None, *, turned: bool = False
) -> FewValues:
    # Compared as bytes, 0.0 and -0.0 stay apart, and NaN is equal to itself.
    runs = np.ascontiguousarray(array).reshape(-1, length)
    size = runs.dtype.itemsize
    keys = runs.view(f"u{size}" if length == 1 else np.dtype((np.void, size * length))).ravel()
    _, first, indices = np.unique(keys, return_index=True, return_inverse=True)
    values = runs[first]
    return FewValues(
        values.ravel() if length == 1 else values, indices.ravel(), array.shape, factor, turned
    )


def _alike(array: np.ndarray, own: Mapping[str, np.ndarray]) -> Iterable[np.ndarray]:
    """The weights that have the tensor's shape, as they are or turned."""
    for weight in own.values():
        if weight.shape == array.shape:
            yield weight
        if weight.ndim == 2 and weight.T.shape == array.shape:
            yield weight.T


def _factor(array: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """What multiplies the weight along one of its first two dimensions to make the tensor."""
    for axis in range(min(2, array.ndim)):
        rows, plain = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (array, weight))
        factor = _row_factors(rows, plain)
        if factor is not None:
            shape = [-1 if i == axis else 1 for i in range(axis, array.ndim)]
            return factor.reshape(shape)
    return None


def _row_factors(rows: np.ndarray, plain: np.ndarray) -> np.ndarray | None:
    """A factor a row, (rows,), which makes it bit for bit where there is such a one."""
    places = np.abs(plain).argmax(1)[:, None]
    top, below = (np.take_along_axis(a, places, 1).astype(np.float64) for a in (rows, plain))
    near = np.divide(top, below, out=np.ones_like(top), where=below != 0).astype(np.float32)
    if not np.allclose(plain * near, rows, rtol=ROUNDING, atol=0):
        return None
    best, missed = near, (plain * near != rows).sum(1)
    for direction in (-np.inf, np.inf):
        tried = near
        for _ in range(2):
            tried = np.nextafter(tried, np.float32(direction))
            wrong = (plain * tried != rows).sum(1)
            best = np.where((wrong < missed)[:, None], tried, best)
            missed = np.minimum(missed, wrong)
    return best.ravel()
