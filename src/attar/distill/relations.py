"""What criteria on relations share: a batch's examples as rows, and their products."""

from __future__ import annotations

import torch
from torch import Tensor

from attar.errors import UsageError


def examples(criterion: str, features: Tensor) -> Tensor:
    """Features of any shape, batch first, as (N, everything else). criterion: who asks.

    Raises `UsageError` for a batch of one, which has no relations.
    """
    if len(features) < 2:
        raise UsageError(f"{criterion} compares a batch's examples: it needs two at least")
    return features.flatten(1)


def unit(x: Tensor) -> Tensor:
    """The vectors along the last dimension at length 1. Zeros stay zero, without a gradient.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    square = x.square().sum(-1, keepdim=True)
    there = square > 0
    return x * torch.where(there, square, 1).rsqrt() * there


def gram(x: Tensor) -> Tensor:
    """Each row's product with each: (…, N, D) to (…, N, N), in the precision x has."""
    with full_precision(x):
        return x @ x.transpose(-1, -2)


def full_precision(x: Tensor) -> torch.autocast:
    """Inside, a training in bfloat16 doesn't narrow products: differences of them would be lost."""
    return torch.autocast(x.device.type, enabled=False)
