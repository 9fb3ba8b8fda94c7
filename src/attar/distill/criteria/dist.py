"""Correlations of probabilities, along the classes and along the batch."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import criteria
from attar.distill.relations import examples
from attar.distill.responses import SoftenedCriterion
from attar.distill.signal import Signal


@criteria.register("dist")
class DIST(SoftenedCriterion):
    """Correlations in place of equality: how classes rank in an example, and examples in a class.

        L = T² · (β · mean over examples of (1 − ρ(q_i, p_i))
                  + γ · mean over classes of (1 − ρ(q_·c, p_·c)))
        ρ = Pearson's correlation,  p = softmax(teacher / T),  q = softmax(student / T)

    for logits (N, classes), two examples at least. A student that is less sure of everything than
    its teacher isn't held to account for that, so that a much stronger teacher can be followed.

    inter: β, what the classes' ranks in an example count. intra: γ, what the examples' ranks in a
    class count. temperature: T. standardize: see `attar.distill.responses.SoftenedCriterion`.
    Raises `UsageError` for a batch of one.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", section 3 (T² as
    in the authors' code).

    Example:
        >>> dist = DIST(temperature=4, inter=2, intra=2)
        >>> loss = dist(Signal(student(x)), Signal(teacher(x)))  # doctest: +SKIP
    """

    class Settings(SoftenedCriterion.Settings):
        inter: float = Field(2.0, ge=0, allow_inf_nan=False)
        intra: float = Field(2.0, ge=0, allow_inf_nan=False)

    settings: Settings

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        own, wanted = self.softened(student, teacher)
        q, p = F.softmax(examples("dist", own), -1), F.softmax(wanted, -1)
        inter = self.settings.inter * _uncorrelated(q, p)
        intra = self.settings.intra * _uncorrelated(q.T, p.T)
        return (inter + intra) * self.settings.temperature**2


def _uncorrelated(own: Tensor, wanted: Tensor) -> Tensor:
    """1 − Pearson's correlation of the rows, their mean."""
    own, wanted = own - own.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)
    return 1 - F.cosine_similarity(own, wanted, dim=-1).mean()
