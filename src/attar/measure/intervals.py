"""How sure a figure is: intervals of metrics, and paired intervals of drops.

Shares (accuracy: every example is right or wrong) have closed-form intervals that stay honest when
no or all examples are right, where a bootstrap would claim certainty. Every other metric is
resampled. All intervals are at 95 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
RESAMPLES = 1000


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float
    method: str


def share_interval(hits: np.ndarray) -> Interval:
    """Wilson's score interval (1927) of the share of ones in `hits` (N,).

    >>> tuple(round(x, 3) for x in share_interval(np.ones(10))[:3])
    (1.0, 0.722, 1.0)
    """
    n, p = len(hits), float(np.mean(hits))
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * np.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), "wilson")


def paired_share_drop(before: np.ndarray, after: np.ndarray) -> Interval:
    """How much the share of ones fell from `before` to `after`, the same examples in both.

    The interval is Agresti and Min's adjusted Wald for matched pairs (2005): half an example is
    added to each of the four cells, so that no discordant pair does not mean no doubt.
    """
    n = len(before)
    lost = float(np.sum((before == 1) & (after == 0)))
    won = float(np.sum((before == 0) & (after == 1)))
    b, c, m = lost + 0.5, won + 0.5, n + 2
    centre = (b - c) / m
    half = Z * np.sqrt((b + c) - (b - c) ** 2 / m) / m
    low, high = max(-1.0, float(centre - half)), min(1.0, float(centre + half))
    return Interval((lost - won) / n, low, high, "paired Agresti-Min")


def bootstrap_interval(
    value: Callable[[np.ndarray], float], statistics: np.ndarray, *, seed: int = 0
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a metric over per-example `statistics` (N, k)."""
    draws = [value(statistics[i]) for i in _resamples(len(statistics), seed)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(value(statistics), float(low), float(high), "bootstrap")


def paired_bootstrap_drop(
    value: Callable[[np.ndarray], float],
    before: np.ndarray,
    after: np.ndarray,
    *,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Interval:
    """How much worse the metric became, resampling the same examples in both."""
    sign = 1.0 if higher_is_better else -1.0

    def drop(rows: np.ndarray | slice) -> float:
        return sign * (value(before[rows]) - value(after[rows]))

    draws = [drop(i) for i in _resamples(len(before), seed)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(drop(slice(None)), float(low), float(high), "paired bootstrap")


def ratio_interval(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> Interval:
    """The median of the paired ratios a/b, with a bootstrap interval of it.

    a, b: (rounds,): one figure a round, measured side by side.
    """
    ratios = np.asarray(a, float) / np.asarray(b, float)
    draws = [float(np.median(ratios[i])) for i in _resamples(len(ratios), seed)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(np.median(ratios)), float(low), float(high), "paired bootstrap")


def _resamples(n: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, n, n) for _ in range(RESAMPLES)]
