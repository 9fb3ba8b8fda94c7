"""What data are to the rest of Attar: three splits of examples, and how inputs are prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

UNLABELLED = -1
"""The target of an example without a label, among others that have one."""


class Batch(NamedTuple):
    """One step's examples.

    inputs: what the network takes, normalised: float32, for images (N, C, H, W).
    targets: what is right: for classes int64 (N,), `UNLABELLED` (-1) for examples without a label;
        `None` where none has one.
    indices: int64 (N,), each example's place in its split.
    """

    inputs: Tensor
    targets: Tensor | None
    indices: Tensor


class Split(Protocol):
    """Examples of one part of the data. `ArraySplit` holds them in memory; a loader can be one."""

    name: str
    """train, validation or test."""

    @property
    def fingerprint(self) -> str:
        """A hash of content and preparation: equal splits have equal ones on any machine."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        epoch: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """One pass. Order and augmentation depend on (seed, epoch) alone, so that a pass can be
        repeated. `rank` of `world` processes gets its share of every batch's examples."""
        ...

    def pick(self, indices: Sequence[int]) -> Batch:
        """The examples at these places, not augmented, in the order given."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set ready to train, choose and report on."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    """One example's input shape, without the batch: (C, H, W) for images."""
    preparation: dict[str, Any]
    """How a raw input becomes what the network takes, in the manifest's words (see
    `attar.tasks.base.Task.describe`): for images `layout`, `color`, `resize`, `scale`, `mean`,
    `std`."""
    notes: list[str] = field(default_factory=list)
    """What was decided on the person's behalf, in sentences: said by `run`, kept in the report."""
    unlabelled: Split | None = None
    """Examples without labels (all `UNLABELLED`), which `distill` learns from besides `train`."""

    @property
    def fingerprint(self) -> str:
        """A hash over all splits."""
        splits = [self.train, self.validation, self.test]
        splits += [self.unlabelled] if self.unlabelled is not None else []
        return "-".join(s.fingerprint[:16] for s in splits)


def mean_of_labelled(losses: Tensor, targets: Tensor) -> Tensor:
    """The mean of `losses` (N,) over the examples whose `targets` (N,) aren't `UNLABELLED`; 0, with
    gradients of 0, where none has a label.

    Example:
        >>> import torch
        >>> mean_of_labelled(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3, 0, UNLABELLED])).item()
        1.5
    """
    labelled = targets != UNLABELLED
    return losses.where(labelled, 0).sum() / labelled.sum().clamp_min(1)
