"""Divergences from covering all the teacher's answers to seeking its main one."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import criteria
from attar.distill.divergence import divergence
from attar.distill.responses import SoftenedCriterion
from attar.distill.signal import Signal


@criteria.register("jensen-shannon")
class JensenShannon(SoftenedCriterion):
    """Generalised Jensen-Shannon divergence, with forward and reverse KL as its ends.

        L = T² · (β · KL(p ‖ m) + (1 − β) · KL(q ‖ m)),  m = β · p + (1 − β) · q,  0 < β < 1
        L = T² · KL(p ‖ q) for β = 0 (forward: `kd`),  L = T² · KL(q ‖ p) for β = 1 (reverse)
        p = softmax(teacher / T),  q = softmax(student / T)

    for logits (N, classes). Forward KL wants the student to cover all that the teacher finds
    likely, reverse KL to leave out what it finds unlikely; what lies between is bounded by T² ·
    log 2 and symmetric at β = 0.5. (At its ends, the divergence itself is zero; divided by β, or by
    1 − β, its limits are the two KLs.)

    beta: β. temperature: T. standardize: see `attar.distill.responses.SoftenedCriterion`.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes", section 2.

    Example:
        >>> js = JensenShannon(beta=0.5, temperature=1)
        >>> loss = js(Signal(student(x)), Signal(teacher(x)))  # doctest: +SKIP
    """

    class Settings(SoftenedCriterion.Settings):
        beta: float = Field(0.5, ge=0, le=1)

    settings: Settings

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        own, wanted = self.softened(student, teacher)
        q, p = F.log_softmax(own, -1), F.log_softmax(wanted, -1)
        return self._between(p, q) * self.settings.temperature**2

    def _between(self, p: Tensor, q: Tensor) -> Tensor:
        beta = self.settings.beta
        if beta == 0:
            return divergence(p, q)
        if beta == 1:
            return divergence(q, p)
        m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        return beta * divergence(p, m) + (1 - beta) * divergence(q, m)
