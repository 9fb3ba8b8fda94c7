"""The teacher's logits themselves."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import BESIDE_ANSWERS, Criterion, criteria
from attar.distill.responses import responses
from attar.distill.signal import Signal


@criteria.register("logits-mse")
class LogitsMSE(Criterion):
    """The mean squared difference of the logits.

        L = mean over examples and classes of (student − teacher)²

    for logits (N, classes). The limit of `kd` at high temperature, but for the logits' own mean.

    Source: Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", section 2.2; Kim et al. 2021,
    "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation".

    Example:
        >>> loss = LogitsMSE()(Signal(student(x)), Signal(teacher(x)))  # doctest: +SKIP
    """

    beside_task = BESIDE_ANSWERS

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        return F.mse_loss(*responses(student, teacher))
