"""The extremes of a usual batch."""

from attar.quantize.ranges import Histogram, ranges


@ranges.register("moving-average")
def moving_average(seen: Histogram) -> tuple[float, float]:
    """The moving average of each batch's extremes: one batch's outlier hardly widens the grid.

    The past weighs 0.9. It depends on the batches' order and size, as no other choice does. Source:
    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.1.
    """
    return min(seen.usual_low, 0.0), max(seen.usual_high, 0.0)
