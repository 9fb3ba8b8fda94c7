"""Decoupled: the right class against the rest, and the rest among themselves."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import criteria
from attar.distill.divergence import divergence
from attar.distill.responses import SoftenedCriterion, labels
from attar.distill.signal import Signal


@criteria.register("dkd")
class DKD(SoftenedCriterion):
    """Decoupled distillation: `kd` in two parts, each with a weight of its own.

        L = T² · mean over examples of (α · KL(b_T ‖ b_S) + β · KL(p̂_T ‖ p̂_S))
        b = (p_y, 1 − p_y),  p̂ = softmax over the classes but y,  p = softmax(logits / T)

    for logits (N, classes) and labels y (N,). In `kd`, β is 1 − p_y of the teacher: what a teacher
    that is sure knows of the wrong classes counts for little there, and by this for as much as is
    wanted. α = β = 1 is not `kd`.

    target: α, what the right class's probability counts. others: β, what the wrong classes' shares
    count. temperature: T. standardize: see `attar.distill.responses.SoftenedCriterion`.
    Raises `UsageError` for examples without labels.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", section 3; on
    CIFAR-100, α = 1, β between 1 and 10, and a weight that is warmed up over the first epochs.

    Example:
        >>> dkd = DKD(others=8)
        >>> loss = dkd(Signal(student(x)), Signal(teacher(x)), batch)  # doctest: +SKIP
    """

    class Settings(SoftenedCriterion.Settings):
        target: float = Field(1.0, ge=0, allow_inf_nan=False)
        others: float = Field(8.0, ge=0, allow_inf_nan=False)

    settings: Settings
    needs_labels = True

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        own, wanted = self.softened(student, teacher)
        right = labels("dkd", batch)
        (own_sure, own_rest), (sure, rest) = _parts(own, right), _parts(wanted, right)
        decoupled = self.settings.target * divergence(sure, own_sure)
        decoupled = decoupled + self.settings.others * divergence(rest, own_rest)
        return decoupled * self.settings.temperature**2


def _parts(logits: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of right and wrong, (N, 2), and of the classes among the wrong ones,
    (N, classes), where the right one's is next to nothing."""
    place = right.unsqueeze(-1)
    others = logits.scatter(-1, place, torch.finfo(logits.dtype).min / 2)
    binary = torch.cat((logits.gather(-1, place), others.logsumexp(-1, keepdim=True)), -1)
    return F.log_softmax(binary, -1), F.log_softmax(others, -1)
