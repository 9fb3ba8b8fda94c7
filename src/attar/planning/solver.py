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

    With `b` `None`, `table[i]`: what part `a` costs by itself.
    """

    a: int
    b: int | None
    table: np.ndarray


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
    return float(
        sum(
            c.table[chosen[c.a]] if c.b is None else c.table[chosen[c.a], chosen[c.b]]
            for c in costs
        )
    )


class _Program:
    """The variables: whether part p takes option i (whole), and whether two parts that cost
    together take i and j (which follows, so they need not be asked to be whole)."""

    def __init__(self, sizes: list[int], costs: Sequence[Cost]) -> None:
        self._sizes = sizes
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        merged = _merged(costs)
        self.pairs = sum(table.size for (_, b), table in merged.items() if b is not None)
        self.cost = np.zeros(self._starts[-1] + self.pairs)
        self._entries: list[tuple[int, int, float]] = []
        self._right: list[float] = []
        for part, size in enumerate(sizes):
            self._equal([(self._starts[part] + i, 1.0) for i in range(size)], 1.0)
        at = int(self._starts[-1])
        for (a, b), table in merged.items():
            if b is None:
                self.cost[self._starts[a] : self._starts[a] + len(table)] += table
            else:
                self._couple(a, b, table, at)
                at += table.size

    def _couple(self, a: int, b: int, table: np.ndarray, at: int) -> None:
        """Pairs (i, j) from `at` on: those with i sum to whether `a` takes i, and so for j."""
        places = at + np.arange(table.size).reshape(table.shape)
        self.cost[at : at + table.size] = table.reshape(-1)
        for part, rows in ((a, places), (b, places.T)):
            for i, row in enumerate(rows):
                self._equal([*((p, 1.0) for p in row), (self._starts[part] + i, -1.0)], 0.0)

    def _equal(self, terms: list[tuple[int, float]], right: float) -> None:
        self._entries += [(len(self._right), place, value) for place, value in terms]
        self._right.append(right)

    def run(self, objective: np.ndarray, budget: float) -> list[int] | None:
        """The option of each part; `None` where none keeps the budget."""
        rows, columns, values = zip(*self._entries, strict=True)
        size = (len(self._right), len(self.cost))
        constraints = [
            LinearConstraint(coo_matrix((values, (rows, columns)), size), self._right, self._right)
        ]
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


def _merged(costs: Sequence[Cost]) -> dict[tuple[int, int | None], np.ndarray]:
    """One table for each two parts that cost together, smaller part first."""
    merged: dict[tuple[int, int | None], np.ndarray] = {}
    for cost in costs:
        a, b, table = cost.a, cost.b, np.asarray(cost.table, dtype=float)
        if b is not None and a == b:
            b, table = None, np.diagonal(table)
        elif b is not None and b < a:
            a, b, table = b, a, table.T
        merged[a, b] = merged[a, b] + table if (a, b) in merged else table
    return merged
