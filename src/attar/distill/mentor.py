"""Who teaches a stage instead of the recipe's teacher, as a recipe has it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn

from attar.data.base import Data
from attar.distill.classes import require_distinct, share_classes
from attar.errors import UsageError
from attar.models import build, load_checkpoint, resolve
from attar.tasks.base import Task


class Mentor(BaseModel):
    """What to learn from instead of the recipe's teacher: another network (a model's name, its
    arguments, and where its weights are, unless the library brings them), or a table of soft
    labels (`answers`, a file; see `attar.distill.table`).

    classes: which of the network's outputs belong to the data's classes, in their order; the others
    are left out. The network then keeps its own number of classes (`arguments` say how many where
    that isn't its default)."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None
    answers: str | None = None
    classes: Annotated[list[int], Field(min_length=1)] | None = None

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: list[int] | None) -> list[int] | None:
        try:
            require_distinct(classes or [])
        except UsageError as error:
            raise ValueError(str(error)) from None
        return classes

    @model_validator(mode="after")
    def _one_kind(self) -> Mentor:
        if (self.model is None) == (self.answers is None):
            raise ValueError("a teacher is either a `model` or a file of `answers`")
        if self.answers is not None and (self.checkpoint or self.arguments or self.classes):
            raise ValueError(
                "`checkpoint`, `arguments` and `classes` belong to a `model`, not to `answers`"
            )
        return self

    def load(self, data: Data, task: Task) -> nn.Module:
        """The network with its weights, answering with the data's classes where `classes` say which
        these are. Raises the `AttarError` of what is missing or wrong."""
        assert self.model is not None
        if self.classes is not None and len(self.classes) != len(data.classes):
            raise UsageError(
                f"distill: the teacher's `classes` name {len(self.classes):,} of its outputs and "
                f"the data have {len(data.classes):,} classes: name one for each, in their order"
            )
        spec = resolve(
            self.model,
            self.arguments,
            channels=data.shape[0] if data.shape else None,
            classes=(len(data.classes) or None) if self.classes is None else None,
            shape=data.shape,
        )
        module = build(spec, pretrained=self.checkpoint is None)
        if self.checkpoint is not None:
            load_checkpoint(module, self.checkpoint)
        if self.classes is not None:
            share_classes(module, self.classes, task, task.example(data))
        return module.eval()
