"""How much of the teacher's features the student's tell."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import channels, require_comparable, resize
from attar.distill.criterion import criteria, wide

LEAST = 1e-5
"""Variance that is always left."""
FIRST = 5.0
"""Variance that training begins with."""


@criteria.register("vid")
class VID(AdaptedCriterion):
    """Variational information distillation: the teacher's features as a guess from the student's.

        L = mean over pairs and all elements of ½ · ((teacher − μ)² / σ_c² + log σ_c²)
        μ = regressor(student),  σ_c² = log(1 + exp(α_c)) + 10⁻⁵, one a channel c

    for maps (N, C, H, W), tokens (N, T, D) or vectors (N, D): the negative log-likelihood, less a
    constant, of a normal distribution around what the student lets one guess, a bound on the mutual
    information of both. Channels that can't be guessed get a large σ and count for little. It may
    be negative. The student's map is pooled or interpolated to the teacher's size. The regressor is
    three 1×1 convolutions (linear layers) of the teacher's width with ReLUs between them; it and α
    are trained with the student.

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer", with
    the variance of a channel at all positions, averaged over elements where the paper sums them;
    σ² is 5 at first, as in the authors' code.

    Example:
        >>> vid = VID(layers=["layer3"])
        >>> vid.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *vid.parameters()])  # doctest: +SKIP
        >>> loss = vid(own, wanted)  # doctest: +SKIP
    """

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_comparable(student, teacher)
        return _Guess(channels(student).shape[1], channels(teacher).shape[1])

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        guess = self.adapted(index)
        mean = wide(guess.regressor(channels(resize(student, teacher))))
        variance = (F.softplus(guess.scale) + LEAST).unsqueeze(1)
        off = (channels(teacher) - mean).square()
        return (off / variance + variance.log()).mean() / 2


class _Guess(nn.Module):
    """μ and α, for features as (N, width, positions)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv1d(before, after, 1, bias=False),
            nn.ReLU(),
            nn.Conv1d(after, after, 1, bias=False),
            nn.ReLU(),
            nn.Conv1d(after, after, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((after,), math.log(math.expm1(FIRST - LEAST))))
