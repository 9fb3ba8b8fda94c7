"""How a student recovers from a lossy stage."""

from __future__ import annotations

from torch import nn

from attar.distill.criteria.kd import KD
from attar.distill.objective import DistillObjective
from attar.distill.signal import Source
from attar.distill.teacher import Teacher
from attar.tasks.base import Task
from attar.training.config import Training
from attar.training.objective import Objective, TaskObjective


def recovery_objective(
    task: Task, teacher: nn.Module | Source | None, training: Training
) -> Objective:
    """What a recovery minimises: `0.1 · L_task + 0.9 · KD` at temperature 4, against the teacher.

    These are `kd`'s own defaults: the teacher's soft targets tell a damaged student more about each
    example than its label does, and the label keeps it from the teacher's mistakes. Without a
    teacher, the task's own loss. `training` gives the labels' smoothing.

    Example:
        >>> objective = recovery_objective(task, teacher, Training())  # doctest: +SKIP
        >>> loss = sum(objective(student, batch).values())  # doctest: +SKIP
    """
    smoothing = training.label_smoothing
    if teacher is None:
        return TaskObjective(task, smoothing)
    source = Teacher(teacher, task) if isinstance(teacher, nn.Module) else teacher
    return DistillObjective(task, source, {"kd": KD()}, label_smoothing=smoothing)
