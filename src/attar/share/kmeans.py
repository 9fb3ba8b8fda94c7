"""One-dimensional k-means, solved rather than approximated.

In one dimension the best clusters are runs of the sorted values, so a dynamic programme over the
places where one run ends and the next begins finds the optimum (Wang and Song, *Ckmeans.1d.dp*,
2011). The cost of a run comes from cumulative sums in constant time, and the best last boundary
never moves left as the run's end moves right, so each row of the table needs O(m log m) costs
(divide and conquer), done here a whole level at a time.

Up to `EXACT` distinct values every boundary is considered and the result is the optimum. Beyond,
values are first put into bins, 65,536 or one for each distinct value (`histogram`), and bounds are
looked for among the bins':

1. The programme over about `EDGES` bounds, as dense as the cube root of the values' density, as
   the bins themselves are, some at equal weights and at equal distances.
2. The same programme over all bounds, but each only among a few around where it is: all move at
   once, by ever smaller steps (`_refine`).
3. Lloyd's rule, until the bounds rest.

What grows with the number of values is sorting them, summing them up, and telling for each which
run it lies in (`buckets`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attar.share.buckets import buckets
from attar.share.histogram import CHUNK, Histogram, histogram

EXACT = 4096
EDGES = 2048
REACH = 8
"""How many places to either side of a bound a refinement tries."""


class Clustering(NamedTuple):
    """codebook: float64 (k,), rising. indices: uint8 (uint16 for k above 256), the values' shape,
    each one's place in the codebook. distortion: the (weighted) sum of squared differences."""

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
    flat = np.asarray(values).ravel()
    flat = flat if flat.dtype == np.float32 else flat.astype(np.float64)
    mass = None if weights is None else np.asarray(weights, np.float64).ravel()
    bins = histogram(flat, mass)
    runs = bins.merged(_bounds(bins, k))
    means = runs.means()
    indices = buckets(flat, runs.lows)
    distortion = squared_error(flat, means, indices, mass)
    return Clustering(means, indices.reshape(np.shape(values)), distortion)


def squared_error(
    values: np.ndarray,
    codebook: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray | None = None,
) -> float:
    """The (weighted) sum of squared differences between values (n, …) and what stands for them,
    float64 (k, …), by indices (n,). weights: of the values' shape."""
    total = 0.0
    for begin in range(0, len(values), CHUNK):
        part = slice(begin, begin + CHUNK)
        error = values[part] - codebook[indices[part]]
        total += float(np.vdot(error, error if weights is None else error * weights[part]))
    return total


def _bounds(bins: Histogram, k: int) -> np.ndarray:
    """The bounds (k + 1 bins, from 0 to the end) of the cheapest k runs of bins."""
    if bins.size <= k:
        return np.arange(bins.size + 1)
    if bins.size <= EXACT:
        return _solve(bins, k)
    edges = _edges(bins, max(EDGES, 4 * k))
    bounds = edges[_solve(bins.merged(edges), k)]
    return _settle(bins, _refine(bins, bounds)) if 1 < k == bounds.size - 1 else bounds


def _edges(bins: Histogram, count: int) -> np.ndarray:
    """About `count` bounds to choose from first."""
    middles = (bins.lows.astype(np.float64) + bins.highs) / 2
    widths = np.diff(middles, append=middles[-1])
    dense = np.cumsum(np.cbrt(np.diff(bins.weight) * widths**2))
    scales = ((dense, count // 2), (bins.weight[1:], count // 4), (middles, count // 4))
    near = [
        np.searchsorted(scale, np.linspace(scale[0], scale[-1], places)) for scale, places in scales
    ]
    return np.unique(np.concatenate([[0], *near, [bins.size]]))


def _solve(bins: Histogram, k: int) -> np.ndarray:
    """The bounds of the cheapest k runs, every one considered."""
    places = bins.size
    k = min(k, places)
    best = bins.cost(np.zeros(places, np.int64), np.arange(1, places + 1))
    choices = np.zeros((k, places), dtype=np.int32)
    for row in range(1, k):
        best = _row(bins, best, row, choices[row])
    bounds = [places]
    for row in range(k - 1, 0, -1):
        bounds.append(int(choices[row, bounds[-1] - 1]))
    return np.array([0, *reversed(bounds)])


def _row(bins: Histogram, before: np.ndarray, row: int, choice: np.ndarray) -> np.ndarray:
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
        costs = before[i - 1] + bins.cost(i, np.repeat(middle + 1, lengths))
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


def _refine(bins: Histogram, bounds: np.ndarray, rounds: int = 40) -> np.ndarray:
    """The cheapest bounds among those near the given ones, step by smaller step.

    A round tries `REACH` places to either side of each inner boundary, up to as far as its
    neighbours at first, in all combinations (the programme again, of k rows and `2 REACH + 1`
    places); where no boundary went as far as it could, the next one looks closer. A round takes
    O(k · REACH²) costs.
    """
    share = 1.0
    for _ in range(rounds):
        tried = _around(bins, bounds, share)
        chosen = _cheapest(bins, tried)
        bounds = np.concatenate([[0], tried[np.arange(len(tried)), chosen], bounds[-1:]])
        if not np.isin(chosen, [0, 2 * REACH]).any():
            share /= REACH / 2
        if share * np.diff(bounds).max() < 1:
            break
    return bounds


def _around(bins: Histogram, bounds: np.ndarray, share: float) -> np.ndarray:
    """Places around each inner bound, (k - 1, 2 REACH + 1), rising; it is the middle one."""
    steps = np.arange(REACH + 1) / REACH * share
    inner, gaps = bounds[1:-1, None], np.diff(bounds)[:, None]
    below = inner - np.ceil(gaps[:-1] * steps[:0:-1]).astype(np.int64)
    above = inner + np.ceil(gaps[1:] * steps).astype(np.int64)
    return np.concatenate([below, above], axis=1)


def _cheapest(bins: Histogram, tried: np.ndarray) -> np.ndarray:
    """Which place of each row to take, (k - 1,), so that the runs between them cost least."""

    def cost(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        open_ = start < end
        first, last = np.where(open_, start, 0), np.where(open_, end, 1)
        return np.where(open_, bins.cost(first, last), np.inf)

    between = cost(*np.broadcast_arrays(tried[:-1, :, None], tried[1:, None, :]))
    best = cost(np.zeros_like(tried[0]), tried[0])
    choices = np.empty(between.shape[::2], dtype=np.int64)
    for row, costs in enumerate(between):
        totals = best[:, None] + costs
        choices[row] = totals.argmin(axis=0)
        best = totals.min(axis=0)
    chosen = [int((best + cost(tried[-1], np.full_like(tried[-1], bins.size))).argmin())]
    for choice in choices[::-1]:
        chosen.append(int(choice[chosen[-1]]))
    return np.array(chosen[::-1])


def _settle(bins: Histogram, bounds: np.ndarray, rounds: int = 50) -> np.ndarray:
    """Lloyd's rule: bounds move to the midpoints between the means until they rest."""
    middles = (bins.lows.astype(np.float64) + bins.highs) / 2
    for _ in range(rounds):
        means = bins.merged(bounds).means()
        inner = np.searchsorted(middles, (means[1:] + means[:-1]) / 2)
        moved = np.concatenate([[0], inner, [bins.size]])
        if np.array_equal(moved, bounds) or (np.diff(moved) < 1).any():
            break
        bounds = moved
    return bounds
