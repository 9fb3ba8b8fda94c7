"""Edits: the record of what made a student what it is, and the promises that come with it.

Every lossy stage adds one. An edit can be saved as JSON and tensors, replayed onto a freshly built
network, and asked whether its promise (its *constraint*) still holds. Kinds register themselves
from the packages that make them (`prune`, `share`, `quantize`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from attar.errors import CheckpointError
from attar.registry import near

Rounds = Literal["nothing", "weights", "activations"]


class RowGrid(NamedTuple):
    """A grid for each row of a tensor (its first axis), or for each group of weights in a row.

    steps: float32 (rows, groups); a weight is an integer times its step, rounded to float32, and
    0.0 for 0. length: how many weights a group has, `None` for the whole row; the last one of a row
    may have fewer.
    """

    steps: Tensor
    length: int | None = None


class Edit(ABC):
    """One change to a network. Subclasses set `kind` and are found by it."""

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Edit]]] = {}
    rounds: ClassVar[Rounds] = "nothing"
    """What the deployed graph puts on a grid, of what the network computes in float: an exported
    file is held to PyTorch more loosely where it is `activations`."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "kind" in cls.__dict__:
            Edit.kinds[cls.kind] = cls

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""

    def tensors(self) -> dict[str, Tensor]:
        """What is too large for JSON, by name; saved beside it as safetensors."""
        return {}

    @classmethod
    @abstractmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
        """The edit that `to_json` and `tensors` describe."""

    def replay(self, module: nn.Module) -> None:  # noqa: B027 - most edits change no structure
        """Gives a freshly built network this edit's structure, before weights are loaded."""

    def before_step(self, module: nn.Module) -> None:  # noqa: B027
        """Called between backward and the optimizer's step: may change gradients in place."""

    def after_step(self, module: nn.Module) -> None:  # noqa: B027
        """Called after the optimizer's step: restores the promise on the weights in place."""

    def check(self, module: nn.Module) -> list[str]:
        """What of the promise is broken, a sentence each; empty when it holds."""
        return []

    def settled(self, module: nn.Module) -> Edit:
        """The edit as it is best kept with these weights, asked just before a copy of the student
        is packed. It may change weights in place where the deployed graph stays the same."""
        return self

    @classmethod
    def implied(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `tensors` that follow from `to_json`'s record and the network's state dict. A
        packed file leaves them out where they are the same bit for bit."""
        return {}

    @classmethod
    def shortened(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """`to_json`'s record without what follows from the state dict: what a packed file holds."""
        return record

    @classmethod
    def lengthened(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The record that was shortened. Raises `CheckpointError` where weights are missing."""
        return record

    def runs(self) -> dict[str, int]:
        """By parameter path, the length of runs of weights, one after the other in the flattened
        tensor, of which only a few different ones occur (a codebook of vectors)."""
        return {}

    def row_grids(self) -> dict[str, RowGrid]:
        """By parameter path, the grids that a tensor's weights lie on once the edit is settled."""
        return {}

    def graph(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
    ) -> nn.Module | None:
        """The disposable graph to export in the module's stead (a quantized one); `None`: none."""
        return None

    def summary(self) -> str:
        """One line for people."""
        return self.kind


def edit_from(record: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    """The edit of `record["kind"]`. Raises `CheckpointError` for a kind this version lacks, and for
    a damaged record."""
    with kind_of(record) as kind:
        return kind.from_json(record, tensors)


@contextmanager
def kind_of(record: Any) -> Iterator[type[Edit]]:
    """The class of `record["kind"]`, for what is done with the record. Raises as `edit_from`."""
    name = str(record.get("kind") if isinstance(record, dict) else None)
    if name not in Edit.kinds:
        raise CheckpointError(
            f"the student has an edit of unknown kind {name!r}{near(name, list(Edit.kinds))}; "
            "it may come from a newer Attar"
        )
    try:
        yield Edit.kinds[name]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the student's record of kind {name!r} is damaged: {type(error).__name__}: {error}"
        ) from None


def submodule(module: nn.Module, path: str, what: str) -> nn.Module:
    """The layer that an edit changed. what: what messages say was done to it, before the path.

    Raises `CheckpointError` for a network that lacks it.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{what} {path}, which the network doesn't have") from None
