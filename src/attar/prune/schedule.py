"""How fast to prune: all at once, or in steps with training between."""

from __future__ import annotations


def cubic(final: float, steps: int) -> list[float]:
    """The share pruned after each of `steps`, fast at first while there is much to spare.

    s_t = s_f (1 − (1 − t/n)³), Zhu & Gupta 2017, "To prune, or not to prune", equation 1 from zero.

    Example:
        >>> [round(s, 3) for s in cubic(0.8, 4)]
        [0.463, 0.7, 0.788, 0.8]
    """
    return [final * (1 - (1 - step / steps) ** 3) for step in range(1, steps + 1)]
