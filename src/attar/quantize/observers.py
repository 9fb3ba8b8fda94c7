"""What calibration sees: a streaming histogram of a tensor, and grids chosen from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import ObserverBase

from attar.errors import DataError
from attar.registry import Registry

BINS = 4096
SMALLEST_SCALE = 1e-9
COUNTED = 2**18
"""Values of a tensor that are counted at most; the extremes are those of all."""

Clip = Callable[["ActivationHistogram"], tuple[float, float]]
clips: Registry[Clip] = Registry("observer", "attar.quantize")
"""How a grid's range is chosen from a histogram: functions to (low, high)."""


class Grid(ObserverBase):
    """An observer that knows, or will know, the grid of one tensor.

    key: names the tensor in terms that outlive the graph (`OnnxRuntimeQuantizer` gives it).
    scale, zero_point: the grid, `scale · (integer - zero_point)`; set by `fix` or `settle`.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.key = ""
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None

    def fix(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets the grid: scale float32, zero point int64; one value, or one a channel."""
        self.scale, self.zero_point = scale, zero_point

    def settle(self) -> None:
        """Chooses the grid from what was seen."""
        raise NotImplementedError

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        if self.scale is None or self.zero_point is None:
            raise AssertionError(f"the grid of {self.key} was never chosen")
        return self.scale, self.zero_point


class ActivationHistogram(Grid):
    """Counts an activation's values in bins that widen as larger ones come, so that memory doesn't
    grow with the examples seen.

    clip: name of the function that chooses the range (see `clips`).
    counts: float64 (BINS,) over [-reach, reach], without exact zeros, which every grid has.
    low, high: the extremes seen, and zero.
    """

    def __init__(self, *arguments: Any, clip: str = "mse", **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._clip = clips.get(clip)
        self.low = self.high = self.reach = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach().float()
        low, high = (float(v) for v in torch.aminmax(values))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise DataError(
                f"calibration: {self.key} became {low if low != low else high}; "
                "an example holds such values, or the network can't take it"
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        if self.reach:
            # An odd stride visits every column of a plane.
            values = values.flatten()[:: values.numel() // COUNTED | 1]
            counts = torch.histc(values, BINS, -self.reach, self.reach).double()
            counts[BINS // 2] -= values.numel() - torch.count_nonzero(values)
            self.counts += counts
        return x

    def settle(self) -> None:
        low, high = self._clip(self)
        steps = self.quant_max - self.quant_min
        scale = max((high - low) / steps, SMALLEST_SCALE)
        zero = self.quant_min + round(-low / scale)
        self.fix(torch.tensor(scale), torch.tensor(min(max(zero, self.quant_min), self.quant_max)))

    def _widen(self, reach: float) -> None:
        """Bins twice as wide, as often as it takes: each is the sum of two, so nothing is lost."""
        if not self.reach:
            self.reach = reach
        while self.reach < reach:
            self.counts = torch.nn.functional.pad(self.counts.view(-1, 2).sum(1), [BINS // 4] * 2)
            self.reach *= 2


class PerChannelWeight(Grid):
    """A weight's symmetric grid, one scale an output channel, wide enough for its largest value."""

    def __init__(self, *arguments: Any, ch_axis: int = 0, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.ch_axis = ch_axis
        self.largest: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.largest is None:
            self.largest = weight.detach().abs().transpose(0, self.ch_axis).flatten(1).amax(1)
        return weight

    def settle(self) -> None:
        assert self.largest is not None
        # A channel of zeros has no scale of its own, but its bias is counted in steps of one.
        largest = torch.where(self.largest > 0, self.largest, self.largest.max())
        scale = (largest / self.quant_max).clamp_min(SMALLEST_SCALE)
        self.fix(scale, torch.zeros_like(scale, dtype=torch.int64))


@clips.register("minmax")
def minmax(seen: ActivationHistogram) -> tuple[float, float]:
    """The extremes seen: nothing is clipped."""
    return seen.low, seen.high


@clips.register("percentile")
def percentile(seen: ActivationHistogram, share: float = 0.99995) -> tuple[float, float]:
    """The range that holds all but the outermost values, one in 20,000 on either side."""
    total = seen.counts.sum()
    if total == 0:
        return seen.low, seen.high
    below = seen.counts.cumsum(0) / total
    edges = torch.linspace(-seen.reach, seen.reach, BINS + 1)
    low = float(edges[int((below > 1 - share).double().argmax())])
    high = float(edges[int((below >= share).double().argmax()) + 1])
    return max(seen.low, min(low, 0.0)), min(seen.high, max(high, 0.0))


@clips.register("mse")
def mse(seen: ActivationHistogram, candidates: int = 64) -> tuple[float, float]:
    """The range with the least squared error: what is clipped off against how coarse the steps are.

    Both ends are drawn in together first, then each by itself.
    """
    shares = torch.linspace(1, 1 / candidates, candidates, dtype=torch.float64)
    low, high = seen.low, seen.high
    ends = [(shares, shares), (shares, torch.ones(1)), (torch.ones(1), shares)]
    for low_shares, high_shares in ends:
        lows, highs = torch.broadcast_tensors(low * low_shares, high * high_shares)
        best = int(_squared_error(seen, lows, highs).argmin())
        low, high = float(lows[best]), float(highs[best])
    return low, high


def _squared_error(seen: ActivationHistogram, low: Tensor, high: Tensor) -> Tensor:
    """The summed squared error of each range (k,): step²/12 within it, the overshoot outside."""
    width = 2 * seen.reach / BINS
    centres = torch.linspace(-seen.reach + width / 2, seen.reach - width / 2, BINS).double()
    over = (centres - high[:, None]).clamp_min(0) + (low[:, None] - centres).clamp_min(0)
    step = (high - low)[:, None] / 255
    inside = torch.where(over > 0, over.square(), step.square() / 12)
    return inside @ seen.counts
