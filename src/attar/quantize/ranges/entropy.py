"""The range that loses least information."""

import torch
from torch import Tensor

from attar.quantize.ranges import Histogram, ranges

CANDIDATES = 64
LEVELS = 255
_NEVER = 1e-9
"""The share given to a value that the grid's distribution says never comes."""


@ranges.register("entropy")
def entropy(seen: Histogram) -> tuple[float, float]:
    """The least Kullback-Leibler divergence of what the grid keeps from what was seen.

    What lies outside counts at the ends of the range; the grid's distribution is that of its 255
    steps, each spread over the values that were seen in it. Both ends are drawn in together first,
    then each by itself. Source: Migacz 2017, "8-bit Inference with TensorRT" (there for |x| alone).
    """
    shares = torch.linspace(1, 1 / CANDIDATES, CANDIDATES, dtype=torch.float64).tolist()
    low, high = seen.low, seen.high
    if low == high:
        return low, high  # zeros alone
    for drawn in ((1, 1), (0, 1), (1, 0)):
        tried = [(low * (s if drawn[0] else 1), high * (s if drawn[1] else 1)) for s in shares]
        lost = [divergence(seen, *ends) for ends in tried]
        low, high = tried[min(range(len(tried)), key=lost.__getitem__)]
    return low, high


def divergence(seen: Histogram, low: float, high: float) -> float:
    """KL(seen ‖ grid) in nats, of the values clipped to a range."""
    centres = seen.centres()
    inside = (centres >= low) & (centres <= high)
    if not float(seen.counts[inside].sum()):
        return float("inf")  # nothing that was seen is on the grid
    clipped = _clipped(seen.counts, inside)
    step = ((centres[inside] - low) * (LEVELS / (high - low))).floor().long().clamp_(0, LEVELS - 1)
    kept = seen.counts[inside]
    p, q = clipped / clipped.sum(), _spread(kept, step)
    some = p > 0
    return float((p[some] * (p[some] / q[some].clamp_min(_NEVER)).log()).sum())


def _clipped(counts: Tensor, inside: Tensor) -> Tensor:
    """The counts inside a range, those outside added at its ends."""
    first, last = int(inside.double().argmax()), int(inside.nonzero().max())
    clipped = counts[inside].clone()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last + 1 :].sum()
    return clipped


def _spread(kept: Tensor, step: Tensor) -> Tensor:
    """What the grid's steps say of each bin, as shares: a step's count, even over its bins that
    were seen."""
    some = (kept > 0).double()
    totals = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, step, kept)
    bins = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, step, some)
    each = (totals / bins.clamp_min(1))[step] * some
    return each / each.sum().clamp_min(_NEVER)
