"""The edit that sharing leaves: which weights of which tensors are one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attar.errors import CheckpointError
from attar.share.codebook import Codebook, pack, unpack
from attar.student import Edit


@dataclass(frozen=True)
class Assignment:
    """Who shares with whom in one tensor.

    size: the number of values. indices: each weight's place in the codebook, the tensor's shape.
    zero: the place of the value that stays exactly zero, or `None`.
    """

    size: int
    indices: Tensor
    zero: int | None

    @classmethod
    def of(cls, codebook: Codebook) -> Assignment:
        """The assignment of a fresh codebook."""
        places = (codebook.values == 0).nonzero().flatten().tolist()
        return cls(len(codebook.values), codebook.indices, places[0] if places else None)

    @property
    def bits(self) -> int:
        """What one index takes."""
        return _bits(self.size)


class Shared(Edit):
    """Tensors whose weights take a few values each: equal weights stay equal, zeros stay zero.

    Only the assignment is the edit's; the values live in the network's own weights, where they are
    trained: the gradient of every weight becomes its cluster's mean, which projects the step onto
    the networks that share (Deep Compression, Han et al., ICLR 2016, sums instead: the same
    direction times the cluster's size, which would make one learning rate mean thousands of them).
    """

    kind: ClassVar[str] = "shared"

    def __init__(self, assignments: dict[str, Assignment]) -> None:
        self.assignments = assignments
        """By parameter path."""
        self._placed: dict[tuple[str, torch.device], Tensor] = {}

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": {
                path: {"size": a.size, "shape": list(a.indices.shape), "zero": a.zero}
                for path, a in self.assignments.items()
            }
        }

    def tensors(self) -> dict[str, Tensor]:
        return {path: pack(a.indices, a.bits) for path, a in self.assignments.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Shared:
        return cls(
            {
                path: _assignment(path, entry, tensors.get(path))
                for path, entry in record["tensors"].items()
            }
        )

    def before_step(self, module: nn.Module) -> None:
        """Every weight's gradient becomes the mean over its cluster."""
        for path, assignment in self.assignments.items():
            gradient = module.get_parameter(path).grad
            if gradient is not None:
                gradient.copy_(self._tied(path, assignment, gradient))

    @torch.no_grad()
    def after_step(self, module: nn.Module) -> None:
        """Every weight becomes its cluster's mean."""
        for path, assignment in self.assignments.items():
            weight = module.get_parameter(path)
            weight.copy_(self._tied(path, assignment, weight))

    def check(self, module: nn.Module) -> list[str]:
        return [
            sentence
            for path, assignment in self.assignments.items()
            for sentence in self._broken(module, path, assignment)
        ]

    def codebook(self, module: nn.Module, path: str) -> Tensor:
        """The values of one shared tensor as they are now, (size,)."""
        assignment = self.assignments[path]
        weight = module.get_parameter(path).detach()
        return self._means(path, assignment, weight).to(weight.dtype)

    def per_tensor_weights(self) -> set[str]:
        """The shared tensors: quantized with one scale for the whole tensor, equal weights stay
        equal and the number of values holds; with a scale a channel, it would grow."""
        return set(self.assignments)

    def summary(self) -> str:
        sizes = [a.size for a in self.assignments.values()]
        if not sizes:
            return "no tensor shared"
        span = str(max(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        return f"{len(sizes)} tensors of {span} values"

    def _broken(self, module: nn.Module, path: str, assignment: Assignment) -> list[str]:
        try:
            weight = module.get_parameter(path).detach()
        except AttributeError:
            return [f"{path} is shared but no longer in the network"]
        if weight.shape != assignment.indices.shape:
            was, now = tuple(assignment.indices.shape), tuple(weight.shape)
            return [f"{path} was shared as {was} and is {now} now"]
        values = self._means(path, assignment, weight).to(weight.dtype)
        spread = int((weight != values[self._indices(path, assignment, weight.device)]).sum())
        if spread:
            return [f"{path} has {spread} weights that left their shared value"]
        if assignment.zero is not None and values[assignment.zero] != 0:
            return [f"{path}'s zeros are {float(values[assignment.zero]):.3g} now"]
        return []

    def _tied(self, path: str, assignment: Assignment, tensor: Tensor) -> Tensor:
        means = self._means(path, assignment, tensor)
        if assignment.zero is not None:
            means[assignment.zero] = 0
        return means.to(tensor.dtype)[self._indices(path, assignment, tensor.device)]

    def _means(self, path: str, assignment: Assignment, tensor: Tensor) -> Tensor:
        """Each cluster's mean in float64, where equal float32 weights add up without rounding."""
        indices = self._indices(path, assignment, tensor.device).flatten()
        sums = torch.zeros(assignment.size, dtype=torch.float64, device=tensor.device)
        sums.index_add_(0, indices, tensor.flatten().double())
        return sums / torch.bincount(indices, minlength=assignment.size)

    def _indices(self, path: str, assignment: Assignment, device: torch.device) -> Tensor:
        """The indices where the weights are, as integers that can index; kept from step to step."""
        key = (path, device)
        if key not in self._placed:
            self._placed[key] = assignment.indices.to(device, torch.int64)
        return self._placed[key]


def _assignment(path: str, entry: dict[str, Any], packed: Tensor | None) -> Assignment:
    size, shape = int(entry["size"]), torch.Size(entry["shape"])
    damaged = CheckpointError(
        f"the student's shared tensor {path} is damaged: its indices don't fit"
    )
    bits = _bits(size)
    if not 1 <= size <= 256 or packed is None or packed.numel() != -(-shape.numel() * bits // 8):
        raise damaged
    indices = unpack(packed, bits, shape.numel()).reshape(shape)
    if int(indices.max()) >= size:
        raise damaged
    return Assignment(size, indices, entry["zero"])


def _bits(size: int) -> int:
    return max(1, (size - 1).bit_length())
