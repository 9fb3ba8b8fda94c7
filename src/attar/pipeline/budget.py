"""Whether a run's result keeps the person's budget, judged on validation."""

from __future__ import annotations

from typing import Any

from attar.recipe.model import Budget


def judge(budget: Budget, row: dict[str, Any]) -> dict[str, Any]:
    """The ledger's `budget`: its limits, `met`, `certain`, and `figures`, one per limit.

    `met`: by the estimates. `certain`: when the bound of each interval keeps the limit too: the
    drop's upper bound, the latency's 90th percentile.
    """
    drop = row.get("validation_drop", {})
    latency = row["latency"][0]
    measured = {
        "max_drop": (drop.get("value", 0.0), drop.get("high", 0.0)),
        "latency_ms": (latency["p50_ms"], latency["p90_ms"]),
        "size": (row["bundle"]["bytes"], row["bundle"]["bytes"]),
        "memory": (row["memory_mb"] * 1e6, row["memory_mb"] * 1e6),
    }
    figures = []
    for name, limit in budget.model_dump(exclude_none=True).items():
        value, bound = measured[name]
        figures.append(
            {
                "name": name,
                "limit": limit,
                "value": value,
                "bound": bound,
                "met": value <= limit,
                "certain": bound <= limit,
            }
        )
    return {
        **budget.model_dump(exclude_none=True),
        "met": all(f["met"] for f in figures),
        "certain": all(f["certain"] for f in figures),
        "figures": figures,
    }
