"""A task: the one place that knows what data mean. Everything else asks it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attar.data.base import Batch, Data, Split
from attar.registry import Registry

tasks: Registry[type[Task]] = Registry("task", "attar.tasks")


@dataclass(frozen=True)
class Metric:
    """A figure of merit over per-example statistics.

    Example: accuracy's `value` is the mean of a column of zeros and ones.
    """

    name: str
    unit: str
    """`fraction` for what people read in %."""
    higher_is_better: bool = True


class Verdicts(NamedTuple):
    """What was answered to each example, all (N,).

    right: bool, whether the answer is the label. label, answer: int64, places in the classes.
    confidence: float64, the probability given to the answer.
    """

    right: np.ndarray
    label: np.ndarray
    answer: np.ndarray
    confidence: np.ndarray


class Task(ABC):
    """What "correct" means for one kind of data."""

    name: ClassVar[str]
    metric: Metric
    """The one the budget judges."""

    @abstractmethod
    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the network is called with for this batch."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @abstractmethod
    def logits(self, output: Any) -> Tensor:
        """The tensor that response criteria compare, (N, classes), from the network's output."""

    @abstractmethod
    def statistics(self, output: Any, batch: Batch) -> np.ndarray:
        """Per-example statistics, float64 (N, k): enough to compute every metric, and to resample
        for intervals and paired drops. `output` may be a tensor or a NumPy array."""

    @abstractmethod
    def value(self, statistics: np.ndarray) -> float:
        """The metric of these examples."""

    def hits(self, statistics: np.ndarray) -> np.ndarray | None:
        """Zeros and ones, (N,), where the metric is the share of ones: closed-form intervals are
        used then. `None` for any other metric."""
        return None

    def further_values(self, statistics: np.ndarray) -> dict[str, float]:
        """Other metrics worth showing beside the judged one, by name (AUC beside accuracy)."""
        return {}

    @abstractmethod
    def agreement(self, a: Any, b: Any) -> np.ndarray:
        """Per example, whether two outputs give the same answer: bool (N,)."""

    @abstractmethod
    def example(self, data: Data, count: int = 2) -> tuple[Tensor, ...]:
        """Inputs to trace and export with, batch first, from real validation examples."""

    @abstractmethod
    def describe(self, data: Data) -> dict[str, Any]:
        """`{"inputs": [...], "outputs": [...]}` as `manifest.json` has them."""

    @abstractmethod
    def read(self, path: Path, inputs: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        """An input from a person's file, prepared as the manifest's `inputs` say, batch of one.
        Raises `DataError` for a file that can't be read."""

    @abstractmethod
    def answer(self, output: Any, outputs: list[dict[str, Any]]) -> list[tuple[str, float]]:
        """What one output says, for people: (class name, probability), best first."""

    def check_output(self, output: Any, data: Data) -> None:  # noqa: B027 - not every task can
        """Raises `DataError` where a network's output can't be an answer about these data: another
        number of classes, for instance. Ask it once, before anything long."""

    def verdicts(self, statistics: np.ndarray) -> Verdicts | None:
        """Every example's answer, for the report; `None` for tasks without right and wrong."""
        return None

    def per_class(self, statistics: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray] | None:
        """The share of right answers in each of `data.classes`, float64, NaN for a class without
        examples, and the number of its examples, int64; `None` for tasks without classes."""
        return None

    def show(self, split: Split, indices: Sequence[int], data: Data) -> list[str]:
        """Each of these examples as a data URI of a PNG picture, for the report; empty for tasks
        whose examples are no pictures."""
        return []

    def dynamic_shapes(self, example: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
        """Which dimensions of each input vary at run time. Default: the batch."""
        batch = torch.export.Dim("batch", min=1)
        return tuple({0: batch} for _ in example)
