"""What a training minimises: a module that turns a network and a batch into named loss terms."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from attar.data.base import Batch
from attar.tasks.base import Task


class Objective(nn.Module):
    """Loss terms of one step, already weighted; the loop minimises their sum.

    A subclass may hold parameters of its own (adapters between layers of different widths): they
    are trained and checkpointed with the network and left behind when training ends.
    """

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars by term name. `model` is to be called once."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, counted from 0."""

    def undecayed(self) -> Iterable[nn.Parameter]:
        """Those of its own parameters that weight decay would spoil; by default none."""
        return ()

    def judged(self, model: nn.Module) -> nn.Module:
        """The network that is validated after an epoch: what `model` will be when it is deployed;
        by default `model` itself."""
        return model

    def kept(self) -> dict[str, Tensor]:
        """Entries of its own state that belong to the weights of an epoch, and come back with them
        when that epoch's are the ones kept; by default none."""
        return {}


class TaskObjective(Objective):
    """Just the task's own loss: how a teacher is trained."""

    def __init__(self, task: Task, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self._task = task
        self._label_smoothing = label_smoothing

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        args, kwargs = self._task.arguments(batch)
        output = model(*args, **kwargs)
        return {"task": self._task.loss(output, batch, label_smoothing=self._label_smoothing)}
