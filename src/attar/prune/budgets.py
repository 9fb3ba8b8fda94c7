"""Pruning to a budget: which widths are worth having, for the least that is lost.

Layers that share channels are one part of the network; its options are shares of its channels, the
least important first. A residual block is a part that stays or goes. A solver takes the options
that lose least while the network costs no more than the budget, by a model of what each layer costs
at each width: multiply-accumulates, parameters, or times measured in the runtime. What the model
leaves out (norms, additions, reading the input) is found by measuring the network that came of it,
and the choice is made anew until that keeps the budget.

Sources: Shen et al. 2022, "Structural Pruning via Latency-Saliency Knapsack" (HALP: importance
against measured latencies); Humble et al. 2022, "Soft Masking for Cost-Constrained Channel
Pruning".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import nn

from attar.errors import UsageError
from attar.planning.layers import shapes_of
from attar.planning.solver import Cost, OverBudget, cost_of, solve
from attar.prune.blocks import residual_blocks, unexcluded, within, without_blocks
from attar.prune.channels import Prunable, Pruned
from attar.prune.costs import Options, Prices, costs, each_cost, layers, tensors
from attar.prune.criteria.base import Calls, Criterion, observe
from attar.prune.groups import first_of_batch
from attar.prune.losses import Losses
from attar.prune.plan import Block, Part, Plan
from attar.prune.selection import Selection, Widths, atom_scores, select_channels
from attar.student import Student

Unit = Literal["macs", "parameters", "size", "latency_ms"]
SHARES = tuple(n / 8 for n in range(8))
"""Of a part's channels that an option removes."""
ATTEMPTS = 6
_NEEDED = "without some of its channels alone, the network doesn't run or gives no numbers"
CLOSE = 0.97
"""Of the budget; a network that costs less has lost more than it had to."""


@dataclass(frozen=True)
class Budget:
    """What a pruned network may cost.

    limit: in `unit`. measure: what a whole student costs. price: what layers of some shapes cost,
    up to a common factor; `None` where cost goes by parameters. example: what layers are applied to
    when they are priced; default: the first of those that are traced.
    """

    unit: Unit
    limit: float
    measure: Callable[[Student], float]
    price: Prices | None = None
    example: tuple[Any, ...] | None = None


def prune_to_budget(
    student: Student,
    example: tuple[Any, ...],
    *,
    criterion: Criterion,
    budget: Budget,
    widths: Widths | None = None,
    exclude: Sequence[str] = (),
    calls: Calls | None = None,
    lost: Callable[[nn.Module], float] | None = None,
    depth: bool = True,
) -> tuple[Student, Pruned, Plan]:
    """A student that keeps a budget, and the plan that made it.

    criterion: which channels of a part go first, and, where `lost` is not given, how much a part
    loses with them: the sum of their scores over the layers that make them. lost: measures it
    instead, for a network without them, before any recovery: the more, the worse. depth: whether
    whole residual blocks may go too, where `lost` tells what each is worth. Others as of
    `prune_channels`. Raises `UsageError` for a budget below what the narrowest network costs.

    Example:
        >>> import torch; from attar.measure.cost import parameters
        >>> from attar.prune import criteria
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> budget = Budget("parameters", 2000, lambda s: parameters(s.module))
        >>> small, _, plan = prune_to_budget(
        ...     Student(net), (torch.randn(2, 64),), criterion=criteria.get("magnitude")(),
        ...     budget=budget)
        >>> parameters(small.module) <= 2000, plan.parts[0].layers
        (True, ['0'])
    """
    network = Prunable(student, example, exclude)
    observe(criterion, network.module, calls)
    whole = budget.measure(student)
    if whole <= budget.limit:
        raise UsageError(
            f"{budget.unit}: {shown(budget.limit)} asks for no pruning: the network takes "
            f"{shown(whole)}"
        )
    blocks = _blocks(network, example, exclude) if depth and lost is not None else {}
    planner = _Planner(
        network, example, budget, criterion, widths or Widths(round_to=1), lost, blocks
    )
    undone = planner.learn().undone
    best: tuple[Student, Pruned, Plan] | None = None
    known = ((0.0, 0.0), (planner.whole, whole))  # by the model, and measured
    for _ in range(ATTEMPTS):
        narrow, said = network.prune(partial(planner.select, _between(*known, budget.limit)))
        small = without_blocks(narrow, planner.gone)
        cost = budget.measure(small)
        if cost <= budget.limit and (best is None or cost > best[2].after):
            said = replace(said.without(planner.gone), undone={**undone, **said.undone})
            best = (small, said, planner.plan(whole, cost))
        if CLOSE * budget.limit <= cost <= budget.limit or planner.least:
            break
        known = ((planner.whole, whole), (planner.modelled, cost))
    if best is None and planner.least:
        raise UsageError(
            f"{budget.unit}: {shown(budget.limit)} is below what any plan reaches: the smallest "
            f"network found takes {shown(cost)} (a lower floor, or fewer excluded layers, may help)"
        )
    if best is None:
        raise UsageError(
            f"{budget.unit}: {shown(budget.limit)} was not met in {ATTEMPTS} plans, of which the "
            f"last took {shown(cost)}: a little more would do, or a quieter machine"
        )
    return best


def shown(amount: float) -> str:
    """An amount for people, in any unit.

    Example:
        >>> shown(43680.0), shown(0.81234)
        ('43,680', '0.8123')
    """
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"


def _blocks(network: Prunable, example: tuple[Any, ...], exclude: Sequence[str]) -> dict[str, bool]:
    found = residual_blocks(network.module, example, network.graph.program)
    return unexcluded(found, [place.layer for place in network.graph.producers], exclude)


def _between(one: tuple[float, float], other: tuple[float, float], wanted: float) -> float:
    """What the model says of a network that is measured at `wanted`, on the line through two that
    are known."""
    (x0, y0), (x1, y1) = one, other
    return x1 + (wanted - y1) * (x1 - x0) / (y1 - y0) if y1 != y0 else x1


class _Planner:
    """Chooses how much of each part goes, and says why."""

    def __init__(
        self,
        network: Prunable,
        example: tuple[Any, ...],
        budget: Budget,
        criterion: Criterion,
        widths: Widths,
        lost: Callable[[nn.Module], float] | None,
        blocks: dict[str, bool],
    ) -> None:
        self._network, self._graph, self._budget = network, network.graph, budget
        self._criterion, self._widths, self._blocks = criterion, widths, blocks
        self._scores = atom_scores(network.module, network.graph, criterion)
        self._losses = Losses(network.module, network.graph, self._scores, lost)
        self.gone: dict[str, bool] = {}
        asked = budget.example or first_of_batch(example)
        if budget.price is None:
            self._pieces = tensors(self._graph, network.module)
        else:
            self._pieces = layers(self._graph, shapes_of(network.module, asked))
        self._chosen: list[tuple[np.ndarray, float, float]] = []
        self._dropped: list[Block] = []
        self._atoms = np.empty(0, np.int64)
        self.modelled, self.least = 0.0, False
        terms, fixed = self._costs([])
        self.whole = fixed + cost_of([0] * len(blocks), terms)

    def learn(self) -> Pruned:
        """Lets the graph find out what must stay, or stay as wide as something else, by removing as
        much as any option does; says what that was."""
        widths, ratio = self._widths, SHARES[-1]
        _, said = self._network.prune(
            lambda: select_channels(self._graph, self._scores, widths=widths, ratio=ratio)
        )
        known = {path: self._losses.of_block(path, w) for path, w in self._blocks.items()}
        self._blocks = {p: w for p, w in self._blocks.items() if np.isfinite(known[p]).all()}
        return said

    def select(self, target: float) -> Selection:
        """The choice that loses least at no more than `target`, by the model of costs; where there
        is none, the cheapest."""
        parts, losses = [], []
        for options in self._parts():
            lost = self._losses.of_part(options)
            if np.isfinite(lost).all():
                parts.append(options)
                losses.append(lost)
            else:
                whole = next(f for f in self._graph.families() if options[-1][0] in f)
                self._graph.freeze(whole, _NEEDED)
        losses += [self._losses.of_block(path, wrapped) for path, wrapped in self._blocks.items()]
        terms, fixed = self._costs(parts)
        self.least = False
        try:
            chosen = solve(losses, terms, target, fixed)
        except OverBudget as error:
            chosen, self.least = error.chosen, True
        self.modelled = fixed + cost_of(chosen, terms)
        taken = [float(loss[i]) for loss, i in zip(losses, chosen, strict=True)]
        saves = [_saved(terms, n, i, len(chosen)) / self.whole for n, i in enumerate(chosen)]
        atoms = [options[i] for options, i in zip(parts, chosen, strict=False)]
        self._chosen = list(zip(atoms, taken, saves, strict=False))
        self._dropped = [
            Block(path, taken[n], saves[n])
            for n, path in enumerate(self._blocks, start=len(parts))
            if chosen[n]
        ]
        self.gone = {block.path: self._blocks[block.path] for block in self._dropped}
        self._atoms = np.unique(np.concatenate([np.empty(0, np.int64), *atoms]))
        return Selection(self._atoms)

    def _parts(self) -> list[Options]:
        """By part, the atoms that each option removes; the first removes none."""
        chosen = [
            select_channels(self._graph, self._scores, widths=self._widths, ratio=share).atoms
            for share in SHARES[1:]
        ]
        parts = []
        for family in self._graph.families():
            options = {b"": np.empty(0, np.int64)}
            for atoms in chosen:
                mine = np.intersect1d(atoms, family)
                options.setdefault(mine.tobytes(), mine)
            parts.append(list(options.values()))
        return [options for options in parts if len(options) > 1]

    def _costs(self, parts: list[Options]) -> tuple[list[Cost], float]:
        switches = {path: n for n, path in enumerate(self._blocks, start=len(parts))}
        return costs(self._pieces, parts, self._budget.price or _themselves, switches)

    def plan(self, before: float, after: float) -> Plan:
        """What the last choice was, for people and to be replayed."""
        parts = [self._part(*chosen) for chosen in self._chosen if chosen[0].size]
        return Plan(
            self._budget.unit,
            self._budget.limit,
            before,
            after,
            type(self._criterion).__name__,
            self._losses.meaning,
            [part for part in parts if part.layers],
            self._graph.kept_whole(),
            self._dropped,
            each_cost(self._pieces, self._atoms, self.gone, self._budget.price or _themselves),
        )

    def _part(self, gone: np.ndarray, lost: float, saves: float) -> Part:
        removed, widths = {}, {}
        for place in self._graph.producers:
            channels = np.flatnonzero(np.isin(place.atoms, gone))
            if channels.size and not within(place.layer, self.gone):
                removed[place.layer] = channels.tolist()
                widths[place.layer] = (len(place.atoms), len(place.atoms) - len(channels))
        return Part(list(removed), widths, removed, float(lost), float(saves))


def _saved(terms: list[Cost], part: int, option: int, parts: int) -> float:
    """What one part's option saves where all others are whole."""
    alone = [option if n == part else 0 for n in range(parts)]
    return cost_of([0] * parts, terms) - cost_of(alone, terms)


def _themselves(numbers: Iterable[int]) -> dict[int, float]:
    return {n: float(n) for n in numbers}
