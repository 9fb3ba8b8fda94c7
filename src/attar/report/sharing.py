"""What a share stage made of the weights: how they share, at what cost, and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from attar import numbers
from attar.report.rate_distortion import points_of, rate_distortion
from attar.report.record import RunRecord

MOST_LAYERS = 12
"""Layers shown at once; the others are folded away."""
METHODS = {
    "kmeans": "Each weight takes one of the few values that k-means found",
    "dkm": "Each weight takes one of few values; which one was trained with them",
    "rate": "The weights lie on grids, and training weighed their bits against the loss",
    "hashed": "A hash of its position says which of few values a weight takes",
}
SHOWN = {"method", "layers", "distortion", "curve", "limit", "bits", "rate", "packed_bytes"}
"""What of a stage's findings its section shows."""
REASON = "why not in runs"

Layer = Mapping[str, Any]


def is_sharing(found: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a share stage found this and says its method, as it has since there are several."""
    return (
        isinstance(found, Mapping)
        and found.get("method") in METHODS
        and bool(points_of(found) or _layers(found))
    )


def shown_in_section(found: Mapping[str, Any]) -> set[str]:
    """The keys of a stage's findings that a section of this file shows."""
    if not is_sharing(found):
        return set()
    return {*SHOWN, "tried"} if points_of(found) else SHOWN


def sharings(run: RunRecord) -> list[dict[str, Any]]:
    """A section for each share stage."""
    found = run.details.get("found") or {}
    shared = {place: values for place, values in found.items() if is_sharing(values)}
    title = "What the weights share"
    return [
        {
            "title": f"{title} ({place})" if len(shared) > 1 else title,
            "said": _said(values, run.row(place.partition("-")[2]) or {}),
            "curve": rate_distortion(run, values),
            "layers": _table(_layers(values)),
        }
        for place, values in shared.items()
    ]


def _said(found: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What the weights share in a few sentences. row: the ledger's."""
    layers = list(_layers(found).values())
    if not layers:
        return ""
    weights = sum(layer["weights"] for layer in layers)
    values = sorted({layer["values"] for layer in layers})
    each = f"{values[0]:,} to {values[-1]:,}" if len(values) > 1 else f"{values[0]:,}"
    tensors = f"{len(layers)} layer{'s' * (len(layers) != 1)}"
    said = [f"{METHODS[found['method']]}: {weights:,} weights in {tensors}, of {each} values."]
    if numbers.known(found.get("distortion")):
        changed = f"{found['distortion']:.3g}"
        said.append(f"The mean squared change of the weights was {changed} of their mean square.")
    size = row.get("packed_bytes", found.get("packed_bytes"))
    if numbers.known(size):
        said.append(f"The packed file takes {numbers.size(size)}.")
    return " ".join(said)


def _layers(found: Mapping[str, Any]) -> dict[str, Layer]:
    layers = found.get("layers")
    if not isinstance(layers, Mapping):
        return {}
    return {
        str(path): layer
        for path, layer in layers.items()
        if isinstance(layer, Mapping) and {"weights", "values"} <= layer.keys()
    }


def _table(layers: Mapping[str, Layer]) -> dict[str, Any] | None:
    """The layers, largest first."""
    if not layers:
        return None
    columns = _columns(list(layers.values()))
    largest = sorted(layers, key=lambda path: -layers[path]["weights"])
    rows = [[path, *(show(layers[path]) for show in columns.values())] for path in largest]
    table = {
        "kind": "table",
        "columns": ["layer", *columns],
        "numeric": [False, *(name != REASON for name in columns)],
    }
    folded = rows[MOST_LAYERS:]
    return {
        "shown": {**table, "rows": rows[:MOST_LAYERS]},
        "folded": {**table, "rows": folded} if folded else None,
    }


def _columns(layers: list[Layer]) -> dict[str, Callable[[Layer], str]]:
    """What a row shows, by its name; a column only where it says something."""
    columns: dict[str, Callable[[Layer], str]] = {
        "weights": lambda layer: f"{layer['weights']:,}",
        "values": lambda layer: f"{layer['values']:,}",
    }
    if any("bits" in layer for layer in layers):
        columns["bits of an index"] = lambda layer: str(layer.get("bits", numbers.ABSENT))
    if any(layer.get("length", 1) != 1 for layer in layers):
        columns["weights an index"] = lambda layer: str(layer.get("length", 1))
    if any(layer.get("codebooks", 1) != 1 for layer in layers):
        columns["codebooks"] = lambda layer: str(layer.get("codebooks", 1) or "in common")
    if any("distortion" in layer for layer in layers):
        columns["distortion"] = lambda layer: _figure(layer.get("distortion"))
    if any(layer.get("single") for layer in layers):
        columns[REASON] = lambda layer: str(layer.get("single") or "")
    return columns


def _figure(value: Any) -> str:
    return f"{value:.3g}" if numbers.known(value) else numbers.ABSENT
