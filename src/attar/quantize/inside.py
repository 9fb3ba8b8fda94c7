"""A look inside the int8 file: where its time goes, what stayed float, where noise enters.

So that "int8 is slower" and "accuracy fell" have an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from attar.quantize.bench import RuntimeBench
from attar.quantize.noise import LAYERS, LayerNoise, in_json
from attar.runtimes.inside import Operator, float_operators
from attar.student import Student

ALL_FLOAT = ("*",)


def look_inside(
    bench: RuntimeBench,
    float_layers: tuple[str, ...],
    why: Mapping[str, str],
    examples: Iterable[tuple[Any, ...]],
    *,
    given: tuple[str, ...] = (),
    student: Student | None = None,
) -> dict[str, Any]:
    """What the runtime runs with these layers in float, beside what it runs all in float, as JSON.

    float_layers, why: as decided, with a reason each. Where everything stays float, the arrangement
    with only `given` in float is looked at instead, which shows why it was not taken. examples:
    argument tuples, batch first, for the noise; a few dozen examples do. student: whose noise is
    told, where that isn't the bench's: one recovered since.

    Returns `runtime`; `deployed`, whether this is what is deployed; `sum_us` (`before` in float,
    `after`); `operators` by type and precision (`count_before`, `us_before`, …); `conversions`
    (`count`, `us`) between float and int8; `float_inside` (see `runtimes.inside.FloatOperator`);
    `layers` in order, with `us_before`, `us_after`, `own_snr_db`, `snr_db` (see `layer_noise`;
    `None` where unknown or without noise). Times are medians in microseconds from the runtime's
    profiler, which slows every operator by about one: their sum is no latency. Empty where nothing
    is to be looked at: the recipe wants all in float.

    Example:
        >>> found = look_inside(bench, (), {}, [(images,)])        # doctest: +SKIP
        >>> [one["why"] for one in found["float_inside"]]          # doctest: +SKIP
        []
    """
    deployed = float_layers != ALL_FLOAT
    looked = float_layers if deployed else given
    if looked == ALL_FLOAT:
        return {}
    reasons = {layer: why.get(layer, "the recipe says so") for layer in looked}
    before, after = bench.inside(ALL_FLOAT), bench.inside(looked)
    noise = bench.noise(looked, examples, student if deployed else None)
    conversions = [o for o in after if o.kind == "convert"]
    return {
        "runtime": bench.runtime,
        "deployed": deployed,
        "sum_us": {"before": _total(before), "after": _total(after)},
        "operators": _by_type(before, after),
        "conversions": {"count": len(conversions), "us": _total(conversions)},
        "float_inside": [asdict(o) for o in float_operators(after, reasons, bench.runtime)],
        "layers": _layers(noise, bench.times(looked)),
    }


def _total(operators: Iterable[Operator]) -> float:
    return round(sum(o.us for o in operators), 2)


def _by_type(before: Sequence[Operator], after: Sequence[Operator]) -> list[dict[str, Any]]:
    """Counts and times by operator and precision, those that take most time first."""
    kinds = dict.fromkeys((o.op, o.precision) for o in (*before, *after))
    rows = []
    for kind in kinds:
        was, now = ([o for o in some if (o.op, o.precision) == kind] for some in (before, after))
        rows.append(
            {
                "op": kind[0],
                "precision": kind[1],
                "count_before": len(was),
                "us_before": _total(was),
                "count_after": len(now),
                "us_after": _total(now),
            }
        )
    return sorted(rows, key=lambda row: -max(row["us_before"], row["us_after"]))


def _layers(
    noise: Sequence[LayerNoise], times: Mapping[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Layers in order. A module's time is told once, at the first of its operators with weights."""
    left = dict(times)
    rows = []
    for one in noise:
        was, now = left.pop(one.layer, (None, None)) if one.operator in LAYERS else (None, None)
        rows.append(
            {
                "layer": one.layer,
                "op": f"{one.operator}.{one.number}" if one.number else one.operator,
                "us_before": was,
                "us_after": now,
                "own_snr_db": in_json(one.own_db),
                "snr_db": in_json(one.snr_db),
            }
        )
    known = {row["layer"] for row in rows}
    nothing = {"op": "", "own_snr_db": None, "snr_db": None}
    for layer, (was, now) in left.items():
        if layer not in known:
            rows.append({"layer": layer, **nothing, "us_before": was, "us_after": now})
    return rows
