"""The joint loss: the task's own, and what the criteria make of the teacher."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from attar.data.base import Batch
from attar.distill.capture import Capture
from attar.distill.criterion import Criterion
from attar.distill.forms import frozen
from attar.distill.signal import Signal, Source
from attar.tasks.base import Task
from attar.training.objective import Objective


class DistillObjective(Objective):
    """`task_weight · L_task + Σ weightᵢ · L_kdᵢ`, a term each, by one call of each network.

    The article's `L_D + β · L_kd` is `task_weight=1` with one criterion of weight β. Terms have the
    names in `criteria`; the task's own is `task`, over the examples that have a label, and is left
    out for batches without labels.

    The criteria are submodules: their adapters are trained and checkpointed with the student, and
    stay behind when it is handed on. The teacher is no submodule: nothing of it is trained, saved
    or put in training mode.

    Example:
        >>> hint = Feature(layers=["layer3"])  # doctest: +SKIP
        >>> teacher = Teacher(net, task, layers=hint.teacher_layers)  # doctest: +SKIP
        >>> objective = DistillObjective(
        ...     task, teacher, {"kd": KD(), "hint": hint})  # doctest: +SKIP
        >>> objective.prepare(student, batch)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *objective.parameters()])  # doctest: +SKIP
        >>> loss = sum(objective(student, batch).values())  # doctest: +SKIP
    """

    def __init__(
        self,
        task: Task,
        teacher: Source,
        criteria: Mapping[str, Criterion],
        *,
        task_weight: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._task = task
        self._teacher = teacher
        self._names = tuple(criteria)
        self.criteria = nn.ModuleList(criteria.values())
        self._paths = tuple(
            dict.fromkeys(path for one in criteria.values() for path in one.student_layers)
        )
        self._task_weight = task_weight
        self._label_smoothing = label_smoothing
        self._capture: Capture | None = None
        self._settled = False

    def prepare(self, student: nn.Module, batch: Batch, examples: int | None = None) -> None:
        """Shows both networks one batch: makes the adapters, and finds out now what would fail.

        examples: how many the training split has, which some criteria (`crd`) need to know.
        The student is left as it was. Raises `UsageError`: a layer that isn't there, features that
        can't be compared, other classes than the teacher's.
        """
        with frozen(list(student.modules())):
            _, own = self._answer(student, batch)
            wanted = self._teacher.signal(batch)
            for criterion in self._each():
                if examples is not None:
                    criterion.expect(examples)
                criterion.prepare(own, wanted)
                with frozen(list(criterion.modules())):  # some remember what they are taught
                    criterion(own, wanted, batch)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self._teacher.start_epoch(epoch)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if not self._settled:
            self._teacher.settle(batch)
            self._settled = True
        output, own = self._answer(model, batch)
        wanted = self._teacher.signal(batch)
        terms = {
            name: criterion.weight * criterion(own, wanted, batch)
            for name, criterion in zip(self._names, self._each(), strict=True)
        }
        if self._task_weight and batch.targets is not None:
            loss = self._task.loss(output, batch, label_smoothing=self._label_smoothing)
            terms["task"] = self._task_weight * loss
        return terms

    def _answer(self, model: nn.Module, batch: Batch) -> tuple[object, Signal]:
        """The student's output as it comes, and as criteria see it."""
        if self._capture is None or self._capture.module is not model:
            self._capture = Capture(model, self._paths)
        args, kwargs = self._task.arguments(batch)
        with self._capture() as features:
            output = model(*args, **kwargs)
        return output, Signal(self._task.logits(output), features)

    def _each(self) -> list[Criterion]:
        return list(self.criteria)  # type: ignore[arg-type]
