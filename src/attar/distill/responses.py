"""What criteria on answers share: the same classes, one temperature, logits on one footing."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from attar.data.base import UNLABELLED, Batch
from attar.distill.criterion import BESIDE_ANSWERS, Criterion, wide
from attar.distill.signal import Signal
from attar.errors import UsageError

EPSILON = 1e-7


class SoftenedCriterion(Criterion):
    """Base of criteria on softened answers.

    Settings: `temperature`, T, by which logits are divided, at least 0.01. `standardize`: give each
    example's logits mean 0 and standard deviation 1 before that, in both networks: then the student
    is taught how logits compare and not how large they are, which a smaller network may not reach.

        z ↦ (z − mean over classes of z) / (standard deviation over classes of z)

    A lower temperature (2) and a larger weight (9) go with it. Source: Sun et al. 2024, "Logit
    Standardization in Knowledge Distillation", algorithm 1.
    """

    class Settings(Criterion.Settings):
        temperature: float = Field(4.0, ge=0.01, allow_inf_nan=False)
        standardize: bool = False

    settings: Settings
    beside_task = BESIDE_ANSWERS

    def softened(self, student: Signal, teacher: Signal) -> tuple[Tensor, Tensor]:
        """Both networks' logits over T, (positions, classes), in at least float32.

        Raises `UsageError` where they answer with different numbers of classes.
        """
        own, wanted = responses(student, teacher)
        if self.settings.standardize:
            own, wanted = standardized(own), standardized(wanted)
        return own / self.settings.temperature, wanted / self.settings.temperature


def responses(student: Signal, teacher: Signal) -> tuple[Tensor, Tensor]:
    """Both networks' logits as (positions, classes), in at least float32.

    Raises `UsageError` where they answer with different numbers of classes.
    """
    own, wanted = student.logits, teacher.logits
    require_same_classes(own.shape[-1], wanted.shape[-1])
    return wide(own.flatten(0, -2)), wide(wanted.flatten(0, -2))


def require_same_classes(student: int, teacher: int) -> None:
    """Raises `UsageError` where the two answer with different numbers of classes."""
    if student != teacher:
        raise UsageError(
            f"the student answers with {student:,} classes and the teacher with {teacher:,}: say "
            "which of the teacher's are the student's (`teacher: {classes: […]}` of distill), or "
            "use criteria on features or relations"
        )


def standardized(logits: Tensor) -> Tensor:
    """(positions, classes) with mean 0 and standard deviation 1 in each position.

    >>> standardized(torch.tensor([[1.0, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(EPSILON)


def labels(criterion: str, batch: Batch | None) -> Tensor:
    """What is right at each position, int64 (positions,). criterion: who asks.

    Raises `UsageError` for examples without labels.
    """
    if batch is None or batch.targets is None or bool((batch.targets == UNLABELLED).any()):
        some = "these" if batch is None or batch.targets is None else "some of these"
        raise UsageError(
            f"{criterion} needs the examples' labels, and {some} have none: kd and dist do without"
        )
    return batch.targets.flatten().to(torch.int64)
