"""Pruning to a budget: which widths are worth having, for the least that is lost.

Layers that share channels are one part of the network; its options are shares of its channels, the
least important first. A solver takes the options that lose least while the network costs no more
than the budget, by a model of what each layer costs at each width: multiply-accumulates,
parameters, or times measured in the runtime. What the model leaves out (norms, additions, reading
the input) is found by measuring the network that came of it, and the choice is made anew until that
keeps the budget.

Sources: Shen et al. 2022, "Structural Pruning via Latency-Saliency Knapsack" (HALP: importance
against measured latencies); Humble et al. 2022, "Soft Masking for Cost-Constrained Channel
Pruning".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from torch import nn

from attar.errors import UsageError
from attar.planning.layers import shapes_of
from attar.planning.solver import Cost, OverBudget, cost_of, solve
from attar.prune.channels import Prunable, Pruned
from attar.prune.costs import Options, Prices, costs, layers, tensors
from attar.prune.criteria.base import Calls, Criterion, observe
from attar.prune.plan import Part, Plan
from attar.prune.removal import removal_of
from attar.prune.selection import Selection, Widths, atom_scores, select_channels
from attar.student import Student

Unit = Literal["macs", "parameters", "size", "latency_ms"]
SHARES = tuple(n / 8 for n in range(8))
"""Of a part's channels that an option removes."""
ATTEMPTS = 6
CLOSE = 0.97
"""Of the budget; a network that costs less has lost more than it had to."""


@dataclass(frozen=True)
class Budget:
    """What a pruned network may cost.

    limit: in `unit`. measure: what a whole student costs. price: what layers of some shapes cost,
    up to a common factor; `None` where cost goes by parameters. example: what layers are applied to
    when they are priced; default: the one that is traced.
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
) -> tuple[Student, Pruned, Plan]:
    """A student that keeps a budget, and the plan that made it.

    criterion: which channels of a part go first, and, where `lost` is not given, how much a part
    loses with them: the sum of their scores over the layers that make them. lost: measures it
    instead, for a network without them, before any recovery: the more, the worse. Others as of
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
            f"{budget.unit}: {budget.limit:g} asks for no pruning: the network takes {whole:.4g}"
        )
    planner = _Planner(network, example, budget, criterion, widths or Widths(round_to=1), lost)
    best: tuple[Student, Pruned, Plan] | None = None
    known = ((0.0, 0.0), (planner.whole, whole))  # by the model, and measured
    for _ in range(ATTEMPTS):
        pruned = network.prune(partial(planner.select, _between(*known, budget.limit)))
        cost = budget.measure(pruned[0])
        if cost <= budget.limit and (best is None or cost > best[2].after):
            best = (*pruned, planner.plan(whole, cost))
        if CLOSE * budget.limit <= cost <= budget.limit or planner.least:
            break
        known = ((planner.whole, whole), (planner.modelled, cost))
    if best is None and planner.least:
        raise UsageError(
            f"{budget.unit}: {budget.limit:g} is below what any plan reaches: the smallest network "
            f"found takes {cost:.4g} (a lower floor, or fewer excluded layers, may help)"
        )
    if best is None:
        raise UsageError(
            f"{budget.unit}: {budget.limit:g} was not met in {ATTEMPTS} plans, of which the last "
            f"took {cost:.4g}: a little more would do, or a quieter machine"
        )
    return best


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
    ) -> None:
        self._network, self._graph, self._budget = network, network.graph, budget
        self._criterion, self._widths, self._lost = criterion, widths, lost
        self._scores = atom_scores(network.module, network.graph, criterion)
        if budget.price is None:
            self._pieces = tensors(self._graph, network.module)
        else:
            self._pieces = layers(self._graph, shapes_of(network.module, budget.example or example))
        self._known: dict[bytes, float] = {}
        self._chosen: list[tuple[np.ndarray, float, float]] = []
        self.modelled, self.least = 0.0, False
        self.whole = self._costs([])[1]

    def select(self, target: float) -> Selection:
        """The choice that loses least at no more than `target`, by the model of costs; where there
        is none, the cheapest."""
        parts = self._parts()
        losses = [np.array([self._loss(gone) for gone in options]) for options in parts]
        terms, fixed = self._costs(parts)
        self.least = False
        try:
            chosen = solve(losses, terms, target, fixed)
        except OverBudget as error:
            chosen, self.least = error.chosen, True
        self.modelled = fixed + cost_of(chosen, terms)
        self._chosen = [
            (options[i], loss[i], _saved(terms, n, i, len(parts)) / self.whole)
            for n, (options, loss, i) in enumerate(zip(parts, losses, chosen, strict=True))
        ]
        gone = [np.empty(0, np.int64), *(gone for gone, *_ in self._chosen)]
        return Selection(np.unique(np.concatenate(gone)))

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
        return costs(self._pieces, parts, self._budget.price or _themselves)

    def _loss(self, gone: np.ndarray) -> float:
        key = gone.tobytes()
        if key not in self._known:
            self._known[key] = self._summed(gone) if self._lost is None else self._measured(gone)
        return self._known[key]

    def _summed(self, gone: np.ndarray) -> float:
        made = [p.atoms for p in self._graph.producers]
        return float(sum(self._scores[atoms[np.isin(atoms, gone)]].sum() for atoms in made))

    def _measured(self, gone: np.ndarray) -> float:
        """How much worse the network is without these, by `lost`; never better."""
        assert self._lost is not None
        narrow = copy.deepcopy(self._network.module)
        removal_of(self._graph, gone).replay(narrow)
        return max(self._lost(narrow) - self._lost_whole, 0.0)

    @cached_property
    def _lost_whole(self) -> float:
        assert self._lost is not None
        return self._lost(self._network.module)

    def plan(self, before: float, after: float) -> Plan:
        """What the last choice was, for people and to be replayed."""
        parts = [self._part(*chosen) for chosen in self._chosen if chosen[0].size]
        summed = "scores of the channels that go, summed over the layers that make them"
        return Plan(
            self._budget.unit,
            self._budget.limit,
            before,
            after,
            type(self._criterion).__name__,
            summed if self._lost is None else "how much worse validation gets, one part at a time",
            parts,
            self._graph.kept_whole(),
        )

    def _part(self, gone: np.ndarray, lost: float, saves: float) -> Part:
        removed, widths = {}, {}
        for place in self._graph.producers:
            channels = np.flatnonzero(np.isin(place.atoms, gone))
            if channels.size:
                removed[place.layer] = channels.tolist()
                widths[place.layer] = (len(place.atoms), len(place.atoms) - len(channels))
        return Part(list(removed), widths, removed, float(lost), float(saves))


def _saved(terms: list[Cost], part: int, option: int, parts: int) -> float:
    """What one part's option saves where all others are whole."""
    alone = [option if n == part else 0 for n in range(parts)]
    return cost_of([0] * parts, terms) - cost_of(alone, terms)


def _themselves(numbers: Iterable[int]) -> dict[int, float]:
    return {n: float(n) for n in numbers}
