"""How far apart a batch's examples lie, and at which angles."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from attar.distill.criterion import criteria
from attar.distill.pairs import LayerCriterion
from attar.distill.relations import examples


@criteria.register("rkd")
class RKD(LayerCriterion):
    """Relational: the distances between a batch's examples and the angles that they form.

        L = mean over pairs of distance · H(d_S/μ_S, d_T/μ_T) + angle · H(cos_S, cos_T)
        d_ij = ‖xᵢ − xⱼ‖₂,  μ = mean of the distances that aren't zero
        cos_ijk = ⟨xᵢ − xⱼ, xₖ − xⱼ⟩ / (d_ij · d_kj), zero where a distance is

    H is the Huber loss (δ = 1), its mean over all N² distances and all N³ angles; x are features of
    any shape, batch first, flattened. Student and teacher may differ in all but the batch; scaling,
    moving or rotating either's features changes nothing. Two examples have only one distance and
    teach nothing: it takes three.

    Angles are reckoned from the distances, by the law of cosines, so that memory doesn't grow with
    N² · width: they take N³ numbers a few times over (8 MB a time for N = 128, 0.5 GB for 512).

    distance, angle: the weights of the two. Zero leaves one out.

    Source: Park et al. 2019, "Relational Knowledge Distillation", sections 3.2.1 (distances) and
    3.2.2 (angles); the weights 1 and 2 are their RKD-DA.

    Example:
        >>> rkd = RKD(layers=["pool"], weight=25)
        >>> loss = rkd(own, wanted)  # doctest: +SKIP
    """

    class Settings(LayerCriterion.Settings):
        distance: float = Field(1.0, ge=0, allow_inf_nan=False)
        angle: float = Field(2.0, ge=0, allow_inf_nan=False)

        @model_validator(mode="after")
        def _some(self) -> Any:
            if not self.distance and not self.angle:
                raise ValueError("one of distance and angle should be more than 0")
            return self

    settings: Settings
    auto_deepest = True

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        own, wanted = _distances(student), _distances(teacher)
        losses = []
        if self.settings.distance:
            losses.append(self.settings.distance * F.huber_loss(own, wanted))
        if self.settings.angle:
            losses.append(self.settings.angle * F.huber_loss(_cosines(own), _cosines(wanted)))
        return torch.stack(losses).sum()


def _distances(features: Tensor) -> Tensor:
    """(N, N), 1 on average. Exact where examples nearly coincide, which a product of the features
    would not be, and without a gradient where they do."""
    rows = examples("rkd", features)
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = apart.sum() / (apart > 0).sum().clamp_min(1)
    return apart / torch.where(mean > 0, mean, 1)


def _cosines(apart: Tensor) -> Tensor:
    """(N, N, N): at the first example, the angle between the second and the third."""
    square, there = apart.square(), apart > 0
    inverse = torch.where(there, apart, 1).reciprocal() * there
    product = (square[:, :, None] + square[:, None, :] - square) / 2
    return product * inverse[:, :, None] * inverse[:, None, :]
