"""A teacher that nobody trained: always right, and fair to the wrong classes."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import BESIDE_ANSWERS, Criterion, criteria, wide
from attar.distill.divergence import divergence
from attar.distill.responses import labels
from attar.distill.signal import Signal
from attar.errors import UsageError


@criteria.register("teacher-free")
class TeacherFree(Criterion):
    """Teacher-free: a virtual teacher that gives the right class `correct`, the others the rest.

        L = T² · mean over examples of KL(p ‖ q)
        p ∝ u^(1/T),  u_y = a,  u_c = (1 − a) / (classes − 1) for the others
        q = softmax(student / T)

    for logits (N, classes) and labels y (N,). No network is asked: in a recipe, the teacher is only
    compared with. It is label smoothing with a temperature, and shows how much of a distillation's
    gain is no more than that.

    correct: a, between 1 / classes and 1, both excluded. temperature: T, at least 0.01.
    Raises `UsageError` for examples without labels, and where chance is as right as `correct`.

    Source: Yuan et al. 2020, "Revisiting Knowledge Distillation via Label Smoothing
    Regularization", section 4 (T² as in `kd`, so that weights mean the same).

    Example:
        >>> free = TeacherFree(correct=0.95, temperature=20)
        >>> loss = free(Signal(student(x)), nothing, batch)  # doctest: +SKIP
    """

    class Settings(Criterion.Settings):
        weight: float = Field(0.9, ge=0, allow_inf_nan=False)
        temperature: float = Field(20.0, ge=0.01, allow_inf_nan=False)
        correct: float = Field(0.95, gt=0, lt=1)

    settings: Settings
    beside_task = BESIDE_ANSWERS
    asks_teacher = False
    needs_labels = True

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        t = self.settings.temperature
        own = wide(student.logits.flatten(0, -2))
        is_right = F.one_hot(labels("teacher-free", batch), own.shape[-1]).to(own.dtype)
        wanted = is_right * self._gap(own.shape[-1])
        kl = divergence(F.log_softmax(wanted / t, -1), F.log_softmax(own / t, -1))
        return kl * t**2

    def _gap(self, classes: int) -> float:
        """By how much the virtual teacher's logit of the right class exceeds the others'."""
        correct = self.settings.correct
        if correct * classes <= 1:
            raise UsageError(
                f"teacher-free: correct is {correct:g}, no more than each of {classes} classes "
                "gets by chance: it should be larger"
            )
        return math.log(correct) - math.log((1 - correct) / (classes - 1))
