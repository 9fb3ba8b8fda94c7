"""All but the outermost values."""

from attar.quantize.ranges import Histogram, ranges

OUTSIDE = 5e-5


@ranges.register("percentile")
def percentile(seen: Histogram) -> tuple[float, float]:
    """All but the outermost values: of those that aren't zero, one in 20,000 on either side."""
    total = float(seen.counts.sum())
    if not total:
        return seen.low, seen.high
    below = seen.counts.cumsum(0) / total
    width = 2 * seen.reach / len(below)
    low = -seen.reach + width * int((below > OUTSIDE).double().argmax())
    high = -seen.reach + width * (int((below >= 1 - OUTSIDE).double().argmax()) + 1)
    return max(seen.low, min(low, 0.0)), min(seen.high, max(high, 0.0))
