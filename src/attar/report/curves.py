"""The training curves: loss and validation metric of every training, from the run's log."""

from __future__ import annotations

from typing import Any

from attar import numbers
from attar.report.charts import curve
from attar.report.record import RunRecord
from attar.report.verdict import unit_of


def trainings(run: RunRecord) -> list[dict[str, Any]]:
    """Each training's curves, in order; of epochs told twice (a resumed run) the last counts."""
    groups: dict[tuple[Any, str, str], dict[int, dict[str, Any]]] = {}
    place, stage = None, ""
    for event in run.events:
        if event["event"] == "stage":
            place, stage = event.get("index"), str(event.get("name", ""))
        elif event["event"] == "epoch" and isinstance(event.get("epoch"), int):
            key = (place, stage, str(event.get("label", "")))
            groups.setdefault(key, {})[event["epoch"]] = event
    unit = unit_of(run.final)
    drawn = [
        _training(stage, label, [epochs[e] for e in sorted(epochs)], unit)
        for (_, stage, label), epochs in groups.items()
    ]
    return [training for training in drawn if training is not None]


def _training(
    stage: str, label: str, epochs: list[dict[str, Any]], unit: str
) -> dict[str, Any] | None:
    losses = [(e["epoch"], e["loss"]) for e in epochs if numbers.known(e.get("loss"))]
    if not losses:
        return None
    values = [
        (e["epoch"], e["metric"]["value"])
        for e in epochs
        if isinstance(e.get("metric"), dict) and numbers.known(e["metric"].get("value"))
    ]
    best = next((e["epoch"] for e in reversed(epochs) if e.get("best")), None)
    mark = next(((e, v) for e, v in values if e == best), None)
    said = [_length(epochs)]
    if mark is not None:
        said.append(f"best {numbers.metric(mark[1], unit)} in epoch {mark[0]}")
    title = " · ".join(dict.fromkeys(part for part in (stage, label) if part))
    name = str((epochs[-1].get("metric") or {}).get("name", "metric"))
    terms = _terms(epochs, "terms")
    colours = {term: f"term t{i % 4}" for i, (term, _) in enumerate(terms)}
    lines = [(colours[term], line) for term, line in terms]
    gradients = [(colours.get(term, "total"), line) for term, line in _terms(epochs, "gradients")]
    return {
        "title": title,
        "said": "; ".join(said),
        "terms": [term for term, _ in terms],
        "loss": curve([*lines, ("total", losses)], title=f"{title}: loss", show_y="{:.3g}".format),
        "gradients": gradients
        and curve(gradients, title=f"{title}: gradients", show_y="{:.2g}".format),
        "metric_name": name,
        "metric": values
        and curve(
            [("metric", values)],
            title=f"{title}: {name}",
            show_y=lambda v: numbers.tick(v, unit),
            best=mark,
        ),
    }


def _length(epochs: list[dict[str, Any]]) -> str:
    taken = sum(e["seconds"] for e in epochs if numbers.known(e.get("seconds")))
    text = f"{len(epochs)} {'epoch' if len(epochs) == 1 else 'epochs'}"
    return f"{text}, {numbers.seconds(taken)}" if taken else text


def _terms(epochs: list[dict[str, Any]], key: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """A figure of the loss's terms over the epochs, where there are several terms."""
    names = list((epochs[-1].get(key) or {}).keys())
    if len(names) < 2:
        return []
    lines = []
    for name in names:
        values = [(e["epoch"], (e.get(key) or {}).get(name)) for e in epochs]
        line = [(e, v) for e, v in values if numbers.known(v)]
        if line:
            lines.append((str(name), line))
    return lines
