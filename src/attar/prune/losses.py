"""What a network loses with a part of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from torch import nn

from attar.prune.blocks import BlocksRemoved
from attar.prune.groups import ChannelGraph
from attar.prune.removal import removal_of
from attar.student.edits import Edit


class Losses:
    """By scores of channels, summed over the layers that make them; or by measuring the network
    without a part.

    scores: by atom. lost: how bad a network is; what it says of the whole one counts as nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: ChannelGraph,
        scores: np.ndarray,
        lost: Callable[[nn.Module], float] | None = None,
    ) -> None:
        self._module, self._graph, self._scores, self._lost = module, graph, scores, lost
        self._known: dict[bytes | str, float] = {}

    @property
    def meaning(self) -> str:
        """What is counted, for people."""
        if self._lost is None:
            return "scores of the channels that go, summed over the layers that make them"
        return "how far the answers move on validation, one part at a time"

    def of_part(self, options: Sequence[np.ndarray]) -> np.ndarray:
        """What each option of a part loses, float (options,): the atoms it removes, more and more.
        Measured at the middle and the last one; between, losses grow with the scores. Infinite
        where the network doesn't run without the part alone."""
        summed = np.array([self._summed(gone) for gone in options])
        if self._lost is None:
            return summed
        at = sorted({0, len(options) // 2, len(options) - 1})
        measured = np.array([self._without(options[i]) for i in at])
        if not np.isfinite(measured).all():
            return np.full(len(options), np.inf)
        return np.interp(summed, summed[at], measured)

    def of_block(self, path: str, wrapped: bool) -> np.ndarray:
        """What is lost with a block and without, float (2,): nothing, and what is measured; as of
        `of_part`."""
        return np.array([0.0, self._worse(path, BlocksRemoved({path: wrapped}))])

    def _summed(self, gone: np.ndarray) -> float:
        made = [p.atoms for p in self._graph.producers]
        return float(sum(self._scores[atoms[np.isin(atoms, gone)]].sum() for atoms in made))

    def _without(self, gone: np.ndarray) -> float:
        return self._worse(gone.tobytes(), removal_of(self._graph, gone)) if gone.size else 0.0

    def _worse(self, key: bytes | str, edit: Edit) -> float:
        """How much worse the network is after an edit; never better. Measured once."""
        assert self._lost is not None
        if key not in self._known:
            whole, small = self._whole, copy.deepcopy(self._module)
            edit.replay(small)
            try:
                worse = self._lost(small) - whole
            except Exception:  # whatever the person's forward raises on such a network
                worse = np.inf
            self._known[key] = np.inf if np.isnan(worse) else max(worse, 0.0)
        return self._known[key]

    @cached_property
    def _whole(self) -> float:
        assert self._lost is not None
        return self._lost(self._module)
