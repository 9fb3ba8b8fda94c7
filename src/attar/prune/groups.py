"""What must be pruned together: our own dependency graph.

The network's exported graph is run on labels (see `attar.prune.labels`): data movement moves them,
elementwise operators tie what meets, layers make new channels and tie their weights' axes to what
they read. What stays tied in the end is an *atom*: it is kept or removed whole, from every tensor
it occurs in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from attar.prune.exporting import Mode
from attar.prune.trace import Role, Trace
from attar.training.evaluation import evaluating, evaluating_all


@dataclass(frozen=True)
class Place:
    """Where atoms occur: one dimension of a parameter or buffer, or an integer attribute.

    path: of the tensor; for an attribute, of the module. at: dimension or attribute name.
    role: `out` makes the channels, `in` reads them, `own` is theirs (norms, biases), `attribute`.
    atoms: int64 (size,), the atom of each index; -1 for none.
    """

    path: str
    at: int | str
    role: Role
    atoms: np.ndarray

    @property
    def layer(self) -> str:
        """What people call it: the parameter's path, without `.weight`."""
        return self.path.removesuffix(".weight")


@dataclass(frozen=True)
class JointPlace:
    """An operator that computes over channels: `node` of the exported graph, along dimension `dim`
    of its first input. atoms: int64 (size,), the atom of each index."""

    node: str
    dim: int
    atoms: np.ndarray


AsWide = tuple[str, np.ndarray, np.ndarray]
"""A line of code, and the atoms of two tensors that are as wide as one another there."""


@dataclass
class ChannelGraph:
    """A network's atoms: where they occur and which must stay.

    frozen: why an atom can't be removed, by atom; what is not in it can be. reshapes: operators
    that give atoms a new shape, which their code may fix. joint: operators that compute over
    channels, as `program`, the exported graph, has them. training: whether that has the branches
    that only run in training. widths: tensors that may have to stay as
    wide as one another, for a size that was read off the other; equal: those of them that must.
    """

    places: list[Place]
    program: torch.export.ExportedProgram
    training: bool = False
    frozen: dict[int, str] = field(default_factory=dict)
    reshapes: list[tuple[np.ndarray, str]] = field(default_factory=list)
    joint: list[JointPlace] = field(default_factory=list)
    widths: list[AsWide] = field(default_factory=list)
    equal: list[AsWide] = field(default_factory=list)

    @property
    def mode(self) -> Mode:
        """The mode in which the network runs what the graph has."""
        return evaluating_all if self.training else evaluating

    @property
    def producers(self) -> list[Place]:
        """The places that make channels: a network's widths."""
        return [p for p in self.places if p.role == "out"]

    def prunable(self) -> np.ndarray:
        """The atoms that can be removed, int64, sorted."""
        made = [p.atoms for p in self.producers]
        atoms = np.unique(np.concatenate(made)) if made else np.empty(0, np.int64)
        return atoms[~np.isin(atoms, list(self.frozen))]

    def freeze(self, atoms: Iterable[int], reason: str) -> None:
        """Keeps atoms from being removed; the first reason given is the one reported."""
        for atom in atoms:
            self.frozen.setdefault(int(atom), reason)

    def equal_widths(self) -> list[tuple[str, list[np.ndarray]]]:
        """The arrays of atoms, by `equal`, that must keep as many channels: one list for each set
        of them that hang together, with a line where they do."""
        arrays = [*{side.tobytes(): side for _, *pair in self.equal for side in pair}.values()]
        places = {side.tobytes(): i for i, side in enumerate(arrays)}
        pairs = [[places[side.tobytes()] for side in pair] for _, *pair in self.equal]
        if not pairs:
            return []
        rows, columns = zip(*pairs, strict=True)
        met = coo_matrix((np.ones(len(pairs)), (rows, columns)), shape=(len(arrays),) * 2)
        count, which = connected_components(met, directed=False)
        lines = {int(which[row]): w[0] for row, w in zip(rows, self.equal, strict=True)}
        return [(lines[c], [arrays[i] for i in np.flatnonzero(which == c)]) for c in range(count)]

    def kept_whole(self) -> dict[str, str]:
        """Layers none of whose output channels can be removed, and why."""
        result = {}
        for place in self.producers:
            reasons = [self.frozen.get(int(atom)) for atom in place.atoms]
            if reasons and all(reasons):
                result[place.layer] = str(reasons[0])
        return result

    def counts(self) -> tuple[int, int]:
        """How many output channels can be removed, over all layers, and of how many."""
        made = [p.atoms for p in self.producers]
        channels = np.concatenate(made) if made else np.empty(0, np.int64)
        return int(np.isin(channels, self.prunable()).sum()), len(channels)

    def families(self) -> list[np.ndarray]:
        """The prunable atoms, apart where no place holds both and no widths of theirs must stay
        equal: int64 arrays."""
        prunable = self.prunable()
        family = {int(a): int(a) for a in prunable}

        def root(a: int) -> int:
            while family[a] != a:
                family[a] = a = family[family[a]]
            return a

        equal = [np.concatenate(arrays) for _, arrays in self.equal_widths()]
        for together in [*(p.atoms for p in self.producers), *equal]:
            mine = np.intersect1d(together, prunable)
            for atom in mine[1:]:
                family[root(int(atom))] = root(int(mine[0]))
        roots = np.array([root(int(a)) for a in prunable], dtype=np.int64)
        return [prunable[roots == r] for r in np.unique(roots)]


def channel_graph(module: nn.Module, example: tuple[Any, ...]) -> ChannelGraph:
    """Finds what must be pruned together.

    example: the network's positional inputs; the batch (first dimension) may be one. Raises
    `ExportError` for a network that torch.export can't read.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = channel_graph(net, (torch.zeros(1, 4),))
        >>> [(p.path, p.at) for p in graph.places if np.isin(p.atoms, graph.prunable()).all()]
        [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    """
    trace = Trace(module, example)
    atoms = trace.ties.atoms()
    graph = ChannelGraph(
        [
            Place(axis.path, axis.at, axis.role, atoms[axis.start : axis.start + axis.size])
            for axis in sorted(trace.axes.values(), key=lambda axis: axis.start)
        ],
        trace.program,
        trace.training,
    )
    graph.widths = [(line, atoms[a.numpy()], atoms[b.numpy()]) for line, a, b in trace.widths]
    graph.joint = [JointPlace(j.node, j.dim, atoms[j.labels.numpy()]) for j in trace.joint]
    for slots, reason in trace.reasons:
        graph.freeze(np.unique(atoms[slots.numpy()]), reason)
    graph.reshapes = [(atoms[slots[slots >= 0].numpy()], said) for slots, said in trace.reshapes]
    whole = {axis.path for axis in trace.axes.values()}
    for path, slots in trace.elements.items():
        _add_elements(graph, path, atoms[slots.numpy()], path in whole)
    return graph


def _add_elements(graph: ChannelGraph, path: str, atoms: np.ndarray, whole: bool) -> None:
    """Adds a parameter used as an activation: atoms must be slices of one dimension."""
    atoms = np.where(np.isin(atoms, graph.prunable()), atoms, -1)
    concerned = np.unique(atoms[atoms >= 0])
    if not concerned.size:
        return
    for d in range(atoms.ndim):
        lines = np.moveaxis(atoms, d, 0).reshape(atoms.shape[d], -1)
        if (lines == lines[:, :1]).all() and not whole:
            graph.places.append(Place(path, d, "own", lines[:, 0]))
            return
    graph.freeze(concerned, f"{path} is used in a way that ties more than one of its dimensions")


def first_of_batch(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """An example of batch one from a larger one."""
    return tuple(x[:1] if isinstance(x, torch.Tensor) and x.dim() else x for x in example)
