"""Criteria on inner layers that train a module of their own for each pair."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from attar.distill.criterion import wide
from attar.distill.pairs import LayerCriterion
from attar.distill.signal import Signal
from attar.errors import UsageError


class AdaptedCriterion(LayerCriterion):
    """Base of criteria with a trained module for each pair of layers, which `made` builds.

    `prepare` makes them, on the student's device and in its precision (float32 at least); the
    optimizer trains them with the student, and they are no part of it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.adapters = nn.ModuleList()

    def prepare(self, student: Signal, teacher: Signal) -> None:
        made = []
        for path, like in zip(self.student_layers, self.teacher_layers, strict=True):
            own, wanted = wide(student.features[path]), wide(teacher.features[like])
            made.append(self.made(own, wanted).to(own.device, own.dtype))
        self.adapters = nn.ModuleList(made)

    @abstractmethod
    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """The module of a pair with features like these. Raises `UsageError` for wrong shapes."""

    def adapted(self, index: int) -> Any:
        """The module of the pair at this place. Raises `UsageError` before `prepare`."""
        require_prepared(self, self.adapters)
        return self.adapters[index]


def require_prepared(criterion: nn.Module, adapters: nn.ModuleList) -> None:
    """Raises `UsageError` while a criterion has no adapters."""
    if not adapters:
        raise UsageError(
            f"{type(criterion).__name__} has no adapters yet: call prepare(student, teacher) with "
            "the signals of one batch before the optimizer is made"
        )
