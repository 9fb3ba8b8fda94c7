"""Choosing one option for each of many parts, so that least is lost within a budget.

What a part costs may depend on what was chosen for another: a convolution takes as long as the
channels that it reads and those that it makes ask for, together. The choice is a mixed-integer
linear program, solved to proven optimality (within `GAP`) by HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from attar.errors import UsageError

GAP = 1e-3
"""How far from the best a solution may be, as a share of what is lost."""
SECONDS = 60.0


class OverBudget(UsageError):
    """A budget that no choice keeps. chosen: the one that costs least. cost: what it costs."""

    def __init__(self, chosen: list[int], cost: float) -> None:
        super().__init__(f"no choice costs less than {cost:g}")
        self.chosen, self.cost = chosen, cost


@dataclass(frozen=True)
class Cost:
    """What options cost together: `table[i, j]` where part `a` takes option i and `b` option j.

    With `b` `None`, `table[i]`: what part `a` costs by itself. unless: a part of two options whose
    second one makes all of it cost nothing.
    """

    a: int
    b: int | None
    table: np.ndarray
    unless: int | None = None

    def of(self, chosen: Sequence[int]) -> float:
        """What is paid for an option of each part."""
        if self.unless is not None and chosen[self.unless]:
            return 0.0
        at = chosen[self.a] if self.b is None else (chosen[self.a], chosen[self.b])
        return float(self.table[at])


def solve(
    losses: Sequence[np.ndarray], costs: Sequence[Cost], budget: float, fixed: float = 0.0
) -> list[int]:
    """For each part the option to take: least summed loss, at a cost within the budget.

    losses: by part, what each of its options loses, float (options,). fixed: what is paid whatever
    is chosen. Raises `OverBudget` with the cheapest choice.

    Example:
        >>> losses = [np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0])]
        >>> costs = [Cost(0, 1, np.array([[9.0, 6.0], [6.0, 4.0], [3.0, 2.0]]))]
        >>> solve(losses, costs, budget=6)
        [1, 0]
    """
    program = _Program([len(loss) for loss in losses], costs)
    lost = np.concatenate([*losses, np.zeros(program.pairs)])
    found = program.run(lost, budget - fixed)
    if found is None:
        cheapest = program.run(program.cost, np.inf)
        assert cheapest is not None
        raise OverBudget(cheapest, fixed + cost_of(cheapest, costs))
    return found


def cost_of(chosen: Sequence[int], costs: Sequence[Cost]) -> float:
    """What a choice costs, without what is fixed."""
    return sum(cost.of(chosen) for cost in costs)


class _Program:
    """The variables: whether part p takes option i (whole), and, for each table, whether the parts
    that it is of take i and j (which follows, so they need not be asked to be whole)."""

    def __init__(self, sizes: list[int], costs: Sequence[Cost]) -> None:
        self._sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        merged = _merged(costs)
        self.pairs = sum(c.table.size for c in merged if not self._direct(c))
        self.cost = np.zeros(self._starts[-1] + self.pairs)
        self._entries: list[tuple[int, int, float]] = []
        self._least: list[float] = []
        self._most: list[float] = []
        for part, size in enumerate(sizes):
            self._row([(self._starts[part] + i, 1.0) for i in range(size)], 1.0, 1.0)
        at = int(self._starts[-1])
        for cost in merged:
            if self._direct(cost):
                self.cost[self._starts[cost.a] : self._starts[cost.a] + len(cost.table)] += (
                    cost.table
                )
            else:
                self._couple(cost, at)
                at += cost.table.size

    @staticmethod
    def _direct(cost: Cost) -> bool:
        """Whether a table's entries are what options of one part cost, whatever else is chosen."""
        return cost.b is None and cost.unless is None

    def _couple(self, cost: Cost, at: int) -> None:
        """A variable from `at` on for each entry of a table: those with i sum to whether `a` takes
        i, and so for `b`; with `unless`, to no more than that, and all to whether it is paid."""
        places = at + np.arange(cost.table.size).reshape(cost.table.shape)
        self.cost[at : at + cost.table.size] = cost.table.reshape(-1)
        sides: list[tuple[int, np.ndarray]] = [(cost.a, places.reshape(len(places), -1))]
        if cost.b is not None:
            sides.append((cost.b, places.T))
        least = 0.0 if cost.unless is None else -1.0
        for part, rows in sides:
            for i, row in enumerate(rows):
                self._row([*((p, 1.0) for p in row), (self._starts[part] + i, -1.0)], least, 0.0)
        if cost.unless is not None:
            paid = (int(self._starts[cost.unless]), -1.0)
            self._row([*((int(p), 1.0) for p in places.reshape(-1)), paid], 0.0, 0.0)

    def _row(self, terms: list[tuple[int, float]], least: float, most: float) -> None:
        self._entries += [(len(self._least), place, value) for place, value in terms]
        self._least.append(least)
        self._most.append(most)

    def run(self, objective: np.ndarray, budget: float) -> list[int] | None:
        """The option of each part; `None` where none keeps the budget."""
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = coo_matrix((values, (rows, columns)), (len(self._least), len(self.cost)))
        constraints = [LinearConstraint(matrix, self._least, self._most)]
        if np.isfinite(budget):
            constraints.append(LinearConstraint(self.cost[None], -np.inf, budget))
        whole = np.zeros(len(self.cost))
        whole[: self._starts[-1]] = 1
        found = milp(
            objective / (np.abs(objective).max() or 1.0),
            constraints=constraints,
            integrality=whole,
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if found.x is None:
            return None
        parts = zip(self._starts, self._sizes, strict=False)
        return [int(np.argmax(found.x[start : start + size])) for start, size in parts]


def _merged(costs: Sequence[Cost]) -> list[Cost]:
    """One table for each two parts that cost together, smaller part first."""
    merged: dict[tuple[int, int | None, int | None], np.ndarray] = {}
    for cost in costs:
        a, b, table = cost.a, cost.b, np.asarray(cost.table, dtype=float)
        if b is not None and a == b:
            b, table = None, np.diagonal(table)
        elif b is not None and b < a:
            a, b, table = b, a, table.T
        key = (a, b, cost.unless)
        merged[key] = merged[key] + table if key in merged else table
    return [Cost(a, b, table, unless) for (a, b, unless), table in merged.items()]
