"""A network's per-example statistics and outputs over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from attar.data.base import Batch, Split
from attar.tasks.base import Task


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each submodule's own mode is back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a network caches must stay trainable
            yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def evaluating_all(module: nn.Module) -> Iterator[None]:
    """As `evaluating`, but modules that hold others take it for training: branches that only run
    then (auxiliary classifiers) run too, while norms and dropout do as in evaluation."""
    with evaluating(module):
        for m in module.modules():
            m.training = next(m.children(), None) is not None
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where the module's first parameter or buffer lives; the CPU for one without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    targets = None if batch.targets is None else batch.targets.to(device, non_blocking=True)
    return Batch(
        batch.inputs.to(device, non_blocking=True),
        targets,
        batch.indices.to(device, non_blocking=True),
    )


def outputs_of(
    module: nn.Module, split: Split, task: Task, *, batch_size: int = 256
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """The logits of every batch, in the split's order, as float32 on the CPU."""
    device = device_of(module)
    for batch in split.batches(batch_size):
        args, kwargs = task.arguments(to_device(batch, device))
        with evaluating(module):  # not around the loop: what is between two batches is the caller's
            logits = task.logits(module(*args, **kwargs)).float().cpu()
        yield logits, batch


def session_outputs(
    session: Callable[..., tuple[np.ndarray, ...]],
    split: Split,
    task: Task,
    *,
    batch_size: int = 64,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """As `outputs_of`, of an exported model: arrays in, arrays out; its first output is taken."""
    for batch in split.batches(batch_size):
        args, _ = task.arguments(batch)
        yield session(*(a.numpy() for a in args))[0], batch


def statistics_of(
    module: nn.Module, split: Split, task: Task, *, batch_size: int = 256
) -> np.ndarray:
    """The task's per-example statistics over a split, (N, k), in the split's order."""
    return np.concatenate(
        [task.statistics(o, b) for o, b in outputs_of(module, split, task, batch_size=batch_size)]
    )
