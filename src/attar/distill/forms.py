"""The ways to run a teacher on a machine. Each leaves the person's module as it was."""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from attar.data.base import Batch
from attar.distill.capture import Capture
from attar.distill.signal import Signal
from attar.tasks.base import Task
from attar.training.evaluation import device_of
from attar.training.precision import computes_bfloat16


class Form(ABC):
    """One way to run a network. It is made with a batch like those it will answer."""

    name: ClassVar[str]

    @classmethod
    def fits(cls, module: nn.Module, batch: Batch, layers: tuple[str, ...]) -> bool:
        """Whether it may work, and may be the fastest, here."""
        return True

    @abstractmethod
    def __init__(
        self, module: nn.Module, task: Task, batch: Batch, layers: tuple[str, ...]
    ) -> None: ...

    @abstractmethod
    def __call__(self, batch: Batch) -> Signal:
        """The signal for a batch: in eval mode, without gradients."""


class Original(Form):
    """The module as its owner runs it; a copy only where the data are on another device."""

    name = "original"

    def __init__(
        self, module: nn.Module, task: Task, batch: Batch, layers: tuple[str, ...]
    ) -> None:
        self._task = task
        self._module = self.made_from(module, batch.inputs.device)
        self._modules = list(self._module.modules())
        self._capture = Capture(self._module, layers)

    def made_from(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The network that answers."""
        return module if device_of(module) == device else copy.deepcopy(module).to(device)

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the network is called with."""
        return self._task.arguments(batch)

    def __call__(self, batch: Batch) -> Signal:
        args, kwargs = self.arguments(batch)
        exactly = torch.autocast(batch.inputs.device.type, enabled=False)
        with frozen(self._modules), exactly, self._capture() as features:
            output = self._module(*args, **kwargs)
        return Signal(self._task.logits(output), features)


class ChannelsLast(Original):
    """A copy with channels innermost in memory, as fast convolutions want them."""

    name = "channels-last"
    dtype: torch.dtype | None = None

    @classmethod
    def fits(cls, module: nn.Module, batch: Batch, layers: tuple[str, ...]) -> bool:
        return any(isinstance(m, nn.Conv2d) for m in module.modules())

    def made_from(self, module: nn.Module, device: torch.device) -> nn.Module:
        made = copy.deepcopy(module).to(device, self.dtype)
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _pytree.tree_map_only(Tensor, self._laid_out, super().arguments(batch))

    def _laid_out(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if x.dim() == 4 else torch.preserve_format
        return x.to(self.dtype if x.is_floating_point() else None, memory_format=layout)


class BFloat16(ChannelsLast):
    """That copy in bfloat16."""

    name = "bfloat16"
    dtype = torch.bfloat16

    @classmethod
    def fits(cls, module: nn.Module, batch: Batch, layers: tuple[str, ...]) -> bool:
        return computes_bfloat16()


class Exported(Form):
    """The network exported to ONNX Runtime, its graph optimised for this processor."""

    name = "onnxruntime"

    @classmethod
    def fits(cls, module: nn.Module, batch: Batch, layers: tuple[str, ...]) -> bool:
        return batch.inputs.device.type == "cpu" and not layers

    def __init__(
        self, module: nn.Module, task: Task, batch: Batch, layers: tuple[str, ...]
    ) -> None:
        from attar.runtimes.onnxruntime import OnnxRuntime
        from attar.student import Student

        self._task = task
        args, _ = task.arguments(batch)
        example = tuple(x[:2] for x in args)
        runtime = OnnxRuntime()
        with tempfile.TemporaryDirectory() as folder:
            runtime.export(
                Student(module),
                Path(folder),
                example=example,
                dynamic_shapes=task.dynamic_shapes(example),
                names=([f"input{i}" for i in range(len(example))], ["logits"]),
            )
            self._session = runtime.session(Path(folder), threads=torch.get_num_threads())

    def __call__(self, batch: Batch) -> Signal:
        args, _ = self._task.arguments(batch)
        (logits,) = self._session(*(x.contiguous().numpy() for x in args))
        return Signal(torch.from_numpy(logits))


FASTER: tuple[type[Form], ...] = (ChannelsLast, BFloat16, Exported)
"""What may be faster than `Original`, the cheapest to try first."""


@contextmanager
def frozen(modules: list[nn.Module]) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's own mode is back afterwards.

    Not inference mode: what is answered takes part in the student's loss."""
    training = [m for m in modules if m.training]
    for m in training:
        m.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
