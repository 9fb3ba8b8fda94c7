"""How much each layer can be pruned: a share of one removed at a time, all else as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import UsageError
from attar.measure.cost import macs, nonzero, parameters
from attar.prune.channels import choose
from attar.prune.criteria.base import Calls, Criterion, observe
from attar.prune.groups import channel_graph, first_of_batch
from attar.prune.naming import joined, matching
from attar.prune.prepared import prepared
from attar.prune.removal import RemovalFailed, removal_of, remove_verified
from attar.prune.selection import Selection, Widths, atom_scores, select_channels
from attar.prune.weights import Masked, prune_weights, weight_matrices
from attar.student import Student
from attar.training.evaluation import evaluating

Granularity = Literal["channel", "weight"]

RATIOS = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Cell:
    """The network with a share of one row removed.

    ratio: the share asked for. removed: how many of the row's channels (or weights) that took.
    parameters: what the whole network is left with; of weights, those that are not zero. macs: its
    multiply-accumulates for one example; `None` for weights, whose zeros are multiplied too.
    metric: what it reaches. drop: how much worse that is; negative where it got better.
    """

    ratio: float
    removed: int
    parameters: int
    macs: int | None
    metric: float
    drop: float


@dataclass(frozen=True)
class Row:
    """One layer, or several that share their channels, with a cell for each ratio, rising.

    size: how many channels can go (an attention's head counts as one), or weights there are.
    """

    layers: tuple[str, ...]
    size: int
    cells: list[Cell]

    @property
    def name(self) -> str:
        """Its layers in few words."""
        return joined(self.layers)

    def breaking(self, limit: float) -> Cell | None:
        """The first cell whose drop exceeds `limit`, or is no number."""
        return next((cell for cell in self.cells if not cell.drop <= limit), None)

    def tolerated(self, limit: float) -> float:
        """The largest ratio up to which no drop exceeds `limit`; 0 where the first one does."""
        first = self.breaking(limit)
        return max(
            (c.ratio for c in self.cells if first is None or c.ratio < first.ratio), default=0.0
        )


@dataclass(frozen=True)
class Sensitivity:
    """What each layer can lose.

    baseline, parameters, macs: of the whole network. rows: in the network's order. kept: layers
    that can't be pruned, and why.
    """

    granularity: Granularity
    baseline: float
    parameters: int
    macs: int | None
    rows: list[Row]
    kept: dict[str, str]

    def ranked(self, limit: float) -> list[Row]:
        """The most sensitive first: those that can lose least within `limit`, and of several those
        that drop most by the ratio after."""

        def rank(row: Row) -> tuple[float, float]:
            drop = (row.breaking(limit) or row.cells[-1]).drop
            return row.tolerated(limit), -math.inf if math.isnan(drop) else -drop

        return sorted(self.rows, key=rank)


class Progress(NamedTuple):
    """A cell that was measured, of the row called `name`; how many are done, of how many."""

    name: str
    cell: Cell
    done: int
    of: int


def sensitivity(
    student: Student,
    example: tuple[Any, ...],
    *,
    evaluate: Callable[[nn.Module], float],
    criterion: Criterion,
    granularity: Granularity = "channel",
    ratios: Sequence[float] = RATIOS,
    only: Sequence[str] = (),
    higher_is_better: bool = True,
    calls: Calls | None = None,
    on_cell: Callable[[Progress], None] | None = None,
) -> Sensitivity:
    """Prunes one layer at a time by each ratio, without retraining, and measures what is lost.

    example: real inputs, batch first; the first is traced, and every narrower network must answer
        on all as the masked one does.
    evaluate: from a network, in eval mode and without gradients, to its metric; drops are in the
        metric's unit. It is called once for the whole network and at most once a cell.
    criterion: what goes first, as in `prune_channels` and `prune_weights`.
    granularity: `channel`, a row for all layers that share channels (a residual stage, say), or
        `weight`, a row for each weight matrix.
    ratios: shares of each layer's channels, to the nearest whole one (one stays); of weights, those
        that are zero already count.
    only: layers to look at, by path, with `*`; a row is looked at whole.
    higher_is_better: of the metric. calls: batches for a criterion that needs data, as in
        `prune_channels`.
    on_cell: told of each cell as it is measured.

    The student stays as it is. A row whose removal fails its check is in `kept`. Raises
    `UsageError` for what can't be asked; `ExportError` for a network whose graph can't be read,
    which `weight` doesn't need.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (section 3.2, sensitivity of
    single layers); Han et al. 2015, "Learning both Weights and Connections for Efficient Neural
    Networks" (figure 6), for single weights.

    Example:
        >>> from attar.prune import criteria
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> x, l1 = torch.randn(2, 4), criteria.get("magnitude")()
        >>> found = sensitivity(
        ...     Student(net), (x,), evaluate=lambda m: float(m(x).mean()), criterion=l1,
        ...     ratios=[0.25, 0.5])
        >>> [(row.name, [cell.removed for cell in row.cells]) for row in found.rows]
        [('0', [8, 16])]
    """
    ratios = _checked(ratios)
    module = copy.deepcopy(student.module).eval()
    cuts: _Channels | _Weights
    if granularity == "channel":
        cuts = _Channels(module, example, criterion, ratios, calls)
    else:
        cuts = _Weights(module, student, criterion, ratios, calls)
    chosen, kept = _chosen(cuts, only)

    def metric_of(network: nn.Module) -> float:
        with evaluating(network):
            return evaluate(network)

    baseline = metric_of(module)

    def measured(layers: tuple[str, ...], ratio: float) -> Cell:
        cut = cuts.cut(layers, ratio)
        metric = metric_of(cut.network) if cut.removed else baseline
        lost = baseline - metric if higher_is_better else metric - baseline
        return Cell(ratio, cut.removed, cut.parameters, cut.macs, metric, lost)

    rows = []
    for place, layers in enumerate(chosen):
        row = Row(layers, cuts.sizes[layers], [])
        try:
            for ratio in ratios:
                row.cells.append(measured(layers, ratio))
                if on_cell is not None:
                    done = place * len(ratios) + len(row.cells)
                    on_cell(Progress(row.name, row.cells[-1], done, len(chosen) * len(ratios)))
        except RemovalFailed as error:
            kept |= dict.fromkeys(layers, str(error))
        else:
            rows.append(row)
    if not rows:
        raise UsageError(_why_nothing(kept))
    return Sensitivity(granularity, baseline, cuts.parameters, cuts.macs, rows, kept)


class _Cut(NamedTuple):
    """A network with a share of one row gone, and what it is left with."""

    network: nn.Module
    removed: int
    parameters: int
    macs: int | None


class _Channels:
    """Families of channels: the layers that share them, with how many there are. A family's share
    is what `prune_channels` takes from it when it takes that share of each layer.

    The network that is cut is the narrower one, proven to answer as the masked one does.
    """

    def __init__(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        criterion: Criterion,
        ratios: Sequence[float],
        calls: Calls | None,
    ) -> None:
        _observe(criterion, module, calls)
        module, _ = prepared(module, example)
        self._module, self._example = module, example
        self._graph = graph = channel_graph(module, first_of_batch(example))
        scores = atom_scores(module, graph, criterion)

        def selected(ratio: float) -> Selection:
            return select_channels(graph, scores, widths=Widths(1, 1), ratio=ratio)

        choose(module, graph, partial(selected, ratios[-1]), example)  # which widths stay equal
        self._gone = {ratio: selected(ratio).atoms for ratio in ratios}
        families = [(self._layers(family), family) for family in graph.families()]
        order = {place.layer: i for i, place in reversed(list(enumerate(graph.producers)))}
        self._families = dict(sorted(families, key=lambda one: order[one[0][0]]))
        self.sizes = {layers: len(family) for layers, family in self._families.items()}
        self.kept = graph.kept_whole()
        self.parameters = parameters(module)
        self.macs: int | None = macs(module, example)

    def cut(self, layers: tuple[str, ...], ratio: float) -> _Cut:
        atoms = np.intersect1d(self._gone[ratio], self._families[layers])
        removal = removal_of(self._graph, atoms)
        narrow = remove_verified(self._module, removal, self._example, graph=self._graph)
        return _Cut(narrow, len(atoms), parameters(narrow), macs(narrow, self._example))

    def _layers(self, family: np.ndarray) -> tuple[str, ...]:
        places = self._graph.producers
        return tuple(dict.fromkeys(p.layer for p in places if np.isin(p.atoms, family).any()))


class _Weights:
    """Weight matrices, with how many weights each has. A matrix's share is what `prune_weights`
    sets to zero when it takes that share of each."""

    def __init__(
        self,
        module: nn.Module,
        student: Student,
        criterion: Criterion,
        ratios: Sequence[float],
        calls: Calls | None,
    ) -> None:
        self._module = module
        self._paths: dict[tuple[str, ...], str] = {
            (path.removesuffix(".weight"),): path for path in weight_matrices(module)
        }
        self._masks = {
            ratio: _masks(
                prune_weights(student, criterion=criterion, ratio=ratio, floor=1, calls=calls)
            )
            for ratio in ratios
        }
        tensors = dict(module.named_parameters())
        self.sizes = {layers: tensors[path].numel() for layers, path in self._paths.items()}
        self.kept: dict[str, str] = {}
        self.parameters = nonzero(module)
        self.macs: int | None = None

    def cut(self, layers: tuple[str, ...], ratio: float) -> _Cut:
        sparse = copy.deepcopy(self._module)
        path = self._paths[layers]
        mask = self._masks[ratio][path]
        with torch.no_grad():
            sparse.get_parameter(path).masked_fill_(~mask, 0)
        return _Cut(sparse, int((~mask).sum()), nonzero(sparse), None)


def _masks(pruned: Student) -> dict[str, Tensor]:
    return {path: m for e in pruned.edits if isinstance(e, Masked) for path, m in e.masks.items()}


def _checked(ratios: Sequence[float]) -> list[float]:
    """The ratios rising, each once. Raises `UsageError`."""
    if not ratios:
        raise UsageError("there is no ratio to prune by: give shares between 0 and 1")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise UsageError(f"ratio is {ratio:g}: the share to remove lies between 0 and 1")
    return sorted(set(ratios))


def _observe(criterion: Criterion, module: nn.Module, calls: Calls | None) -> None:
    """Lets a criterion see its data. Raises `UsageError` for one that can't score channels."""
    if "channel" not in criterion.granularities:
        raise UsageError(f"{type(criterion).__name__} scores single weights, not channels")
    observe(criterion, module, calls)


def _chosen(
    cuts: _Channels | _Weights, only: Sequence[str]
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The rows that are looked at, and of what is looked at, the layers that can't be pruned."""
    rows, kept = list(cuts.sizes), cuts.kept
    if only:
        names = [layer for layers in rows for layer in layers] + list(kept)
        meant = matching(names, only, "only")
        rows = [layers for layers in rows if meant.keys() & set(layers)]
        kept = {layer: why for layer, why in kept.items() if layer in meant}
    return rows, dict(kept)


def _why_nothing(kept: dict[str, str]) -> str:
    if not kept:
        return "nothing can be pruned: the network has no layer that makes channels"
    layer, why = next(iter(kept.items()))
    others = f" (and {len(kept) - 1} more)" if len(kept) > 1 else ""
    return f"nothing can be pruned: all channels stay in {layer}{others}: {why}"
