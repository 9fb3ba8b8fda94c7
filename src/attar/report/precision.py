"""Which layers compute in int8 and which in float, as tables: the most sensitive layer first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from attar import numbers


def is_precision(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether this is a plan of layers' precision, as `PrecisionPlan.to_json` writes it."""
    return isinstance(value, Mapping) and {"layers", "tried", "float_layers", "why"} <= value.keys()


def precision(plan: Mapping[str, Any], unit: str = "fraction") -> dict[str, Any]:
    """What the plan says in a sentence, its layers and the arrangements that were tried, as what
    `found.shown` shows. unit: of the metric that drops."""
    layers = sorted(plan["layers"], key=lambda row: -(row["loss"] or 0.0))
    tried = [_tried(trial, i == plan["chosen"], unit) for i, trial in enumerate(plan["tried"])]
    return {
        "for": _limit(plan, unit),
        "found": plan["why"],
        "layers": [_layer(row, plan["unit"]) for row in layers],
        "arrangements tried, on validation and in the runtime": tried,
    }


def _limit(plan: Mapping[str, Any], unit: str) -> str:
    if plan["asks"] == "latency":
        return f"at most {numbers.share(plan['limit'])} of the time in float"
    most = numbers.difference(plan["limit"], unit) + numbers.points(unit)
    return f"a drop of at most {most} on validation"


def _layer(row: Mapping[str, Any], unit: str) -> dict[str, Any]:
    return {
        "layer": row["layer"],
        "precision": row["precision"],
        f"loss in int8, {unit}": _loss(row),
        "float, µs": _time(row["float_us"]),
        "int8, µs": _time(row["int8_us"]),
        "why": row["why"],
    }


def _tried(trial: Mapping[str, Any], chosen: bool, unit: str) -> dict[str, Any]:
    kept = "kept" if trial["kept"] else "broken"
    drop = numbers.difference(trial["drop"], unit)
    return {
        "layers in float": len(trial["float_layers"]),
        "losses summed": f"{trial['loss']:.2g}",
        f"drop{numbers.points(unit) and ', points'}": drop,
        "its interval": numbers.span(trial, numbers.difference, unit),
        "of float's time": f"{trial['ratio']:.2f}",
        "limit": f"{kept}, chosen" if chosen else kept,
    }


def _loss(row: Mapping[str, Any]) -> str:
    if row["loss"] is None:
        return numbers.ABSENT
    error = f" ± {row['error']:.1g}" if numbers.known(row["error"]) else ""
    return f"{row['loss']:.2g}{error}"


def _time(microseconds: float | None) -> str:
    return numbers.ABSENT if microseconds is None else f"{microseconds:.0f}"
