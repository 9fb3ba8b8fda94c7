"""Inside the int8 file: where its time goes, what stayed float in it, where noise enters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from attar import numbers
from attar.report.dots import DotRow, dots
from attar.report.drawing import WIDTHS
from attar.report.record import RunRecord

SHOWN = 12
"""Layers drawn: those with least signal over noise, in the network's order."""
WORST = 3
LOST_US = 2.0
"""What a layer must lose in the profile to be named."""


def is_inside(value: object) -> bool:
    """Whether this is what a quantize stage found inside its file."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("operators"), list)
        and isinstance(value.get("layers"), list)
        and isinstance(value.get("float_inside"), list)
    )


def insides(run: RunRecord) -> list[dict[str, Any]]:
    """A section for each quantize stage that looked inside its file."""
    found = run.details.get("found") or {}
    return [
        _section(values["inside"], values)
        for values in found.values()
        if isinstance(values, Mapping) and is_inside(values.get("inside"))
    ]


def _section(inside: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    taken = bool(inside.get("deployed", True))
    layers, floats = _rows(inside["layers"]), _rows(inside["float_inside"])
    within = [one for one in floats if one.get("place") == "inside"]
    avoidable = [one for one in within if one.get("avoidable")]
    return {
        "title": "Inside the int8 file" if taken else "Inside the int8 file that was not taken",
        "time": _time_said(inside, values.get("int8_over_float")),
        "operators": _operators(inside["operators"]),
        "float_said": _float_said(inside, within, avoidable),
        "float": [_float_row(one) for one in [*avoidable, *_others(floats, avoidable)]],
        "noise_said": _noise_said(layers),
        "picture": _picture(layers),
        "layers": [_layer_row(one) for one in layers],
    }


def _rows(value: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)]


def _others(
    floats: list[Mapping[str, Any]], first: list[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    return [one for one in floats if one not in first]


def _time_said(inside: Mapping[str, Any], ratio: Any) -> str:
    """Is it slower, and what takes the time."""
    said = []
    if isinstance(ratio, Mapping) and numbers.known(ratio.get("ratio")):
        share = ratio["ratio"]
        bounds = f"{ratio.get('low', share):.2f} to {ratio.get('high', share):.2f}"
        word = "less" if share < 1 else "more"
        said.append(
            f"Int8 takes {share:.2f} of float’s time ({bounds}): {abs(1 - share):.0%} {word}."
        )
    total = (inside.get("sum_us") or {}).get("after")
    converting = inside.get("conversions") or {}
    if numbers.known(total) and total > 0 and numbers.known(converting.get("us")):
        count = converting.get("count", 0)
        said.append(
            f"{count} conversion{'s' * (count != 1)} between float and int8 take"
            f"{'s' * (count == 1)} {converting['us'] / total:.0%} of the operators’ time."
        )
        said.append(_lost_said(_rows(inside["layers"])))
    return " ".join(said)


def _lost_said(layers: list[Mapping[str, Any]]) -> str:
    lost = {
        str(one.get("layer")): one["us_after"] - one["us_before"]
        for one in layers
        if numbers.known(one.get("us_before")) and numbers.known(one.get("us_after"))
    }
    slower = sorted((n for n, us in lost.items() if us > LOST_US), key=lambda n: -lost[n])
    if not slower:
        return "No layer takes longer than in float."
    named = ", ".join(f"{name} by {lost[name]:.0f} µs" for name in slower[:WORST])
    more = f" and {len(slower) - WORST} more" if len(slower) > WORST else ""
    return f"Slower than in float: {named}{more}."


def _float_said(inside: Mapping[str, Any], within: list[Any], avoidable: list[Any]) -> str:
    if not inside["operators"]:
        return f"{inside.get('runtime', 'The runtime')} doesn’t tell what it runs."
    if avoidable:
        return (
            f"{len(avoidable)} operator{'s' * (len(avoidable) != 1)} between int8 ones compute"
            f"{'s' * (len(avoidable) == 1)} in float where an int8 kernel exists."
        )
    rest = f" {len(within)} without one lie between int8 operators." if within else ""
    return f"No operator inside computes in float where an int8 kernel exists.{rest}"


def _noise_said(layers: list[Mapping[str, Any]]) -> str:
    ranked = sorted(
        (one for one in layers if numbers.known(one.get("own_snr_db"))),
        key=lambda one: one["own_snr_db"],
    )
    if not ranked:
        return ""
    named = ", ".join(f"{_name(one)} ({one['own_snr_db']:.0f} dB)" for one in ranked[:WORST])
    return f"Most noise of their own add {named}." if len(ranked) > 1 else f"{named} alone."


def _name(one: Mapping[str, Any]) -> str:
    """A layer by its path, with its operator where the path doesn't say which."""
    layer, op = str(one.get("layer") or ""), str(one.get("op") or "")
    if op in ("conv1d", "conv2d", "conv3d", "linear", "") and layer:
        return layer
    return f"{layer} {op}".strip()


def _picture(layers: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    known = [
        one
        for one in layers
        if numbers.known(one.get("snr_db")) and numbers.known(one.get("own_snr_db"))
    ]
    if len(known) < 2:
        return None
    limit = sorted(one["snr_db"] for one in known)[:SHOWN][-1]
    drawn = [one for one in known if one["snr_db"] <= limit]
    worst = min(drawn, key=lambda one: one["own_snr_db"])
    rows = [
        DotRow(
            _name(one),
            [one["own_snr_db"]],
            one["snr_db"],
            0.0,
            role="final" if one is worst else "stage",
        )
        for one in drawn
    ]
    return {
        "title": "Signal over quantization noise, layer by layer",
        "svg": {kind: _drawn(rows, width) for kind, (width, _) in WIDTHS.items()},
        "cut": len(known) - len(rows),
    }


def _drawn(rows: list[DotRow], width: int) -> Markup:
    return dots(
        rows,
        [],
        title="Signal over quantization noise by layer",
        x_label="signal over noise, dB: more is better",
        show="{:.3g}".format,
        width=width,
    )


def _operators(rows: Sequence[Any]) -> dict[str, Any] | None:
    if not rows:
        return None
    return {
        "kind": "table",
        "name": "",
        "columns": ["operator", "computes in", "in float", "µs", "in int8", "µs"],
        "numeric": [False, False, True, True, True, True],
        "rows": [
            [
                str(one.get("op", "")),
                str(one.get("precision", "")),
                *_counted(one, "before"),
                *_counted(one, "after"),
            ]
            for one in _rows(rows)
        ],
    }


def _counted(one: Mapping[str, Any], when: str) -> tuple[str, str]:
    count = one.get(f"count_{when}")
    if not count:
        return "", ""
    return numbers.count(count), _plain(one.get(f"us_{when}"))


def _float_row(one: Mapping[str, Any]) -> dict[str, str]:
    where = {"inside": "", "before": "before the int8 part", "after": "after the int8 part"}
    return {
        "node": str(one.get("node", "")),
        "op": str(one.get("op", "")),
        "where": where.get(str(one.get("place")), ""),
        "us": _plain(one.get("us")),
        "why": str(one.get("why", "")),
        "tone": "missed" if one.get("avoidable") else "",
    }


def _layer_row(one: Mapping[str, Any]) -> list[str]:
    figures = ("us_before", "us_after", "own_snr_db", "snr_db")
    return [_name(one), *(_plain(one.get(key)) for key in figures)]


def _plain(value: Any) -> str:
    return f"{value:.1f}" if numbers.known(value) else numbers.ABSENT
