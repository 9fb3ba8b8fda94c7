"""The range with the least squared error."""

import torch
from torch import Tensor

from attar.quantize.ranges import Histogram, ranges

CANDIDATES = 64
STEPS = 255


@ranges.register("histogram")
@ranges.register("mse")
def mse(seen: Histogram) -> tuple[float, float]:
    """The least squared error: what is clipped off against how coarse the steps are.

    PyTorch's histogram observer searches for the same, so it answers to that name too. Both ends
    are drawn in together first, then each by itself.
    """
    shares = torch.linspace(1, 1 / CANDIDATES, CANDIDATES, dtype=torch.float64)
    whole = torch.ones(1, dtype=torch.float64)
    low, high = seen.low, seen.high
    for low_shares, high_shares in ((shares, shares), (shares, whole), (whole, shares)):
        lows, highs = torch.broadcast_tensors(low * low_shares, high * high_shares)
        best = int(_squared_error(seen, lows, highs).argmin())
        low, high = float(lows[best]), float(highs[best])
    return low, high


def _squared_error(seen: Histogram, low: Tensor, high: Tensor) -> Tensor:
    """The summed squared error of each range (k,): step²/12 within it, the overshoot outside."""
    centres = seen.centres()
    over = (centres - high[:, None]).clamp_min(0) + (low[:, None] - centres).clamp_min(0)
    step = (high - low)[:, None] / STEPS
    return torch.where(over > 0, over.square(), step.square() / 12) @ seen.counts
