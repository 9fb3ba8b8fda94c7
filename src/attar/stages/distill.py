"""The stage that teaches a student what its teacher knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import nn

from attar.data.base import Data
from attar.distill.criterion import Criterion, criterion_class, written
from attar.distill.objective import DistillObjective
from attar.distill.pairing import pair_layers, with_pairs
from attar.distill.pairs import Pair
from attar.errors import UsageError
from attar.files import is_reference, locate
from attar.models import build, load_checkpoint, resolve
from attar.stages.base import Context, Stage, stages
from attar.student import Student
from attar.training.config import Training
from attar.training.evaluation import device_of, to_device

LABEL = "distill"
BESIDE_ANSWERS = 0.1
"""What the task's own loss weighs beside criteria that teach the answers too (Hinton et al. 2015:
"a considerably lower weight" on the labels); beside others it weighs 1."""
PAIRED_BY = 256
"""Examples by which layers are paired, spread over the training split."""
PAIRED_AT_ONCE = 64
"""Of these at most so many in a batch, whatever their size."""

Written = Annotated[dict[str, dict[str, Any]], BeforeValidator(written)]


class Mentor(BaseModel):
    """A network to learn from that is not the recipe's teacher: a model's name, its arguments, and
    where its weights are (`checkpoint`, unless the library brings them)."""

    model_config = ConfigDict(extra="forbid")

    model: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None

    def load(self, data: Data) -> nn.Module:
        """The network with its weights. Raises the `AttarError` of what is missing or wrong."""
        spec = resolve(
            self.model,
            self.arguments,
            channels=data.shape[0] if data.shape else None,
            classes=len(data.classes) or None,
            shape=data.shape,
        )
        module = build(spec, pretrained=self.checkpoint is None)
        if self.checkpoint is not None:
            load_checkpoint(module, self.checkpoint)
        return module.eval()


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

    @property
    def files(self) -> list[Path]:
        names = [name for one in self.criteria for name in one]
        found = []
        if self.teacher is not None:
            names.append(self.teacher.model)
            found += [Path(self.teacher.checkpoint)] if self.teacher.checkpoint else []
        return found + [locate(name)[0] for name in names if is_reference(name)]

    def apply(self, student: Student, run: Context) -> Student:
        mentor = self.teacher.load(run.data) if self.teacher is not None else run.teacher
        if mentor is None and self.criteria:
            raise UsageError("distill needs a teacher, and this recipe gives it none here")
        criteria = self._built(self._pairs(student.module, mentor, run))
        layers = [path for one in criteria.values() for path in one.teacher_layers]
        training = self._training()
        asked = mentor if any(one.asks_teacher for one in criteria.values()) else None
        source, run = run.taught(asked, training, LABEL, layers=layers, views=self.views)
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
        trained = run.train(student, training, objective, label=LABEL)
        run.found["teacher"] = dict(source.choice)
        return trained

    def _pairs(self, student: nn.Module, mentor: nn.Module | None, run: Context) -> list[Pair]:
        """The pairs for the criteria that leave them open (`layers: auto`)."""
        given = [settings.get("layers") for each in self.criteria for settings in each.values()]
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

    def _task_weight(self, criteria: dict[str, Criterion]) -> float:
        if self.task_weight is not None:
            return self.task_weight
        teaches = any(one.teaches_answers for one in criteria.values())
        return BESIDE_ANSWERS if teaches else 1.0

    def _training(self) -> Training:
        return Training(**{name: getattr(self, name) for name in Training.model_fields})
