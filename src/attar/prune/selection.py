"""Which channels go: scores of atoms, widths that suit the hardware, floors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attar.prune.criteria.base import Criterion
from attar.prune.groups import ChannelGraph, Place

Scope = Literal["local", "global"]


@dataclass(frozen=True)
class Widths:
    """Which widths are allowed.

    floor: least channels a layer keeps; layers of fewer than twice as many keep half.
    round_to: layers of at least twice as many channels keep a multiple of it.
    """

    floor: int = 8
    round_to: int = 8

    def least(self, width: int) -> int:
        """The fewest channels that a layer of this width keeps."""
        return min(self.floor, math.ceil(width / 2))

    def allowed(self, wanted: float, width: int) -> int:
        """The allowed width nearest to the one wanted, for a layer that was `width` wide."""
        step = self.round_to if width >= 2 * self.round_to else 1
        nearest = step * math.floor(wanted / step + 0.5)
        return min(width, max(nearest, self.least(width)))


@dataclass
class Selection:
    """The atoms to remove, and the layers whose floor kept more than was asked."""

    atoms: np.ndarray
    floored: list[str] = field(default_factory=list)


def atom_scores(
    module: nn.Module, graph: ChannelGraph, criterion: Criterion, *, absolute: bool = False
) -> np.ndarray:
    """Each atom's importance, float64, by atom; NaN for one that nothing scores.

    A weight's scores along a dimension are divided by their mean, so that layers of different size
    compare (unless they do as they are: `Criterion.comparable`), and averaged over an atom's
    channels and over the weights it occurs in. What the criterion has no weight to score by, its
    `fallback` scores. absolute: not divided, to be held against a threshold; nothing falls back.
    """
    as_they_are = absolute or criterion.comparable
    parameters = dict(module.named_parameters(remove_duplicate=False))
    size = 1 + max((int(p.atoms.max()) for p in graph.places if len(p.atoms)), default=0)
    total, count = np.zeros(size), np.zeros(size)
    for place in graph.places:
        if isinstance(place.at, str) or _side(module, place) not in criterion.sides:
            continue
        weight = parameters[place.path].detach()
        with torch.no_grad():
            scores = criterion.scores(place.path, weight, place.at).double().cpu().numpy()
        scores = scores.reshape(-1, len(place.atoms)).sum(0)  # groups read the same index each
        channels = np.bincount(place.atoms, minlength=size)
        here = channels > 0
        means = np.bincount(place.atoms, scores, minlength=size)[here] / channels[here]
        total[here] += means if as_they_are else means / (means.mean() or 1.0)
        count += here
    with np.errstate(invalid="ignore"):
        result = total / count
    if criterion.fallback is None or absolute:
        return result
    return np.where(count > 0, result, atom_scores(module, graph, criterion.fallback()))


def _side(module: nn.Module, place: Place) -> str:
    """As which a place scores channels: by its role, or `scale`, a batch norm's weight."""
    owner, _, name = place.path.rpartition(".")
    scales = name == "weight" and isinstance(module.get_submodule(owner), _BatchNorm)
    return "scale" if scales else place.role


def select_channels(
    graph: ChannelGraph,
    scores: np.ndarray,
    *,
    widths: Widths,
    ratio: float | None = None,
    threshold: float | None = None,
    scope: Scope = "local",
    original: Mapping[str, int] | None = None,
) -> Selection:
    """Chooses the atoms to remove.

    ratio: the share of channels to remove: of each layer (`local`), or of all together, wherever
        they matter least (`global`). threshold: or, what scores less goes. original: widths before
        earlier steps, by layer, which `ratio` counts from.

    Each layer's width becomes the allowed one nearest to what was asked. Layers that share channels
    (residual stages, concatenations) are settled narrowest first: what a narrower one keeps, the
    wider ones keep too.
    """
    scores = np.where(np.isnan(scores), np.inf, scores)
    prunable = graph.prunable()
    free = np.zeros(len(scores), dtype=bool)
    free[prunable] = True
    low = _lowest(graph, scores, free, ratio, threshold, scope, original)
    gone = np.zeros(len(scores), dtype=bool)
    selection = Selection(np.empty(0, np.int64))
    for line, arrays in graph.equal_widths():
        share = low[np.concatenate(arrays)].mean() if low is not None else ratio
        assert share is not None
        if not _settle_equally(arrays, share, widths, scores, free, gone):
            atoms = np.unique(np.concatenate(arrays))
            graph.freeze(atoms, f"{line} takes one width for another's, and no less suits both")
    for place in sorted(graph.producers, key=lambda p: len(p.atoms)):
        width = (original or {}).get(place.layer, len(place.atoms))
        if low is None:
            assert ratio is not None
            wanted = (1 - ratio) * width
        else:
            wanted = len(place.atoms) - int(low[place.atoms].sum())
        keep = widths.allowed(wanted, width)
        if keep > math.ceil(wanted) and keep == widths.least(width) and free[place.atoms].any():
            selection.floored.append(place.layer)
        _settle(place.atoms, keep, scores, free, gone)
    for place in graph.places:
        if place.role == "in" and _refill(place.atoms, widths, scores, gone):
            selection.floored.append(place.layer)
    selection.atoms = np.flatnonzero(gone)
    return selection


def _settle_equally(
    arrays: list[np.ndarray],
    share: float,
    widths: Widths,
    scores: np.ndarray,
    free: np.ndarray,
    gone: np.ndarray,
) -> bool:
    """Takes the share from each of several arrays of atoms, or the nearest that leaves all of them
    as many channels; none where there is no such share."""
    width = len(arrays[0])
    wanted = widths.allowed((1 - share) * width, width)
    for keep in sorted(range(widths.least(width), width), key=lambda n: (abs(n - wanted), n)):
        still_free, taken = free.copy(), gone.copy()
        left = [_settle(atoms, keep, scores, still_free, taken) for atoms in arrays]
        if set(left) == {keep}:
            free[:], gone[:] = still_free, taken
            return True
    free[np.concatenate(arrays)] = False
    return False


def _settle(
    atoms: np.ndarray, keep: int, scores: np.ndarray, free: np.ndarray, gone: np.ndarray
) -> int:
    """Removes the least important free atoms of an array, one a channel, until `keep` channels are
    left; gives how many are."""
    channels = np.bincount(atoms, minlength=len(scores))
    mine = np.unique(atoms[free[atoms]])
    left = len(atoms) - int(channels[gone].sum())
    for atom in mine[np.argsort(scores[mine], kind="stable")]:
        if left - channels[atom] >= keep:
            gone[atom] = True
            left -= int(channels[atom])
    free[mine] = False
    return left


def _refill(atoms: np.ndarray, widths: Widths, scores: np.ndarray, gone: np.ndarray) -> bool:
    """Takes back the most important atoms of an array of which too few would be left: those of a
    layer that reads a part of what another makes."""
    least = widths.least(len(atoms))
    left = len(atoms) - int(gone[atoms].sum())
    if left >= least:
        return False
    mine = np.unique(atoms[gone[atoms]])
    for atom in mine[np.argsort(-scores[mine], kind="stable")]:
        if left < least:
            gone[atom] = False
            left += int((atoms == atom).sum())
    return True


def _lowest(
    graph: ChannelGraph,
    scores: np.ndarray,
    free: np.ndarray,
    ratio: float | None,
    threshold: float | None,
    scope: Scope,
    original: Mapping[str, int] | None,
) -> np.ndarray | None:
    """Which atoms score too little, where that isn't counted a layer; bool by atom."""
    if threshold is not None:
        return free & (scores < threshold)
    if scope == "local":
        return None
    channels = np.zeros(len(scores), dtype=np.int64)
    already = 0
    for place in graph.producers:
        channels += np.bincount(place.atoms, minlength=len(scores))
        already += (original or {}).get(place.layer, len(place.atoms)) - len(place.atoms)
    order = np.flatnonzero(free)[np.argsort(scores[free], kind="stable")]
    total = channels[order].sum() + already
    low = np.zeros(len(scores), dtype=bool)
    assert ratio is not None
    low[order[already + np.cumsum(channels[order]) <= ratio * total]] = True
    return low
