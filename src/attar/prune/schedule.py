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


def linear(final: float, steps: int) -> list[float]:
    """The share pruned after each of `steps`, as much more in each.

    Example:
        >>> linear(0.75, 3)
        [0.25, 0.5, 0.75]
    """
    return [final * step / steps for step in range(1, steps + 1)]


def survivors(final: float, steps: int) -> list[float]:
    """The share pruned after each of `steps`, each of which takes the same share of what is left.

    Frankle & Carbin 2019, "The Lottery Ticket Hypothesis" (iterative pruning, appendix B).

    Example:
        >>> [round(s, 3) for s in survivors(0.75, 2)]
        [0.5, 0.75]
    """
    return [1 - (1 - final) ** (step / steps) for step in range(1, steps + 1)]
