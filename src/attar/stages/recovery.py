"""Training against the teacher after a lossy step, as a stage's `recover` writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from attar.stages.base import Context, OnEpoch, Wrap
from attar.stages.distill import Distill, Written
from attar.student import Student
from attar.training.config import Training
from attar.training.objective import Objective

Made = TypeVar("Made", bound=Objective)


class Recovery(Training):
    """Training against the teacher after a lossy step."""

    criteria: list[Written] | None = None
    """What the teacher is asked, as of `distill`: features too. Default: its soft targets, `kd`."""
    views: int | None = Field(None, ge=1)
    """Ask the teacher once about so many augmentations of each example, as of `distill`."""

    @model_validator(mode="before")
    @classmethod
    def _any_training(cls, value: Any) -> Any:
        return value.model_dump() if isinstance(value, Training) else value

    @property
    def files(self) -> list[Path]:
        """Files that its criteria are in."""
        return self._distill.files if self._asks else []

    def recovered(
        self,
        student: Student,
        run: Context,
        label: str = "recover",
        on_epoch: OnEpoch | None = None,
        wrap: Wrap | None = None,
    ) -> Student:
        """The student, trained. label, on_epoch, wrap: as of `Context.train`."""
        if not self._asks or run.teacher is None:
            return run.train(student, self, label=label, on_epoch=on_epoch, wrap=wrap)
        stage = self._distill
        stage._label, stage._on_epoch, stage._wrap = label, on_epoch, wrap
        return stage.apply(student, run)

    def through(
        self,
        student: Student,
        run: Context,
        make: Callable[[Objective], Made],
        label: str = "recover",
    ) -> tuple[Student, Made]:
        """The student, trained by the objective that `make` makes of the recovery's, and that."""
        made: list[Made] = []

        def wrap(inner: Objective) -> Objective:
            made.append(make(inner))
            return made[-1]

        return self.recovered(student, run, label=label, wrap=wrap), made[-1]

    @property
    def _asks(self) -> bool:
        """Whether it says how the teacher is asked."""
        return self.criteria is not None or self.views is not None

    @property
    def _distill(self) -> Distill:
        return Distill.model_validate(self.model_dump(exclude_none=True))

    def of(self, epochs: int) -> Recovery:
        """The same for another number of epochs."""
        return self.model_copy(update={"epochs": epochs})
