"""Pruning whole channels of a student: choose, remove, prove."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from attar.errors import UsageError
from attar.prune.blocks import within
from attar.prune.criteria.base import Calls, Criterion, observe, require_calls
from attar.prune.folding import WeightsFolded
from attar.prune.groups import ChannelGraph, channel_graph, first_of_batch
from attar.prune.naming import joined, matching
from attar.prune.prepared import Preparation, prepared
from attar.prune.removal import (
    ChannelsRemoved,
    RemovalFailed,
    guilty,
    removal_of,
    remove_verified,
)
from attar.prune.selection import Scope, Selection, Widths, atom_scores, select_channels
from attar.prune.trace import OUTPUT
from attar.prune.weights import Masked
from attar.student import Student
from attar.student.edits import Edit


@dataclass(frozen=True)
class Pruned:
    """What pruning did, for people.

    widths: channels before and after, by layer. kept: layers that could not be narrowed, and why.
    floored: layers whose floor kept more than was asked. undone: removals whose check failed.
    blocks: residual blocks that went whole; their layers have no widths.
    """

    widths: dict[str, tuple[int, int]]
    kept: dict[str, str]
    floored: list[str]
    undone: dict[str, str]
    blocks: list[str] = field(default_factory=list)

    def without(self, blocks: Iterable[str]) -> Pruned:
        """What it is where these residual blocks went too."""
        blocks = list(blocks)
        widths = {layer: w for layer, w in self.widths.items() if not within(layer, blocks)}
        return replace(self, widths=widths, blocks=[*self.blocks, *blocks])

    def notes(self) -> list[str]:
        """What a person should hear, in sentences."""
        said = []
        if self.blocks:
            said.append(f"the residual blocks {joined(self.blocks)} are gone")
        elif not any(after < before for before, after in self.widths.values()):
            said.append("no channel could be removed")
        held = [n for n, why in self.kept.items() if why != OUTPUT and n not in self.undone]
        if held:
            said.append(f"all channels stay in {_listed(held)}: {self.kept[held[0]]}")
        if self.floored:
            said.append(f"the floor keeps more channels than asked in {_listed(self.floored)}")
        for reason in dict.fromkeys(self.undone.values()):
            layers = [layer for layer, other in self.undone.items() if other == reason]
            said.append(f"pruning {_listed(layers)} was undone: {reason}")
        return said


def prune_channels(
    student: Student,
    example: tuple[Any, ...],
    *,
    criterion: Criterion,
    ratio: float | None = None,
    threshold: float | None = None,
    scope: Scope = "local",
    widths: Widths | None = None,
    exclude: Sequence[str] = (),
    original: Mapping[str, int] | None = None,
    calls: Calls | None = None,
) -> tuple[Student, Pruned]:
    """A narrower student with its own weights; the one given is left as it is.

    example: real inputs, batch first; the first is traced, and the narrower network must answer on
        all as the masked one does.
    ratio: share of channels to remove, or threshold: score under which they go.
    scope: `local` removes the share from each layer, `global` where it matters least.
    exclude: paths of layers (with `*`) that keep their channels.
    original: widths that `ratio` counts from, by layer, when pruning again.
    calls: batches for a criterion that needs data, `(args, kwargs)` each, or for one that needs
        their losses `(args, kwargs, loss)`, with loss(output) a scalar.

    A removal that fails its check is undone, with what it hangs on in `Pruned.undone`. Raises
    `UsageError`; `ExportError` for a network whose graph can't be read; `RemovalFailed` when
    removals work one by one but not together.

    Example:
        >>> import torch; from attar.prune import criteria
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> l1 = criteria.get("magnitude")()
        >>> student, pruned = prune_channels(
        ...     Student(net), (torch.randn(2, 4),), criterion=l1, ratio=0.5)
        >>> pruned.widths["0"], student.module[2].in_features
        ((32, 16), 16)
    """
    _check(criterion, ratio, threshold, calls)
    network = Prunable(student, example, exclude)
    observe(criterion, network.module, calls)

    def select() -> Selection:
        return select_channels(
            network.graph,
            atom_scores(network.module, network.graph, criterion, absolute=threshold is not None),
            widths=widths or Widths(),
            ratio=ratio,
            threshold=threshold,
            scope=scope,
            original=original,
        )

    return network.prune(select)


class Prunable:
    """A student's network with what goes together in it, ready to lose channels.

    module: the network as `prepared` has it. graph: its atoms. exclude: paths of
    layers (with `*`) that keep their channels. Raises as `prune_channels`.
    """

    def __init__(
        self, student: Student, example: tuple[Any, ...], exclude: Sequence[str] = ()
    ) -> None:
        self._student, self._example = student, example
        self.module, self._prepared = prepared(student.module, example)
        self.graph = channel_graph(self.module, first_of_batch(example))
        _exclude(self.graph, exclude)

    def prune(self, select: Callable[[], Selection]) -> tuple[Student, Pruned]:
        """The student without what `select` chooses, proven; select is called again where its
        choice fails, once the graph knows more."""
        chosen, removal, failure = choose(self.module, self.graph, select, self._example)
        undone: dict[str, str] = {}
        if failure:
            undone = _freeze_guilty(self.module, self.graph, chosen.atoms, self._example)
            chosen = select()
            removal = removal_of(self.graph, chosen.atoms)
            remove_verified(self.module, removal, self._example, graph=self.graph)
        kept = self.graph.kept_whole()
        pruned = Pruned(_widths(self.graph, chosen.atoms), kept, chosen.floored, undone)
        if not removal.removed:
            return self._student.copy(), pruned
        return _narrowed(self._student, self._prepared, removal), pruned


def choose(
    module: nn.Module,
    graph: ChannelGraph,
    select: Callable[[], Selection],
    example: tuple[Any, ...],
) -> tuple[Selection, ChannelsRemoved, str | None]:
    """A selection, its removal, and how that fails, if it does. Where it fails at a line that takes
    one width for another's, `graph.equal` is told, and the selection made anew."""
    while True:
        chosen = select()
        removal = removal_of(graph, chosen.atoms)
        try:
            remove_verified(module, removal, example, graph=graph)
        except RemovalFailed as error:
            if not _keep_equal(graph, str(error)):
                return chosen, removal, str(error)
        else:
            return chosen, removal, None


def _narrowed(
    student: Student, preparations: Sequence[Preparation], removal: ChannelsRemoved
) -> Student:
    """The student without those channels, its masks too; what was prepared and lost none is as it
    was. A weight that was folded has no masks: those were of what it was computed from."""
    made = [p for p in (p.within(removal.removed) for p in preparations) if p]
    module = copy.deepcopy(student.module)
    for edit in (*made, removal):
        edit.replay(module)
    folded = [path for p in made if isinstance(p, WeightsFolded) for path in p.layers]
    edits: list[Edit] = [
        e.outside(folded).without(removal) if isinstance(e, Masked) else e for e in student.edits
    ]
    return Student(module, student.spec, [*edits, *made, removal])


def _check(
    criterion: Criterion, ratio: float | None, threshold: float | None, calls: Calls | None
) -> None:
    if (ratio is None) == (threshold is None):
        raise UsageError("pruning takes either a ratio or a threshold: give exactly one")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio:g}: the share to remove lies between 0 and 1")
    if "channel" not in criterion.granularities:
        raise UsageError(f"{type(criterion).__name__} scores single weights, not channels")
    require_calls(criterion, calls)


def _keep_equal(graph: ChannelGraph, failure: str) -> bool:
    """Makes tensors stay as wide as one another that may have to at the line a removal failed at,
    such as attention's heads and the network around them where code reads one width off the other;
    then all such tensors of that file. False where there is nothing more to make equal."""
    known = {(line, a.tobytes(), b.tobytes()) for line, a, b in graph.equal}
    apart = [
        w for w in graph.widths if w[0] and (w[0], w[1].tobytes(), w[2].tobytes()) not in known
    ]
    file = failure.partition(" at ")[2].partition(":")[0]
    here = [w for w in apart if f" at {w[0]}:" in failure]
    near = [w for w in apart if file and w[0].startswith(f"{file}:")]
    graph.equal += here or near
    return bool(here or near)


def _freeze_guilty(
    module: nn.Module, graph: ChannelGraph, atoms: np.ndarray, example: tuple[Any, ...]
) -> dict[str, str]:
    """Keeps the families whose removal fails on its own, and says what each hangs on."""

    def fails(some: np.ndarray) -> str | None:
        try:
            remove_verified(module, removal_of(graph, some), example, graph=graph)
        except RemovalFailed as error:
            return str(error)
        return None

    parts = [np.intersect1d(family, atoms) for family in graph.families()]
    whole = {int(a): family for family in graph.families() for a in family}
    undone = {}
    for part, failure in guilty([p for p in parts if p.size], fails):
        shaped = [said for atoms, said in graph.reshapes if np.isin(atoms, part).any()]
        sizes = f"; sizes may be fixed by {', '.join(dict.fromkeys(shaped))}" if shaped else ""
        message = failure + sizes
        for place in graph.producers:
            if np.isin(place.atoms, part).any():
                undone[place.layer] = message
        graph.freeze(whole[int(part[0])], message)
    return undone


def _exclude(graph: ChannelGraph, patterns: Sequence[str]) -> None:
    excluded = matching((p.layer for p in graph.producers), patterns)
    for place in graph.producers:
        if place.layer in excluded:
            graph.freeze(place.atoms, f"excluded by {excluded[place.layer]!r}")


def _widths(graph: ChannelGraph, gone: np.ndarray) -> dict[str, tuple[int, int]]:
    return {
        p.layer: (len(p.atoms), int(len(p.atoms) - np.isin(p.atoms, gone).sum()))
        for p in graph.producers
    }


def _listed(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
