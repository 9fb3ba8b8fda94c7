"""The teacher's probabilities as labels."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import criteria
from attar.distill.responses import SoftenedCriterion
from attar.distill.signal import Signal


@criteria.register("soft-cross-entropy")
class SoftCrossEntropy(SoftenedCriterion):
    """The teacher's probabilities as soft labels of a cross-entropy.

        L = −T² · mean over examples of Σ_c p_c · log q_c
        p = softmax(teacher / T),  q = softmax(student / T)

    for logits (N, classes). It is `kd` plus T² times the teacher's entropy, which the student can't
    change: at one temperature both have the same gradient, but this one is not zero where student
    and teacher agree.

    temperature: T; 1 takes the teacher's probabilities as they are. At least 0.01. standardize: see
    `attar.distill.responses.SoftenedCriterion`.

    Source: Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", section 2 (T = 1); Hinton,
    Vinyals & Dean 2015, section 2 (any T).

    Example:
        >>> soft = SoftCrossEntropy()
        >>> loss = task_loss + beta * soft(Signal(own), Signal(wanted))  # doctest: +SKIP
    """

    class Settings(SoftenedCriterion.Settings):
        weight: float = Field(0.9, ge=0, allow_inf_nan=False)
        temperature: float = Field(1.0, ge=0.01, allow_inf_nan=False)

    settings: Settings

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        own, wanted = self.softened(student, teacher)
        return F.cross_entropy(own, F.softmax(wanted, -1)) * self.settings.temperature**2
