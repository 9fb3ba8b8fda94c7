"""From what calibration saw of a tensor to the range of its grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attar.registry import Registry

BINS = 4096
COUNTED = 2**18
"""Values of a tensor that are counted at most; the extremes are those of all."""

MOMENTUM = 0.9
"""What the past weighs in the moving average of the extremes."""


class Histogram:
    """How often values were seen, in bins that widen as larger ones come: memory doesn't grow with
    the number of examples.

    low, high: the extremes seen, and zero. counts: float64 (BINS,) over [-reach, reach], without
    exact zeros, which every grid has. usual_low, usual_high: moving averages of each addition's
    extremes, the past weighing `MOMENTUM`.

    Example:
        >>> seen = Histogram()
        >>> seen.add(torch.tensor([0.0, 1.0, -3.0]))
        >>> seen.low, seen.high, float(seen.counts.sum())
        (-3.0, 1.0, 2.0)
    """

    def __init__(self) -> None:
        self.low = self.high = self.reach = 0.0
        self.usual_low = self.usual_high = 0.0
        self._fresh = True
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Counts the values of a float tensor of any shape. Raises `ValueError` for NaN and
        infinity."""
        low, high = (float(v) for v in torch.aminmax(values))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise ValueError(f"{low if low != low else max(-low, high)} is no finite number")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._average(low, high)
        self._widen(max(-low, high))
        if self.reach:
            # An odd stride visits every column of a plane.
            values = values.float().flatten()[:: values.numel() // COUNTED | 1]
            counts = torch.histc(values, BINS, -self.reach, self.reach).double()
            counts[BINS // 2] -= values.numel() - torch.count_nonzero(values)
            self.counts += counts

    def centres(self) -> Tensor:
        """The middle of each bin, float64 (BINS,)."""
        half = self.reach / BINS
        return torch.linspace(-self.reach + half, self.reach - half, BINS, dtype=torch.float64)

    def _average(self, low: float, high: float) -> None:
        share = 1.0 if self._fresh else 1 - MOMENTUM
        self._fresh = False
        self.usual_low += share * (low - self.usual_low)
        self.usual_high += share * (high - self.usual_high)

    def _widen(self, reach: float) -> None:
        """Bins twice as wide, as often as it takes: each is the sum of two, so nothing is lost."""
        if not self.reach:
            self.reach = reach
        while self.reach < reach:
            self.counts = torch.nn.functional.pad(self.counts.view(-1, 2).sum(1), [BINS // 4] * 2)
            self.reach *= 2


Choice = Callable[[Histogram], tuple[float, float]]

ranges: Registry[Choice] = Registry("observer", "attar.quantize.ranges")
"""How a range is chosen: functions from a `Histogram` to (low, high), low ≤ 0 ≤ high."""
