"""The stage that teaches a student what its teacher knows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from torch import nn

from attar.data.base import Data
from attar.distill.answers import Storing
from attar.distill.criterion import Criterion, criterion_class, require_no_labels, written
from attar.distill.diagnosis import diagnosis, measure
from attar.distill.mentor import Mentor
from attar.distill.objective import DistillObjective
from attar.distill.pairing import pair_layers, with_pairs
from attar.distill.pairs import LayerCriterion, Pair
from attar.distill.signal import Source
from attar.distill.table import Table
from attar.distill.teacher import Teacher
from attar.distill.transfer import Transfer, said, transferred, with_unlabelled
from attar.errors import UsageError
from attar.files import is_reference, locate
from attar.stages.base import Context, OnEpoch, Stage, Wrap, stages
from attar.student import Student
from attar.training.config import Training
from attar.training.evaluation import device_of, to_device
from attar.training.objective import TaskObjective

LABEL = "distill"
ALONE = "alone"
"""What the training without a teacher is called, where it is made for comparison."""
NOTHING_TO_DIAGNOSE = (
    "distill: `diagnose` tells whether a teacher helped, and without criteria none was asked"
)
PAIRED_BY = 256
"""Examples by which layers are paired, spread over the training split."""
PAIRED_AT_ONCE = 64
"""Of these at most so many in a batch, whatever their size."""

Written = Annotated[dict[str, dict[str, Any]], BeforeValidator(written)]


@stages.register("distill")
class Distill(Stage, Training):
    """Trains the student on what its teacher answers, and on the task, for some epochs.

    The loss is `task_weight · L_task + Σ weightᵢ · L_kdᵢ`. All of a training's keys (`epochs`,
    `optimizer`, `schedule`, …) stand beside `criteria`. The teacher runs in the fastest form that
    agrees with it on this machine. (Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015.)
    """

    name: ClassVar[str] = "distill"
    not_after: ClassVar[dict[str, str]] = {
        "quantize": "quantized weights lie on a grid that training would move them off"
    }

    criteria: list[Written] = Field(default_factory=lambda: [written("kd")])
    """What the teacher is asked: names, or `{name: {weight: …, …}}`; `attar list criteria`. None at
    all (`[]`) trains the student alone, on the task."""
    task_weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of the task's own loss. Default: 0.1 beside a criterion on responses, 1 beside others."""

    teacher: Mentor | None = None
    """Who teaches this stage; default: the recipe's teacher, which drops are counted from."""

    views: int | None = Field(None, ge=1)
    """Ask the teacher once about this many augmentations of each example and keep its answers; the
    epochs then go through these views in turn, at the student's cost alone. Default: a live teacher
    and new augmentations every epoch; one view where examples aren't augmented."""

    transfer: Transfer | None = None
    """Which of the training examples it learns from; default: all."""

    store: Storing | None = None
    """How those answers are kept, and where."""

    _label: str = PrivateAttr(LABEL)
    _on_epoch: OnEpoch | None = PrivateAttr(None)
    _wrap: Wrap | None = PrivateAttr(None)
    """What its training is called, who hears of its epochs, and what its objective is made into,
    where another stage trains so."""

    diagnose: bool = False
    """Train the same student without the teacher as well, from the same initial weights through the
    same batches, and say whether the teacher helped and what may be why not."""

    @model_validator(mode="after")
    def _answers_suffice(self) -> Distill:
        """A table holds answers alone: whatever else is asked of it is refused before a run."""
        if self._table is None:
            return self
        for one in self.criteria:
            ((name, settings),) = one.items()
            if settings.get("layers"):
                raise ValueError(
                    f"{name} compares inner layers, and the teacher is a table of answers, which "
                    "has none: use criteria on responses, or name a network"
                )
        if self.views is not None or self.store is not None:
            raise ValueError(
                "`views` and `store` keep a network's answers, and the teacher is a table of them "
                "already: leave them out"
            )
        return self

    @property
    def files(self) -> list[Path]:
        names = [name for one in self.criteria for name in one]
        found = []
        if self.teacher is not None:
            names += [self.teacher.model] if self.teacher.model else []
            held = (self.teacher.checkpoint, self.teacher.answers)
            found += [Path(path) for path in held if path]
        return found + [locate(name)[0] for name in names if is_reference(name)]

    def apply(self, student: Student, run: Context) -> Student:
        with ExitStack() as changes:
            return self._taught(student, run, changes)

    def _taught(self, student: Student, run: Context, changes: ExitStack) -> Student:
        table, mentor = self._table, self._mentor(run)
        if mentor is None and table is None and self.criteria:
            raise UsageError("distill needs a teacher, and this recipe gives it none here")
        run = self._transferred(mentor, run)
        criteria = self._built(self._pairs(student.module, mentor, run))
        untaught = student.copy() if self.diagnose and criteria else None
        self._change(student, mentor, criteria, run, changes)
        layers = [path for one in criteria.values() for path in one.teacher_layers]
        training = self._training()
        asked = mentor if any(one.asks_teacher for one in criteria.values()) else None
        source, run = run.taught(
            asked, training, self._label, layers=layers, views=self.views, storing=self.store
        )
        if table is not None:
            source = Table(Path(table), run.data)
        objective = DistillObjective(
            run.task,
            source,
            criteria,
            task_weight=self._task_weight(criteria),
            label_smoothing=self.label_smoothing,
        )
        batch = run.data.train.pick(range(min(self.batch_size, len(run.data.train))))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)  # the adapters' initial weights
            shown = to_device(batch, device_of(student.module))
            objective.prepare(student.module, shown, examples=len(run.data.train))
        trained = run.train(
            student,
            training,
            objective,
            label=self._label,
            on_epoch=self._on_epoch,
            wrap=self._wrap,
        )
        run.found["teacher"] = dict(source.choice)
        if criteria:
            alone = self._alone(untaught, run) if untaught is not None else None
            anew = source if asked is None else Teacher(asked, run.task)
            run.found["diagnosis"] = self._diagnosis(trained, alone, anew, criteria, run)
        elif self.diagnose:
            run.tell({"event": "note", "text": NOTHING_TO_DIAGNOSE})
        return trained

    def asked(self, student: nn.Module, run: Context) -> Teacher | None:
        """The live teacher with the inner layers that its answers would be kept of; `None` where no
        network is asked."""
        mentor = self._mentor(run)
        criteria = self._built(self._pairs(student, mentor, run)).values()
        if mentor is None or not any(one.asks_teacher for one in criteria):
            return None
        layers = [path for one in criteria for path in one.teacher_layers]
        return Teacher(mentor, run.task, layers=layers)

    def examples(self, data: Data) -> int:
        """How many of the training examples it learns from, before duplicates are left out."""
        total = len(data.train)
        if self.transfer is None:
            return total
        return self.transfer.count or round((self.transfer.fraction or 1) * total)

    @property
    def _table(self) -> str | None:
        """The file of soft labels, where one teaches."""
        return self.teacher.answers if self.teacher is not None else None

    def _mentor(self, run: Context) -> nn.Module | None:
        """The network that teaches; `None` where a table does."""
        if self._table is not None:
            return None
        return self.teacher.load(run.data, run.task) if self.teacher is not None else run.teacher

    def _change(
        self,
        student: Student,
        mentor: nn.Module | None,
        criteria: dict[str, Criterion],
        run: Context,
        changes: ExitStack,
    ) -> None:
        """Lets the criteria change the student, until the stage ends."""
        example = run.task.example(run.data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)  # the initial weights of what they add
            for criterion in criteria.values():
                changes.enter_context(criterion.changing(student, mentor, example))

    def _transferred(self, mentor: nn.Module | None, run: Context) -> Context:
        """The context with the training split that this stage learns from: the part of it that was
        chosen, and the unlabelled examples where a criterion makes something of them."""
        data = run.data
        if self.transfer is not None:
            data, found = transferred(self.transfer, data, mentor, run.task, run.seed)
            run.tell({"event": "note", "text": said(found)})
            run.found["transfer"] = found
        if data.unlabelled is not None and self.criteria:
            require_no_labels(name for one in self.criteria for name in one)
            run.found["unlabelled"] = len(data.unlabelled)
            data = with_unlabelled(data)
        return replace(run, data=data)

    def _pairs(self, student: nn.Module, mentor: nn.Module | None, run: Context) -> list[Pair]:
        """The pairs for the criteria that leave them open (`layers: auto`)."""
        given = [
            settings.get("layers")
            for each in self.criteria
            for name, settings in each.items()
            if issubclass(criterion_class(name), LayerCriterion)
        ]
        if mentor is None or "auto" not in given:
            return []
        split, several = run.data.train, -(-min(PAIRED_BY, len(run.data.train)) // PAIRED_AT_ONCE)
        places = torch.linspace(0, len(split) - 1, min(PAIRED_BY, len(split))).long().tolist()
        batches = [split.pick(places[start::several]) for start in range(several)]
        found = pair_layers(student, mentor, run.task, batches)
        for one in found:
            run.tell({"event": "note", "text": f"paired by itself: {one}"})
        run.found["pairs"] = [
            {**one.pair.model_dump(), "similarity": round(one.similarity, 3)} for one in found
        ]
        return [one.pair for one in found]

    def _built(self, pairs: Sequence[Pair] = ()) -> dict[str, Criterion]:
        """The criteria by what their terms are called; a name that comes again gets a number."""
        built: dict[str, Criterion] = {}
        for one in self.criteria:
            ((name, settings),) = one.items()
            short = name.rpartition(":")[2]
            count = sum(known.partition(" ")[0] == short for known in built)
            kind = criterion_class(name)
            made = kind(**with_pairs(kind, settings, pairs))
            built[f"{short} {count + 1}" if count else short] = made
        return built

    def _alone(self, untaught: Student, run: Context) -> Student:
        """The student as it would be without a teacher: trained on the task through the same
        batches, since these depend on the label, with a checkpoint of its own."""

        def tell(event: dict[str, Any]) -> None:
            run.tell({**event, "label": ALONE} if event.get("label") == self._label else event)

        objective = TaskObjective(run.task, self.label_smoothing)
        apart = replace(run.at(ALONE), tell=tell, histories={})
        return apart.train(untaught, self._training(), objective, label=self._label)

    def _diagnosis(
        self,
        trained: Student,
        alone: Student | None,
        teacher: Source,
        criteria: dict[str, Criterion],
        run: Context,
    ) -> dict[str, Any]:
        """What was seen of this distillation, as JSON. teacher: who answers to examples that aren't
        augmented: a network or a table; of anything else nothing is asked."""
        measured = measure(
            trained.module,
            task=run.task,
            data=run.data,
            teacher=teacher if isinstance(teacher, Teacher | Table) else None,
            knows_validation=not isinstance(teacher, Table),
            criteria=criteria,
            task_weight=self._task_weight(criteria),
            history=run.histories[self._label],
            alone=alone.module if alone is not None else None,
        )
        found = diagnosis(measured)
        for one in found["findings"] if self.diagnose else []:
            run.tell({"event": "note", "text": f"{one['says']} {one['try']}".strip()})
        return found

    def _task_weight(self, criteria: dict[str, Criterion]) -> float:
        if self.task_weight is not None:
            return self.task_weight
        return min((one.beside_task for one in criteria.values()), default=1.0)

    def _training(self) -> Training:
        return Training(**{name: getattr(self, name) for name in Training.model_fields})
