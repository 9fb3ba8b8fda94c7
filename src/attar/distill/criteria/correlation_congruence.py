"""Which examples of a batch correlate, by a kernel that sees more than their product."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from attar.distill.criterion import criteria
from attar.distill.pairs import LayerCriterion
from attar.distill.relations import examples, gram, unit


@criteria.register("correlation-congruence")
class CorrelationCongruence(LayerCriterion):
    """Correlation congruence: the correlation of a batch's examples, by a Gaussian kernel.

        L = mean over pairs of 1/N² · ‖ C_S − C_T ‖_F²
        C_ij = exp(−2γ) · Σ_{p=0..P} (2γ)ᵖ/p! · ⟨xᵢ, xⱼ⟩ᵖ

    x are features of any shape, batch first, flattened and divided by their length; student and
    teacher may differ in all but the batch (the paper's linear layers to one width aren't needed).
    C is exp(−γ·‖xᵢ − xⱼ‖²) by its Taylor series, which sees products up to the P-th power.

    gamma: γ; the larger, the less far off examples count. order: P; 1 is the bilinear pool, the
    plain product, times 2γ·exp(−2γ).

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", sections 3.2 and
    3.3.

    Example:
        >>> congruence = CorrelationCongruence(layers=["pool"])
        >>> loss = congruence(own, wanted)  # doctest: +SKIP
    """

    class Settings(LayerCriterion.Settings):
        gamma: float = Field(0.4, gt=0, le=20)
        order: int = Field(2, ge=1, le=20)

    settings: Settings
    auto_deepest = True

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        return (self._correlation(student) - self._correlation(teacher)).square().mean()

    def _correlation(self, features: Tensor) -> Tensor:
        """(N, N). The sum by Horner's rule, from its last term."""
        x = 2 * self.settings.gamma * gram(unit(examples("correlation-congruence", features)))
        total = torch.ones_like(x)
        for p in range(self.settings.order, 0, -1):
            total = 1 + x / p * total
        return math.exp(-2 * self.settings.gamma) * total
