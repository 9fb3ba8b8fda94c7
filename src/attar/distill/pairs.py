"""Criteria on inner layers: which of the student's is compared with which of the teacher's."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from attar.data.base import Batch
from attar.distill.criterion import Criterion, wide
from attar.distill.signal import Signal
from attar.errors import UsageError


class Pair(BaseModel):
    """Two layers by module path. One bare path stands for the same path in both networks.

    Example:
        >>> Pair.model_validate("layer3")
        Pair(student='layer3', teacher='layer3')
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    teacher: str

    @model_validator(mode="before")
    @classmethod
    def _same_path(cls, value: Any) -> Any:
        return {"student": value, "teacher": value} if isinstance(value, str) else value


class LayerCriterion(Criterion):
    """Base of criteria that compare pairs of layers: the mean over the pairs of `compare`.

    In a recipe, `layers: auto` leaves the choice of pairs to `attar.distill.pairing`.
    """

    class Settings(Criterion.Settings):
        """`layers`: the pairs."""

        layers: Annotated[list[Pair], Field(min_length=1)] | Literal["auto"]

    settings: Settings
    auto_deepest: ClassVar[bool] = False
    """Whether `layers: auto` means the deepest pair alone, for criteria on an embedding."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.settings.layers == "auto":
            raise UsageError(
                f"{type(self).__name__}: layers: auto is for recipes; here, give the pairs that "
                "attar.distill.pair_layers(student, teacher, task, batches) finds"
            )
        self.pairs = tuple(self.settings.layers)
        self.student_layers = tuple(pair.student for pair in self.pairs)
        self.teacher_layers = tuple(pair.teacher for pair in self.pairs)

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        losses = [
            self.compare(index, wide(student.features[own]), wide(teacher.features[wanted]))
            for index, (own, wanted) in enumerate(
                zip(self.student_layers, self.teacher_layers, strict=True)
            )
        ]
        return torch.stack(losses).mean()

    @abstractmethod
    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair, a scalar. index: the pair's place; features: batch first."""
