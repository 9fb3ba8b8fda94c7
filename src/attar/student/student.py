"""The network that flows from stage to stage, with the record of what made it what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from attar.errors import ConstraintBroken
from attar.models.base import ModelSpec
from attar.student.edits import Edit


@dataclass
class Student:
    """A float network, what it was built from, and its edits.

    module: the `nn.Module`, with the person's own module paths.
    spec: what builds it afresh; `None` for a module handed in from a notebook, which must then be
        handed in again to load the student (`attar.load(run, model=...)`).
    edits: what was done to it since, in order.
    """

    module: nn.Module
    spec: ModelSpec | None = None
    edits: list[Edit] = field(default_factory=list)

    def copy(self) -> Student:
        """A student of its own weights and the same edits."""
        return Student(copy.deepcopy(self.module), self.spec, list(self.edits))

    def edited(self, edit: Edit) -> Student:
        """This student with one more edit on its record."""
        return Student(self.module, self.spec, [*self.edits, edit])

    def find(self, kind: type[Edit] | str) -> list[Edit]:
        """The edits of one kind, in order."""
        if isinstance(kind, str):
            return [e for e in self.edits if e.kind == kind]
        return [e for e in self.edits if isinstance(e, kind)]

    def check(self) -> None:
        """Raises `ConstraintBroken` where an edit's promise no longer holds."""
        broken = [message for edit in self.edits for message in edit.check(self.module)]
        if broken:
            shown = "; ".join(broken[:3]) + (
                f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
            )
            raise ConstraintBroken(f"a constraint of the student is broken: {shown}")

    def hooks(self) -> tuple[Callable[[nn.Module], None], Callable[[nn.Module], None]]:
        """What a training loop calls before and after each optimizer step to keep every promise."""

        def before(module: nn.Module) -> None:
            for edit in self.edits:
                edit.before_step(module)

        def after(module: nn.Module) -> None:
            for edit in self.edits:
                edit.after_step(module)

        return before, after
