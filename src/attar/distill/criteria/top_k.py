"""The teacher's few best classes, and all others as one."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import criteria
from attar.distill.divergence import divergence
from attar.distill.responses import SoftenedCriterion
from attar.distill.signal import Signal


@criteria.register("top-k")
class TopK(SoftenedCriterion):
    """Sparse targets: the teacher's k likeliest classes, and what is left as one class more.

        L = T² · mean over examples of KL(p′ ‖ q′)
        p′ = (p_1, …, p_k, 1 − Σ p),  q′ the student's for the same classes
        p = softmax(teacher / T),  q = softmax(student / T)

    for logits (N, classes). It never exceeds `kd`, and is `kd` from k = classes − 1 on. The tail,
    where a teacher's probabilities are mostly noise, counts only by its sum.

    k: how many classes are told apart. temperature: T; 1 leaves most to the few best. standardize:
    see `attar.distill.responses.SoftenedCriterion`.

    Source: the "ghost token" of Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating
    Knowledge Distillation in LLMs".

    Example:
        >>> top = TopK(k=5, temperature=1)
        >>> loss = top(Signal(student(x)), Signal(teacher(x)))  # doctest: +SKIP
    """

    class Settings(SoftenedCriterion.Settings):
        weight: float = Field(0.9, ge=0, allow_inf_nan=False)
        k: int = Field(5, ge=1)

    settings: Settings

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        own, wanted = self.softened(student, teacher)
        k = min(self.settings.k, wanted.shape[-1] - 1)
        best = wanted.topk(k, -1).indices
        kl = divergence(_with_rest(wanted, best), _with_rest(own, best))
        return kl * self.settings.temperature**2


def _with_rest(logits: Tensor, best: Tensor) -> Tensor:
    """Log-probabilities of the classes `best` and of all others together, (N, k + 1)."""
    others = logits.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
    return F.log_softmax(torch.cat((logits.gather(-1, best), others), -1), -1)
