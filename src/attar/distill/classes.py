"""Which of a teacher's classes are the student's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import UsageError
from attar.tasks.base import Task
from attar.training.evaluation import device_of, evaluating

NAME = "shared_classes"


def share_classes(
    network: nn.Module, classes: Sequence[int], task: Task, example: tuple[Any, ...]
) -> None:
    """Makes a network answer with these of its outputs alone, in this order; in place, for a
    network that was loaded to teach.

    classes: places among its outputs, from 0. example: its arguments, batch first: it is called
    once to see how many outputs it has. Its layers keep their paths. The places are a buffer of it,
    and so part of what its stored answers are known by.

    Raises `UsageError` for an output that it doesn't have, or that is named twice.

    Example:
        >>> from attar.tasks.image_classification import ImageClassification
        >>> net, x = nn.Linear(2, 5), torch.randn(3, 2)
        >>> whole = net(x)
        >>> share_classes(net, [4, 0], ImageClassification(), (x,))
        >>> torch.equal(net(x), whole[:, [4, 0]])
        True
    """
    require_distinct(classes)
    device = device_of(network)
    with evaluating(network):
        count = task.logits(network(*(x.to(device) for x in example))).shape[-1]
    unknown = [place for place in classes if not 0 <= place < count]
    if unknown:
        raise UsageError(
            f"the teacher's classes name the output {unknown[0]}, and the teacher has {count:,}: "
            f"0 to {count - 1}"
        )
    network.register_buffer(NAME, torch.tensor(list(classes), device=device))
    network.register_forward_hook(partial(_shared, task))


def shared_classes(network: nn.Module) -> Tensor | None:
    """The places of the outputs that a network answers with, int64 (classes,), where
    `share_classes` chose them; else `None`."""
    return dict(network.named_buffers(recurse=False)).get(NAME)


def require_distinct(classes: Sequence[int]) -> None:
    """Raises `UsageError` where a place comes twice."""
    twice = [place for n, place in enumerate(classes) if place in classes[:n]]
    if twice:
        raise UsageError(f"the teacher's classes name the output {twice[0]} twice")


def _shared(task: Task, module: nn.Module, args: Any, output: Any) -> Tensor:
    return task.logits(output)[..., shared_classes(module)]
