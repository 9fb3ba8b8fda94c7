"""Values on a uniform grid: the float32 step of which all are whole multiples, if there is one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LARGEST = 1 << 23
"""Multiples up to here are told apart exactly."""
DIVISORS = 64
SURE = 1 << 10
"""Multiples up to here show at once whether a step is wrong."""


class Grid(NamedTuple):
    """step: positive. places: int64, rising: values are float32(step · places)."""

    step: np.float32
    places: np.ndarray


def on_grid(step: np.float32, places: np.ndarray) -> np.ndarray:
    """The values, each product rounded once to float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return places.astype(np.float32) * step


def find_grid(values: np.ndarray) -> Grid | None:
    """The largest step of which finite, different, rising float32 values are exact multiples.

    The closest two (zero among them) lie one step apart or a few; the values in order of size then
    narrow down the step, each to half a unit of its own last place.

    >>> find_grid(np.float32(0.3) * np.arange(-2, 3, dtype=np.float32)).places.tolist()
    [-2, -1, 0, 1, 2]
    """
    exact = values.astype(np.float64)
    if not np.isfinite(exact).all() or not exact.any():
        return None
    closest = float(np.diff(np.unique(np.append(np.abs(exact), 0.0))).min())
    steps = closest / np.arange(1, DIVISORS + 1)
    places = np.abs(exact) / steps[:, None]
    off = np.abs(places - np.rint(places)) * (places < SURE)
    for step in steps[off.max(1) < 0.1]:
        if found := _around(float(step), values, exact):
            return found
    return None


def _around(guess: float, values: np.ndarray, exact: np.ndarray) -> Grid | None:
    """The grid with about this step."""
    order = np.argsort(np.abs(exact))
    size, half = np.abs(exact[order]), np.spacing(np.abs(values[order])).astype(np.float64) / 2
    size, half = size[size > 0], half[size > 0]
    low, high = guess * (1 - 2.0**-10), guess * (1 + 2.0**-10)
    start = 0
    while start < len(size):
        step = (low + high) / 2
        # as far as the step is known well enough to count by it
        sure = size * (high - low) < step * step / 2
        end = max(start + 1, int(np.argmin(sure)) if not sure.all() else len(size))
        counts = np.rint(size[start:end] / step)
        if not counts.all():
            return None
        low = max(low, float(((size[start:end] - half[start:end]) / counts).max()))
        high = min(high, float(((size[start:end] + half[start:end]) / counts).min()))
        if low > high:
            return None
        start = end
    return _exactly((low + high) / 2, values, exact)


def _exactly(step: float, values: np.ndarray, exact: np.ndarray) -> Grid | None:
    """The float32 step nearest to this one that gives the values bit for bit, if one does: that
    with the fewest bits."""
    nearest = np.float32(step)
    tried = {
        nearest,
        np.nextafter(nearest, np.float32(0)),
        np.nextafter(nearest, np.float32(np.inf)),
    }
    for keep in range(8, 24):  # a step may well be a short number
        scale = 2.0 ** (keep - np.frexp(step)[1])
        tried.add(np.float32(np.rint(step * scale) / scale))
    for candidate in sorted(
        tried, key=lambda s: (trailing(s), -abs(float(s) - step)), reverse=True
    ):
        if not candidate > 0:
            continue
        places = np.rint(exact / float(candidate))
        if np.abs(places).max() < LARGEST and np.array_equal(on_grid(candidate, places), values):
            return Grid(candidate, places.astype(np.int64))
    return None


def trailing(step: np.float32) -> int:
    """How many of a float32's last mantissa bits are zero, at most 23."""
    mantissa = int(step.view(np.uint32)) & (1 << 23) - 1
    return 23 if not mantissa else (mantissa & -mantissa).bit_length() - 1
