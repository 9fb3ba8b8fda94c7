"""Which of a few intervals each of many numbers lies in."""

from __future__ import annotations

import numpy as np

BINS = 1 << 16
CHUNK = 1 << 17


def buckets(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """For each value, the place of the last of `starts` that is not above it.

    values: floats, (n,), none below `starts[0]`. starts: rising, of the values' dtype, (k,), at
    most 65,536. Returns (n,), uint8 for k up to 256, else uint16. Most values are found by a table
    of equal bins; only those in a bin that a start cuts are searched for. So time hardly grows
    with k.

    Example:
        >>> buckets(np.array([1.0, 5.0, 2.5]), np.array([1.0, 2.0])).tolist()
        [0, 1, 1]
    """
    found = np.empty(values.size, dtype=np.uint8 if starts.size <= 256 else np.uint16)
    with np.errstate(over="ignore"):
        span = float(starts[-1]) - float(starts[0])
        scale = values.dtype.type(BINS / span if span else 0.0)
    for begin in range(0, values.size, CHUNK):
        chunk = values[begin : begin + CHUNK]
        usable = values.size > BINS and np.isfinite(scale)
        found[begin : begin + CHUNK] = (
            _by_bins(chunk, starts, scale) if usable else _searched(chunk, starts)
        )
    return found


def _searched(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(starts, values, side="right") - 1


def _by_bins(values: np.ndarray, starts: np.ndarray, scale: np.floating) -> np.ndarray:
    """Binning never swaps two values, rounding included, so all values of a bin without a start
    lie between the same two starts."""
    low = starts[0] * scale

    def binned(numbers: np.ndarray) -> np.ndarray:
        return np.clip(numbers * scale - low, 0, BINS - 1).astype(np.uint16)

    cuts = binned(starts)
    table = np.cumsum(np.bincount(cuts, minlength=BINS)) - 1
    bins = binned(values)
    found = table.astype(np.uint16)[bins]
    cut = np.zeros(BINS, dtype=bool)
    cut[cuts] = True
    unsure = np.flatnonzero(cut[bins])
    found[unsure] = _searched(values[unsure], starts)
    return found
