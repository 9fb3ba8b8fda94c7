"""The ways to run a teacher on a machine. Each leaves the person's module as it was."""

from __future__ import annotations

import copy
import inspect
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


class Compiled(ChannelsLast):
    """That copy compiled by `torch.compile` for batches of one shape, inner layers and all; its
    convolutions absorb what follows them. Needs a C++ compiler on the machine."""

    name = "compiled"

    @classmethod
    def fits(cls, module: nn.Module, batch: Batch, layers: tuple[str, ...]) -> bool:
        # before PyTorch could keep compilations apart, a process had but eight of one function
        apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        return batch.inputs.device.type == "cpu" and apart

    def __init__(
        self, module: nn.Module, task: Task, batch: Batch, layers: tuple[str, ...]
    ) -> None:
        from torch._inductor import config

        super().__init__(module, task, batch, layers)
        how: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True}
        self._compiled = torch.compile(_Answering(self._module, layers), **how)
        # in this process: a pool of compilers would outlive the training
        with config.patch(freezing=True, compile_threads=1):
            self._answer(batch)

    def made_from(self, module: nn.Module, device: torch.device) -> nn.Module:
        return super().made_from(module, device).eval().requires_grad_(False)

    def __call__(self, batch: Batch) -> Signal:
        # batches of another shape (an epoch's last) run as they are rather than be compiled for
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._answer(batch)

    def _answer(self, batch: Batch) -> Signal:
        args, kwargs = self.arguments(batch)
        with torch.no_grad(), torch.autocast(batch.inputs.device.type, enabled=False):
            output, features = self._compiled(*args, **kwargs)
        return Signal(self._task.logits(output), features)


class CompiledBFloat16(Compiled):
    """The copy in bfloat16, compiled."""

    name = "compiled-bfloat16"
    dtype = torch.bfloat16

    @classmethod
    def fits(cls, module: nn.Module, batch: Batch, layers: tuple[str, ...]) -> bool:
        return super().fits(module, batch, layers) and computes_bfloat16()


class _Answering(nn.Module):
    """A network whose outputs are its own and those of its inner layers: hooks that come and go
    call by call can't be compiled, so these stay. The network must be a copy."""

    def __init__(self, network: nn.Module, layers: tuple[str, ...]) -> None:
        super().__init__()
        self._network = network
        self._hooks = ExitStack()  # closed by nobody
        self._features = self._hooks.enter_context(Capture(network, layers)())

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        self._features.clear()
        output = self._network(*args, **kwargs)
        return output, dict(self._features)


FASTER: tuple[type[Form], ...] = (ChannelsLast, BFloat16, Exported, CompiledBFloat16, Compiled)
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
