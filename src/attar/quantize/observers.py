"""What stands in a prepared graph wherever a tensor is to lie on a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.observer import ObserverBase

from attar.errors import DataError
from attar.quantize.ranges import Histogram, ranges

SMALLEST_SCALE = 1e-9


class Grid(ObserverBase):
    """Knows, or will know, the grid of one tensor: `scale · (integer - zero_point)`.

    key: names the tensor in terms that outlive the graph (`OnnxRuntimeQuantizer` gives it).
    scale, zero_point: float32 and int64, one each, or one an output channel for a weight.
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
        self.scale = self.zero_point = torch.empty(0)

    def fix(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets the grid."""
        self.scale, self.zero_point = scale, zero_point

    def settle(self) -> None:
        """Chooses the grid from what was seen."""
        raise NotImplementedError

    def forget(self) -> None:
        """Begins to look anew."""
        raise NotImplementedError

    def simulated(self, x: Tensor) -> Tensor:
        """The tensor's values on the settled grid, in float."""
        ends = (self.quant_min, self.quant_max)
        if not self.scale.dim():
            at = (float(self.scale), int(self.zero_point))
            return torch.fake_quantize_per_tensor_affine(x, *at, *ends)
        zero = self.zero_point.to(torch.int32)
        return torch.fake_quantize_per_channel_affine(x, self.scale, zero, 0, *ends)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point


class ActivationObserver(Grid):
    """An activation's grid, its range chosen from a histogram.

    choice: how (see `attar.quantize.ranges`).
    """

    def __init__(self, *arguments: Any, choice: str = "mse", **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen = Histogram()
        self._choice = ranges.get(choice)

    def forget(self) -> None:
        self.seen = Histogram()

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.seen.add(x.detach())
        except ValueError as error:
            raise DataError(
                f"calibration: the values at {self.key} are not finite ({error}): an example holds "
                "such values, or the network's own overflow"
            ) from None
        return x

    def settle(self) -> None:
        low, high = self._choice(self.seen)
        if low == high:  # zeros alone say nothing of the scale, and biases are counted in its steps
            high = 1.0
        scale = max((high - low) / (self.quant_max - self.quant_min), SMALLEST_SCALE)
        zero = self.quant_min + round(-low / scale)
        self.fix(torch.tensor(scale), torch.tensor(min(max(zero, self.quant_min), self.quant_max)))


class PerChannelWeight(Grid):
    """A weight's symmetric grid: a scale an output channel, wide enough for its largest value.

    largest: that value's magnitude by channel.
    """

    def __init__(self, *arguments: Any, ch_axis: int = 0, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.ch_axis = ch_axis
        self.largest = torch.empty(0)

    def forget(self) -> None:
        self.largest = torch.empty(0)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.largest.numel():
            self.largest = weight.detach().abs().transpose(0, self.ch_axis).flatten(1).amax(1)
        return weight

    def settle(self) -> None:
        # A channel of zeros has no scale of its own, but its bias is counted in steps of one.
        whole = self.largest.max()
        self.spread(torch.where(self.largest > 0, self.largest, whole if whole > 0 else 1.0))

    def spread(self, largest: Tensor) -> None:
        """Sets the grid so that it reaches these magnitudes, (channels,)."""
        middle = (self.quant_min + self.quant_max) // 2
        scale = (largest / (self.quant_max - middle)).clamp_min(SMALLEST_SCALE)
        self.fix(scale, torch.full_like(scale, middle, dtype=torch.int64))
