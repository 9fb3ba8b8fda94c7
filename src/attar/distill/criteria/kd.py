"""Soft targets: the teacher's softened probabilities."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import criteria
from attar.distill.divergence import divergence
from attar.distill.responses import SoftenedCriterion
from attar.distill.signal import Signal


@criteria.register("kd")
class KD(SoftenedCriterion):
    """Soft targets: the Kullback-Leibler divergence of softened probabilities.

        L = T² · mean over examples of Σ_c p_c · (log p_c − log q_c)
        p = softmax(teacher / T),  q = softmax(student / T)

    for logits (N, classes). T² keeps the gradients' size when T changes; L is zero, with zero
    gradient, where both answer alike, and a constant added to all of an example's logits changes
    nothing.

    temperature: T, how much the probabilities are softened; at least 0.01. standardize: see
    `attar.distill.responses.SoftenedCriterion`.

    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Example:
        >>> kd = KD(temperature=4)
        >>> loss = kd(Signal(student(x)), Signal(teacher(x)))  # doctest: +SKIP
    """

    class Settings(SoftenedCriterion.Settings):
        weight: float = Field(0.9, ge=0, allow_inf_nan=False)

    settings: Settings

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        own, wanted = self.softened(student, teacher)
        q, p = F.log_softmax(own, -1), F.log_softmax(wanted, -1)
        return divergence(p, q) * self.settings.temperature**2
