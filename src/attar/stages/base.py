"""A stage: one step that turns a student into another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from attar.data.base import Data
from attar.events import Listener, silent
from attar.registry import Registry
from attar.store import Store
from attar.student import Student
from attar.tasks.base import Task
from attar.training.config import Training
from attar.training.objective import Objective

if TYPE_CHECKING:
    from attar.distill.answers import Storing
    from attar.distill.signal import Source
    from attar.runtimes.base import Runtime

OnEpoch = Callable[[nn.Module, int], None]
"""Called before each epoch with the network and the epoch's number, from 0."""
Wrap = Callable[[Objective], Objective]
"""Makes another objective of a training's."""

stages: Registry[type[Stage]] = Registry("stage", "attar.stages")


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    teacher: the network the student learns from, in eval mode and frozen; `None` when there is
        none. It is the recipe's teacher, not the student before the stage.
    work: a folder of the stage's own for checkpoints; what is in it survives a kill, so that the
        same stage resumes where it was.
    store: where a teacher's answers are kept for whoever needs them next; default: in `work`.
    runtime, threads, batch: the deploy target.
    max_drop: the budget's, as a fraction, for searches (`ratio: auto`); `None` without one.
    baseline: the teacher's validation metric, what a drop is counted from.
    found: filled by the stage: JSON values worth keeping (plans, what was tried); kept with the
        result and shown in the report.
    histories: filled by `train`: each training's records, one an epoch, by its label.
    """

    task: Task
    data: Data
    teacher: nn.Module | None
    seed: int
    work: Path
    store: Store | None = None
    tell: Listener = silent
    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    max_drop: float | None = None
    baseline: float | None = None
    found: dict[str, Any] = field(default_factory=dict)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def at(self, name: str) -> Context:
        """The same context with a folder `name` inside this one's, for a part of a stage."""
        return replace(self, work=self.work / name)

    def train(
        self,
        student: Student,
        training: Training,
        objective: Objective | None = None,
        *,
        label: str = "recover",
        on_epoch: OnEpoch | None = None,
        wrap: Wrap | None = None,
    ) -> Student:
        """Trains the student in place, its edits' promises kept at every step, and returns it.

        objective: default: the task's loss joined with soft targets of the teacher, if there is
            one (`attar.distill.recovery`). label: what progress calls it, and its checkpoint.
        wrap: makes another objective of it.
        """
        from attar.distill.recovery import recovery_objective
        from attar.training.loop import train

        if objective is None:
            run, source = self, None
            if self.teacher is not None:
                source, run = self.taught(self.teacher, training, label)
            objective = recovery_objective(self.task, source, training)
            return run.train(
                student, training, objective, label=label, on_epoch=on_epoch, wrap=wrap
            )
        objective = objective if wrap is None else wrap(objective)
        before, after = student.hooks()
        self.histories[label] = train(
            student.module,
            data=self.data,
            task=self.task,
            training=training,
            objective=objective,
            seed=self.seed,
            checkpoint=self.work / f"{label}.pt",
            before_step=before,
            after_step=after,
            tell=self.tell,
            label=label,
            on_epoch=on_epoch,
        )
        return student

    def taught(
        self,
        teacher: nn.Module | None,
        training: Training,
        label: str,
        *,
        layers: Sequence[str] = (),
        views: int | None = None,
        storing: Storing | None = None,
    ) -> tuple[Source, Context]:
        """The source of a teacher's signals for the training called `label`, and this context with
        the data that the training then goes through (see `attar.distill.teaching`)."""
        from attar.distill.teaching import teaching

        source, data = teaching(
            teacher,
            task=self.task,
            data=self.data,
            training=training,
            label=label,
            seed=self.seed,
            store=self.store or Store(self.work / "store"),
            layers=layers,
            views=views,
            storing=storing,
            tell=self.tell,
        )
        return source, replace(self, data=data)

    def evaluate(self, module: nn.Module, split: str = "validation") -> float:
        """The metric of a network on one split. Stages choose on `validation`, never on `test`."""
        from attar.training.evaluation import statistics_of

        return self.task.value(statistics_of(module, getattr(self.data, split), self.task))


class Stage(BaseModel):
    """One step of a recipe. A subclass is one file: its fields are its YAML, `apply` does the work.

    Example:
        >>> @stages.register("nothing")
        ... class Nothing(Stage):
        ...     "Hands the student on as it is."
        ...     name = "nothing"
        ...     def apply(self, student, run):
        ...         return student
    """

    model_config = ConfigDict(extra="forbid")

    name: ClassVar[str]
    not_after: ClassVar[dict[str, str]] = {}
    """Stages that must not come before this one, and why: refused when the recipe is read."""
    searched: ClassVar[tuple[str, ...]] = ()
    """Fields that may be `auto`: the strongest setting that keeps the budget is looked for."""

    @property
    def measures_runtime(self) -> bool:
        """Whether its result depends on the deploy target (on latencies measured there)."""
        return False

    def suits(self, runtime: type[Runtime]) -> None:
        """Raises `UsageError` for a runtime that can't execute what this stage makes."""

    @property
    def files(self) -> list[Path]:
        """Files that its result depends on; they are part of what results are stored by."""
        return []

    @property
    def searches(self) -> bool:
        """Whether its result depends on the budget."""
        return any(getattr(self, field) == "auto" for field in self.searched)

    @abstractmethod
    def apply(self, student: Student, run: Context) -> Student:
        """The student after this stage. The one given may be changed."""
