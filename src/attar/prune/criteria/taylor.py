"""Importance by the loss: what its first-order expansion says removing costs."""

from __future__ import annotations

from attar.prune.criteria.base import criteria
from attar.prune.criteria.gradients import SquaredProducts


@criteria.register("taylor")
class Taylor(SquaredProducts):
    """Keeps what changes the loss most to first order: the mean of (Σ w · ∂L/∂w)².

    The sum is over a channel's weights; single weights score (w · ∂L/∂w)². A gradient is that of a
    batch's loss, and the mean is over the batches. Needs batches with their losses.
    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning" (the
    first order, a filter's weights as a group, averaged over minibatches).
    """
