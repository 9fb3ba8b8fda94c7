"""What criteria see of a network on one batch, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from attar.data.base import Batch

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Signal(NamedTuple):
    """One network's answers to a batch.

    logits: (N, classes); any further positions stand before the classes, (N, T, classes).
    features: outputs of inner layers by the network's own module path, batch first.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = NOTHING


class Source(Protocol):
    """Where a teacher's signals come from: a live network, a store, a file. Criteria can't tell."""

    @property
    def choice(self) -> Mapping[str, Any]:
        """How it answers, for the record: `form` in one word, and what else is worth knowing."""
        ...

    def signal(self, batch: Batch) -> Signal:
        """The teacher's signal for these examples, without gradients, on their device."""
        ...

    def settle(self, batch: Batch) -> None:
        """Told once, with the first real batch, before a training: time to get ready to be fast."""
        ...

    def start_epoch(self, epoch: int) -> None:
        """Told before each epoch of a training, counted from 0."""
        ...


class Nobody:
    """The source where no criterion asks a teacher: its signals are empty."""

    choice: Mapping[str, str] = MappingProxyType({"form": "nobody"})

    def signal(self, batch: Batch) -> Signal:
        return Signal(batch.inputs.new_empty(0))

    def settle(self, batch: Batch) -> None: ...

    def start_epoch(self, epoch: int) -> None: ...
