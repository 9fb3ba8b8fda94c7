"""How far one distribution is from another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities along the last dimension, the mean over all others; a scalar.

    Source: Kullback & Leibler 1951, "On Information and Sufficiency".

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.5, 0.5]]).log()
        >>> round(divergence(p, torch.tensor([[0.25, 0.75]]).log()).item(), 4)
        0.1438
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
