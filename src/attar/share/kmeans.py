"""One-dimensional k-means, solved rather than approximated.

In one dimension the best clusters are runs of the sorted values, so a dynamic programme over the
places where one run ends and the next begins finds the optimum (Wang and Song, *Ckmeans.1d.dp*,
2011). The cost of a run comes from cumulative sums in constant time, and the best last boundary
never moves left as the run's end moves right, so each row of the table needs O(m log m) costs
(divide and conquer), done here a whole level at a time.

Up to `EDGES` distinct values every boundary is considered and the result is the optimum. Beyond,
boundaries are first chosen among `EDGES` places (half at equal counts, half at equal distances,
so that outliers have their own), then moved to where they belong among all values by Lloyd's rule.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EDGES = 4096


class Clustering(NamedTuple):
    """codebook: float64 (k,), rising. indices: int64, the values' shape, each one's place in the
    codebook. distortion: the (weighted) sum of squared differences."""

    codebook: np.ndarray
    indices: np.ndarray
    distortion: float


def kmeans(values: np.ndarray, k: int, weights: np.ndarray | None = None) -> Clustering:
    """The `k` numbers (fewer, where there are fewer distinct values) that stand for `values` with
    the least squared error.

    values: finite, any shape, at least one. weights: how much each one's error counts, positive.

    Example:
        >>> kmeans(np.array([1.0, 1.2, 5.0]), 2).codebook.round(6).tolist()
        [1.1, 5.0]
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    mass = np.ones_like(flat) if weights is None else np.asarray(weights, np.float64).ravel()
    order = np.argsort(flat)
    runs = _Runs(flat[order], mass[order])
    bounds = _solve(runs, runs.edges(), k)
    if len(bounds) - 1 == k and runs.distinct > EDGES:
        bounds = _settle(runs, bounds)
    means = runs.exact_means(bounds)
    ranks = np.repeat(np.arange(len(means)), np.diff(bounds))
    indices = np.empty(flat.size, dtype=np.int64)
    indices[order] = ranks
    distortion = float((mass * (flat - means[indices]) ** 2).sum())
    return Clustering(means, indices.reshape(np.shape(values)), distortion)


class _Runs:
    """Sorted values with cumulative sums: the cost of any run of them in constant time."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        self.values = values
        self._weights = weights
        self._centre = float(np.average(values, weights=weights))
        centred = values - self._centre
        self._weight = _cumulative(weights)
        self._first = _cumulative(weights * centred)
        self._second = _cumulative(weights * centred * centred)
        self._starts = np.flatnonzero(np.diff(values, prepend=-np.inf))
        self.distinct = self._starts.size

    def edges(self) -> np.ndarray:
        """Where runs may begin, then the end: never between equal values."""
        size = self.values.size
        if self.distinct <= EDGES:
            return np.append(self._starts, size)
        counts = np.linspace(0, size, EDGES // 2, endpoint=False).astype(np.int64)
        grid = np.linspace(self.values[0], self.values[-1], EDGES // 2)
        near = np.concatenate([self.values[counts], grid])
        return np.append(np.unique(np.searchsorted(self.values, near)), size)

    def cost(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The squared error of the runs [start, end) around their means."""
        first = self._first[end] - self._first[start]
        weight = self._weight[end] - self._weight[start]
        return np.maximum(self._second[end] - self._second[start] - first * first / weight, 0.0)

    def means(self, bounds: np.ndarray) -> np.ndarray:
        """The mean of each run between neighbouring bounds."""
        return np.diff(self._first[bounds]) / np.diff(self._weight[bounds]) + self._centre

    def exact_means(self, bounds: np.ndarray) -> np.ndarray:
        """`means` without the cumulative sums' rounding, in O(n): one value's mean is itself."""
        starts = bounds[:-1]
        sums = np.add.reduceat(self.values * self._weights, starts)
        return sums / np.add.reduceat(self._weights, starts)


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _solve(runs: _Runs, edges: np.ndarray, k: int) -> np.ndarray:
    """The bounds (k + 1 places in the sorted values) of the cheapest k runs between `edges`."""
    places = edges.size - 1
    k = min(k, places)
    best = runs.cost(np.zeros(places, np.int64), edges[1:])
    choices = np.zeros((k, places), dtype=np.int32)
    for row in range(1, k):
        best = _row(runs, edges, best, row, choices[row])
    bounds = [places]
    for row in range(k - 1, 0, -1):
        bounds.append(int(choices[row, bounds[-1] - 1]))
    return edges[[0, *reversed(bounds)]]


def _row(
    runs: _Runs, edges: np.ndarray, before: np.ndarray, row: int, choice: np.ndarray
) -> np.ndarray:
    """One more run: for each last place j the least `before[i - 1] + cost(i..j)` over i, by
    divide and conquer, all segments of one level at once. Fills `choice` with the best i."""
    places = before.size
    best = np.full(places, np.inf)
    low, high = np.array([row]), np.array([places - 1])  # places still to be solved
    left, right = np.array([row]), np.array([places - 1])  # where their best i may lie
    while low.size:
        middle = (low + high) // 2
        lengths = np.minimum(right, middle) - left + 1
        starts = np.cumsum(lengths) - lengths
        i = np.arange(lengths.sum()) - np.repeat(starts - left, lengths)
        costs = before[i - 1] + runs.cost(edges[i], np.repeat(edges[middle + 1], lengths))
        least = np.minimum.reduceat(costs, starts)
        hits = np.flatnonzero(costs == np.repeat(least, lengths))
        owner = np.searchsorted(starts, hits, side="right") - 1
        found = i[hits[np.searchsorted(owner, np.arange(low.size))]]
        best[middle], choice[middle] = least, found
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
        left, right = np.concatenate([left, found]), np.concatenate([found, right])
        open_ = low <= high
        low, high, left, right = low[open_], high[open_], left[open_], right[open_]
    return best


def _settle(runs: _Runs, bounds: np.ndarray, rounds: int = 50) -> np.ndarray:
    """Lloyd's rule on the sorted values: bounds move to the midpoints between the means until
    they rest. A round costs O(k log n)."""
    for _ in range(rounds):
        means = runs.means(bounds)
        inner = np.searchsorted(runs.values, (means[1:] + means[:-1]) / 2)
        moved = np.concatenate([[0], inner, [runs.values.size]])
        if np.array_equal(moved, bounds) or (np.diff(moved) < 1).any():
            break
        bounds = moved
    return bounds
