"""Many numbers sorted into few bins, with what a clustering needs to know of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BINS = 1 << 16
CHUNK = 1 << 17
"""How many numbers are worked on at once: few enough to stay in the processor's cache."""


class Histogram(NamedTuple):
    """Runs of sorted numbers, equal ones never apart.

    lows, highs: the smallest and the largest number of each bin, (m,), of the numbers' dtype.
    weight, first, second: sums up to each bin, float64 (m + 1,): of the weights, of the numbers
    less `centre` times the weights, of the squares of that difference times the weights.
    """

    lows: np.ndarray
    highs: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    second: np.ndarray
    centre: float

    @property
    def size(self) -> int:
        """How many bins there are."""
        return int(self.lows.size)

    def merged(self, edges: np.ndarray) -> Histogram:
        """The histogram of fewer bins: the runs between `edges`, rising, from 0 to `size`."""
        return Histogram(
            self.lows[edges[:-1]],
            self.highs[edges[1:] - 1],
            self.weight[edges],
            self.first[edges],
            self.second[edges],
            self.centre,
        )

    def cost(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The squared error of the bins [start, end), at least one, around their mean."""
        first = self.first[end] - self.first[start]
        squares = self.second[end] - self.second[start]
        return np.maximum(squares - first * first / (self.weight[end] - self.weight[start]), 0.0)

    def means(self) -> np.ndarray:
        """Each bin's mean, (m,); of one value, exactly itself."""
        means = np.diff(self.first) / np.diff(self.weight) + self.centre
        return np.clip(means, self.lows, self.highs)


def histogram(values: np.ndarray, weights: np.ndarray | None = None) -> Histogram:
    """The histogram of finite numbers, (n,), float32 or float64, at least one.

    weights: positive, (n,). Up to `BINS` distinct numbers have a bin each. More are put into about
    as many bins: half of them are as dense as the cube root of the numbers' density, as the values
    of a good quantizer are (Panter and Dite, *Quantization distortion in pulse-count modulation
    with nonuniform spacing of levels*, 1951); the others lie at equal counts and equal distances.

    Memory: a sorted copy of the numbers, and of the weights.

    Example:
        >>> histogram(np.array([2.0, 1.0, 2.0])).weight.tolist()
        [0.0, 1.0, 3.0]
    """
    ordered, masses = _sorted(values, weights)
    edges = _edges(ordered, masses)
    centre = float(ordered.mean(dtype=np.float64))
    sums = np.zeros((3, edges.size))
    for part, bins, starts in _parts(edges):
        centred = ordered[part] - np.float64(centre)
        mass = np.ones(centred.size) if masses is None else masses[part].astype(np.float64)
        for total, each in zip(sums, (mass, centred * mass, centred * centred * mass), strict=True):
            total[bins] += np.add.reduceat(each, starts)
    weight, first, second = np.cumsum(sums, axis=1)
    return Histogram(ordered[edges[:-1]], ordered[edges[1:] - 1], weight, first, second, centre)


def _parts(edges: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Chunks of the sorted numbers: where, which places of the sums they add to, and where, within
    the chunk, each of these begins."""
    for begin in range(0, int(edges[-1]), CHUNK):
        end = min(begin + CHUNK, int(edges[-1]))
        first = int(np.searchsorted(edges, begin, side="right"))
        last = int(np.searchsorted(edges, end))
        starts = np.maximum(edges[first - 1 : last], begin) - begin
        yield slice(begin, end), slice(first, last + 1), starts


def _sorted(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The numbers in order, and their weights. Processors sort plain numbers ten times faster than
    they rank them, so a float32 and its weight, rounded to one, are sorted as one integer."""
    if weights is None:
        return np.sort(values), None
    if values.dtype != np.float32:
        order = np.argsort(values)
        return values[order], weights[order]
    pairs = np.empty(values.size, dtype=np.int64)
    tiny = np.finfo(np.float32).tiny
    peak = float(weights.max())
    for begin in range(0, values.size, CHUNK):
        part = slice(begin, begin + CHUNK)
        mass = np.maximum(weights[part] / peak, tiny).astype(np.float32)
        pairs[part] = _swapped(values[part].view(np.int32))
        pairs[part] <<= 32
        pairs[part] |= mass.view(np.int32)
    pairs.sort()
    ordered, masses = np.empty_like(values), np.empty_like(values)
    for begin in range(0, values.size, CHUNK):
        part = slice(begin, begin + CHUNK)
        ordered[part] = _swapped((pairs[part] >> 32).astype(np.int32)).view(np.float32)
        masses[part] = pairs[part].astype(np.int32).view(np.float32)
    return ordered, masses


def _swapped(bits: np.ndarray) -> np.ndarray:
    """A float32's bits as an integer in the same order as the numbers; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _edges(ordered: np.ndarray, masses: np.ndarray | None) -> np.ndarray:
    """Where bins begin, never between equal numbers, then the end."""
    starts = _distinct(ordered)
    if starts is None:
        counts = np.linspace(0, ordered.size - 1, BINS // 4).astype(np.int64)
        grid = np.linspace(float(ordered[0]), float(ordered[-1]), BINS // 4)
        near = np.concatenate([ordered[counts], ordered[_dense(ordered, masses)], grid])
        starts = np.unique(np.searchsorted(ordered, np.sort(near).astype(ordered.dtype)))
    return np.append(starts, ordered.size)


def _distinct(ordered: np.ndarray) -> np.ndarray | None:
    """Where each distinct number begins; `None` where there are more than `BINS`."""
    found, count = [np.zeros(1, dtype=np.int64)], 1
    for begin in range(0, ordered.size - 1, CHUNK):
        part = ordered[begin : begin + CHUNK + 1]
        found.append(np.flatnonzero(part[1:] != part[:-1]) + begin + 1)
        count += found[-1].size
        if count > BINS:
            return None
    return np.concatenate(found)


def _dense(ordered: np.ndarray, masses: np.ndarray | None) -> np.ndarray:
    """Places as dense as the cube root of the numbers' density, seen in cells of equal count."""
    cuts = np.linspace(0, ordered.size - 1, BINS).astype(np.int64)
    widths = np.diff(ordered[cuts].astype(np.float64))
    counts = np.diff(cuts) * (1.0 if masses is None else masses[cuts[:-1]].astype(np.float64))
    steps = np.concatenate([[0.0], np.cumsum(np.cbrt(counts * widths**2))])
    return np.interp(np.linspace(0, steps[-1], BINS // 2), steps, cuts).astype(np.int64)
