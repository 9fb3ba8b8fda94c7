"""A criterion: one loss between what a student and its teacher answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn

from attar.data.base import Batch
from attar.distill.signal import Signal
from attar.errors import UsageError
from attar.registry import Registry, near
from attar.student import Student

criteria: Registry[type[Criterion]] = Registry("criterion", "attar.distill.criteria")

BESIDE_ANSWERS = 0.1
"""What the task's own loss weighs beside criteria that teach the answers too (Hinton et al. 2015:
"a considerably lower weight" on the labels); beside others it weighs 1."""


class Criterion(nn.Module, ABC):
    """A loss between student and teacher on one batch. A subclass is one file, registered by name.

    Its nested `Settings` are its keys in a recipe and its arguments in Python. It works in any
    training loop: call it with two signals, multiply by `weight`, add to the loss.

    Raises `UsageError` for settings that are unknown or out of range.

    Example:
        >>> @criteria.register("largest-gap")
        ... class LargestGap(Criterion):
        ...     "The largest difference of any logit."
        ...     def forward(self, student, teacher, batch=None):
        ...         return (student.logits - teacher.logits).abs().max()
        >>> LargestGap(weight=0.5).weight
        0.5
    """

    class Settings(BaseModel):
        """`weight`: what its loss is multiplied by in the joint loss."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        weight: float = Field(1.0, ge=0, allow_inf_nan=False)

        @model_validator(mode="before")
        @classmethod
        def _known_keys(cls, values: Any) -> Any:
            for key in values if isinstance(values, dict) else ():
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}{near(str(key), list(cls.model_fields))}")
            return values

    settings: Settings
    student_layers: tuple[str, ...] = ()
    """Paths of the student's layers whose outputs `forward` reads."""
    teacher_layers: tuple[str, ...] = ()
    """Paths of the teacher's."""
    beside_task: ClassVar[float] = 1.0
    """What the task's own loss weighs beside it, where nothing else is asked for: little where it
    teaches the answers too (`BESIDE_ANSWERS`)."""
    asks_teacher: ClassVar[bool] = True
    """Whether it reads the teacher's signal; one whose criteria all don't is never called."""

    needs_labels: ClassVar[bool] = False
    """Whether it reads every example's label: it can't be used where some have none."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        try:
            self.settings = type(self).Settings(**settings)
        except ValidationError as error:
            raise UsageError(f"{type(self).__name__}: {_sentence(error)}") from None

    @property
    def weight(self) -> float:
        """What its loss is multiplied by in the joint loss."""
        return self.settings.weight

    @contextmanager
    def changing(
        self, student: Student, teacher: nn.Module | None, example: tuple[Any, ...]
    ) -> Iterator[None]:
        """Entered before a training, left after it, for those that change the student itself, in
        place and with an edit on its record (`simkd`); the others do nothing here.

        teacher: its network; `None` where there is none (a table of answers). example: what the
        networks are called with, batch first. Enter it before `student_layers` and
        `teacher_layers` are read: it may settle them.
        """
        yield

    def expect(self, examples: int) -> None:
        """Told once, before `prepare`, how many examples the training split has: for those that
        remember something of each."""

    def prepare(self, student: Signal, teacher: Signal) -> None:
        """Called once, with the signals of a real batch, before the optimizer is made: builds what
        depends on their shapes (adapters), as parameters of its own."""

    @abstractmethod
    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        """The unweighted loss, a scalar. batch: the examples, for those that need their labels."""


def criterion_class(name: str) -> type[Criterion]:
    """The criterion called `name`, or that of a person's `path/to/file.py:Name` once its code was
    allowed to run. Raises `UsageError`."""
    from attar.files import from_file, is_reference

    if not is_reference(name):
        return criteria.get(name)
    own = from_file(name)
    if not (isinstance(own, type) and issubclass(own, Criterion)):
        raise UsageError(f"{name} is not a criterion: it should be a subclass of Criterion")
    return own


def require_no_labels(names: Iterable[str]) -> None:
    """Raises `UsageError` for the first of these criteria that needs every example's label: told
    of data of which some examples have none."""
    for name in names:
        if criterion_class(name).needs_labels:
            raise UsageError(
                f"{name} needs every example's label, and the data's `unlabelled` images have "
                "none: kd and dist do without"
            )


def written(criterion: object) -> dict[str, dict[str, Any]]:
    """A criterion as a recipe has it, every setting written out: `{name: {setting: value}}`.

    A person's `file.py:Name` is left as it is: its code may not have been allowed to run yet.
    Raises `ValueError` (pydantic's own, with the place, where a setting is wrong).

    Example:
        >>> written("logits-mse")
        {'logits-mse': {'weight': 1.0}}
    """
    from attar.files import is_reference

    if isinstance(criterion, str):
        criterion = {criterion: {}}
    if not isinstance(criterion, dict) or len(criterion) != 1:
        raise ValueError(
            "a criterion is one name with its settings, such as `kd: {temperature: 4, weight: 0.9}`"
        )
    ((name, settings),) = criterion.items()
    if is_reference(str(name)):
        return {name: dict(settings or {})}
    try:
        kind = criteria.get(str(name)).Settings
    except UsageError as error:
        raise ValueError(str(error)) from None
    place: TypeAdapter[Any] = TypeAdapter(dict[str, kind])  # type: ignore[valid-type]
    valid = place.validate_python({name: settings or {}})
    return {name: valid[name].model_dump(mode="json")}


def wide(x: Tensor) -> Tensor:
    """In at least float32: differences of probabilities are lost in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    said = str(first.get("ctx", {}).get("error") or first["msg"])
    said = said.replace("Input should", "should")
    return f"{place} {said}, not {first['input']!r}" if place else said
