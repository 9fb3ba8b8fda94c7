"""Penalties in training that prepare a cut: what is to go is small before it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attar.data.base import Batch
from attar.prune.blocks import BlocksRemoved, within
from attar.prune.groups import ChannelGraph, Place
from attar.prune.removal import ChannelsRemoved
from attar.prune.weights import Masked
from attar.student import Student
from attar.student.edits import Edit
from attar.training.objective import Objective

TERM = "penalty"
_SMALL = 1e-12


class Growing(Objective):
    """Another objective, with `λ/2 · ‖w‖²` over the weights that are to go; λ grows from nothing to
    `strength`, step by step, so that the network learns to do without them.

    goes: by parameter, which of its elements, bool of its shape. steps: of an epoch.

    Source: Wang et al. 2021, "Neural Pruning via Growing Regularization" (GReg-1, section 3.1).

    Example:
        >>> objective = Growing(
        ...     inner, {"0.weight": mask}, strength=1.0, steps=391)  # doctest: +SKIP
    """

    def __init__(
        self, inner: Objective, goes: Mapping[str, Tensor], *, strength: float, steps: int
    ) -> None:
        super().__init__()
        self.inner = inner
        self._goes = {path: mask.float() for path, mask in goes.items()}
        self._strength, self._steps = strength, steps
        self._done, self._all = 0, steps

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.inner.start_epoch(epoch, epochs)
        self._done, self._all = epoch * self._steps, epochs * self._steps

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self._done += 1
        factor = 0.5 * self._strength * min(1.0, self._done / self._all)
        weights = dict(model.named_parameters())
        parts = [
            (weights[path].float() ** 2 * self._mask(path, weights[path])).sum()
            for path in self._goes
        ]
        return {**self.inner(model, batch), TERM: factor * torch.stack(parts).sum()}

    def _mask(self, path: str, weight: Tensor) -> Tensor:
        if self._goes[path].device != weight.device:
            self._goes[path] = self._goes[path].to(weight.device)
        return self._goes[path]


class GroupLasso(Objective):
    """Another objective, with `strength · Σ ‖w_g‖₂` over all groups of weights that would be
    removed together: it drives whole groups to nothing, and leaves open which.

    graph: of the network, whose prunable atoms are the groups.

    Source: Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks" (equation 1),
    with the groups of Fang et al. 2023, "DepGraph".
    """

    def __init__(self, inner: Objective, graph: ChannelGraph, *, strength: float) -> None:
        super().__init__()
        self.inner = inner
        self._strength = strength
        self._atoms = torch.from_numpy(graph.prunable())
        self._places = [
            (p, torch.from_numpy(p.atoms)) for p in graph.places if isinstance(p.at, int)
        ]
        self._size = 1 + max(
            (int(atoms.max()) for _, atoms in self._places if len(atoms)), default=0
        )

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.inner.start_epoch(epoch, epochs)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms = self.inner(model, batch)
        weights = dict(model.named_parameters(remove_duplicate=False))
        device = next(iter(weights.values())).device
        squares = torch.zeros(self._size, device=device)
        for place, atoms in self._places:
            if place.path in weights:
                here = atoms >= 0
                each = _squares(weights[place.path], place)[here.to(device)]
                squares = squares.index_add(0, atoms[here].to(device), each)
        norms = (squares[self._atoms.to(device)] + _SMALL).sqrt()
        return {**terms, TERM: self._strength * norms.sum()}


def _squares(weight: Tensor, place: Place) -> Tensor:
    """The sum of squares at each index of a place."""
    assert isinstance(place.at, int)
    rest = [d for d in range(weight.dim()) if d != place.at]
    squares = weight.float().square()
    return squares.sum(rest) if rest else squares


def going(module: nn.Module, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """By parameter, which of its elements some edits of a network take away: bool of its shape."""
    weights = dict(module.named_parameters())
    masks = {path: torch.zeros_like(w, dtype=torch.bool) for path, w in weights.items()}
    for edit in edits:
        if isinstance(edit, ChannelsRemoved):
            for path, dims in edit.removed.items():
                for d, indices in dims.items() if path in masks else ():
                    masks[path].index_fill_(
                        d, torch.tensor(indices, device=masks[path].device), True
                    )
        elif isinstance(edit, BlocksRemoved):
            for path in masks:
                if within(path, edit.wrapped):
                    masks[path].fill_(True)
        elif isinstance(edit, Masked):
            for path, kept in edit.masks.items():
                if path in masks and masks[path].shape == kept.shape:
                    masks[path] |= ~kept.to(masks[path].device)
    return {path: mask for path, mask in masks.items() if mask.any()}


def redone(start: Student, pruned: Student) -> Student:
    """What was done to make `pruned` of the network of `start`, done to `start`'s weights."""
    student = start.copy()
    known = {id(edit) for edit in start.edits}
    for edit in pruned.edits:
        if id(edit) not in known:
            edit.replay(student.module)
    result = Student(student.module, start.spec, list(pruned.edits))
    _, after = result.hooks()
    after(result.module)
    return result
