"""Labels: which channel each element of a tensor belongs to, and which channels are tied.

A *slot* is one index of one axis of a parameter (or one unit of an integer attribute). A label
tensor has an activation's shape and holds, at each element, the slot whose removal would take that
element away, or `NOTHING`. Slots that can only go together are tied; the connected components of
the ties are the *atoms* of pruning.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

NOTHING = -1
"""The label of an element that belongs to no channel: a constant, a padded zero."""


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which tidy labels change."""
    return [d for d in range(labels.dim()) if labels.shape[d] > 1 and labels.stride(d) != 0]


def tidy(labels: Tensor) -> Tensor:
    """The same labels, stored once along each dimension they don't change along (stride 0).

    Most activations have one label a channel, whatever their height and width: kept so, whole
    networks are labelled in less time than they run.
    """
    shape = labels.shape
    for d in varying(labels):
        first = labels.narrow(d, 0, 1)
        if bool((stored(labels) == stored(first)).all()):
            labels = first
    return labels.expand(shape)


def stored(labels: Tensor) -> Tensor:
    """Without the repetitions along dimensions of stride 0."""
    for d in range(labels.dim()):
        if labels.shape[d] > 1 and labels.stride(d) == 0:
            labels = labels.narrow(d, 0, 1)
    return labels


def main_dimension(labels: Tensor) -> int:
    """The dimension along which labels tell most channels apart; among equals, the last."""
    once = stored(labels)

    def channels(d: int) -> int:
        others = [other for other in range(once.dim()) if other != d]
        return len(torch.unique(once.amax(dim=others) if others else once))

    return max(varying(labels), key=lambda d: (channels(d), d))


class Ties:
    """Slots and which of them go together.

    Example:
        >>> ties = Ties()
        >>> a, b = ties.slots(3), ties.slots(3)
        >>> ties.tie(a, b.flip(0))
        >>> atoms = ties.atoms()
        >>> bool(atoms[int(a[0])] == atoms[int(b[2])])
        True
    """

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[np.ndarray] = []

    def slots(self, count: int) -> Tensor:
        """New slots, tied to nothing: int64 (count,)."""
        start, self.count = self.count, self.count + count
        return torch.arange(start, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Ties two label tensors element by element, broadcast; `NOTHING` ties nothing."""
        a, b = torch.broadcast_tensors(a, b)
        for d in range(a.dim()):
            if a.shape[d] > 1 and a.stride(d) == 0 and b.stride(d) == 0:
                a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()])
        pairs = pairs[:, (pairs[0] >= 0) & (pairs[1] >= 0) & (pairs[0] != pairs[1])]
        if pairs.size:
            self._pairs.append(np.unique(pairs, axis=1))

    def tie_together(self, labels: Tensor) -> None:
        """Ties all the labels of a tensor to one another."""
        known = torch.unique(stored(labels))
        known = known[known >= 0]
        if len(known) > 1:
            self.tie(known[:-1], known[1:])

    def atoms(self) -> np.ndarray:
        """The atom of each slot, by slot: int64 (count,), numbered in order of first slot."""
        pairs = np.concatenate(self._pairs, axis=1) if self._pairs else np.empty((2, 0), np.int64)
        graph = coo_matrix(
            (np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(self.count, self.count)
        )
        return connected_components(graph, directed=False)[1].astype(np.int64)

    def representatives(self) -> Tensor:
        """The first slot of each slot's atom, int64 (count,)."""
        atoms = self.atoms()
        _, first = np.unique(atoms, return_index=True)
        return torch.from_numpy(first[atoms])
