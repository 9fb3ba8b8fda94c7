"""What each layer can lose, as one page: `sensitivity.html`, made of `sensitivity.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attar import numbers
from attar.report.heat import HeatCell, HeatRow, heat, swatch
from attar.report.page import render
from attar.store import write_whole

WIDTHS = {"wide": 1040, "narrow": 348}
NAMED = 3
"""Layers that a sentence names; of more it says how many."""


def write_page(folder: Path) -> Path:
    """Writes `sensitivity.html` into a folder from its `sensitivity.json`. Raises `StorageError`
    where the page can't be written."""
    record = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
    path = folder / "sensitivity.html"
    write_whole(path, render_sensitivity(record))
    return path


def render_sensitivity(record: Mapping[str, Any]) -> str:
    """The page's HTML. record: as `attar.pipeline.sensitivity.sensitivity_of` makes it."""
    unit = record["metric"]["unit"]
    return render(
        "sensitivity.html.j2",
        title=record["recipe"],
        version=record["attar"],
        headline=headline(record),
        sentences=sentences(record),
        cautions=cautions(record),
        measured=measured(record),
        parts=_parts(record),
        metric=record["metric"]["name"],
        points=numbers.points(unit).strip(),
        limit=_limit(record),
        criterion=record["criterion"],
        map=_map(record),
        has_macs=record["macs"] is not None,
        whole=_counts(record),
        ranked=[_ranked(row, record) for row in _ranking(record)],
        cells=[_listed(row, cell, record) for row in record["rows"] for cell in row["cells"]],
        kept=record["kept"],
    )


def headline(record: Mapping[str, Any]) -> str:
    """What came out, in few words."""
    ranked = _ranking(record)
    first, last, most = ranked[0]["layers"][0], ranked[-1]["layers"][0], ranked[-1]["tolerated"]
    if not _alike(record):
        return f"{first} breaks first, {last} can lose most"
    which = first if len(ranked) == 1 else "Every layer" if most else "No layer"
    can = "can’t" if len(ranked) == 1 and not most else "can"
    share = numbers.share(most or record["ratios"][0])
    return f"{which} {can} lose {share} of its {_parts(record)}"


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Which layers break first, and which can lose most, with figures."""
    ranked, parts = _ranking(record), _parts(record)
    said = []
    breaking = next((cell for cell in ranked[0]["cells"] if not _within(cell, record)), None)
    if breaking is not None:
        worse = _difference(breaking["drop"], record)
        said.append(
            f"{_brief(ranked[0])} breaks first: without {numbers.share(breaking['ratio'])} of its "
            f"{parts}, {record['metric']['name']} is {worse} worse."
        )
    most = ranked[-1]["tolerated"]
    if not most:
        least = numbers.share(record["ratios"][0])
        said.append(f"No layer can lose {least} of its {parts} for at most {_limit(record)}.")
    elif _alike(record) and len(ranked) > 1:
        said.append(
            f"Each can lose {numbers.share(most)} of its {parts} for at most {_limit(record)}."
        )
    else:
        best = [row for row in reversed(ranked) if row["tolerated"] == most]
        whose = f"its {parts}" if len(best) == 1 else f"their {parts}, one at a time,"
        said.append(
            f"{_several(best)} can lose most: {numbers.share(most)} of {whose} for at most "
            f"{_limit(record)}."
        )
    return said


def cautions(record: Mapping[str, Any]) -> list[str]:
    """What keeps the figures from saying what they seem to say."""
    said, examples = [], record["examples"]
    if not record["student"]["trained"]:
        said.append(
            "No stage has taught this student yet: what a network that knows nothing can lose says "
            "little."
        )
    if record["metric"]["unit"] == "fraction" and 4 / examples > record["limit"]:
        one = numbers.difference(1 / examples)
        said.append(
            f"Only {examples:,} examples: each is {one} points, so small drops may be chance."
        )
    return said


def measured(record: Mapping[str, Any]) -> str:
    """On what all of it was measured."""
    after = record["student"]["after"]
    stage = f" after {', '.join(after)}" if after else ""
    metric, model = record["metric"], record["student"]["model"]
    reached = f"{metric['name']} {numbers.metric(record['baseline'], metric['unit'])}"
    return f"{model}{stage}: {reached} on {record['examples']:,} {record['split']} examples"


def tolerated(row: dict[str, Any]) -> str:
    """What a row can lose, as a share."""
    least = numbers.share(row["cells"][0]["ratio"])
    return numbers.share(row["tolerated"]) if row["tolerated"] else f"< {least}"


def _ranking(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows, the most sensitive first."""
    rows = {row["name"]: row for row in record["rows"]}
    return [rows[name] for name in record["ranked"]]


def _alike(record: Mapping[str, Any]) -> bool:
    """Whether all layers can lose the same share."""
    return len({row["tolerated"] for row in record["rows"]}) == 1


def _within(cell: dict[str, Any], record: Mapping[str, Any]) -> bool:
    return cell["drop"] is not None and bool(cell["drop"] <= record["limit"])


def _difference(drop: float | None, record: Mapping[str, Any]) -> str:
    unit = record["metric"]["unit"]
    return numbers.difference(drop, unit) + numbers.points(unit)


def _limit(record: Mapping[str, Any]) -> str:
    return _difference(record["limit"], record)


def _parts(record: Mapping[str, Any]) -> str:
    return f"{record['granularity']}s"


def _brief(row: dict[str, Any]) -> str:
    """A row in a sentence: its first layer, and how many share its channels."""
    others = len(row["layers"]) - 1
    more = f" (with {others} that share{'s' if others == 1 else ''} its channels)"
    return f"{row['layers'][0]}{more if others else ''}"


def _several(rows: list[dict[str, Any]]) -> str:
    names = [_brief(row) for row in rows[:NAMED]]
    if len(rows) > NAMED:
        return f"{', '.join(names)} and {len(rows) - NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _map(record: Mapping[str, Any]) -> dict[str, Any]:
    worst = max([c["drop"] for row in record["rows"] for c in row["cells"] if c["drop"]] + [0.0])
    rows = [
        HeatRow(
            row["name"],
            f"{row['size']:,} {_parts(record)}",
            [_cell(cell, worst, record) for cell in row["cells"]],
        )
        for row in record["rows"]
    ]
    metric = record["metric"]
    counted = numbers.points(metric["unit"]).strip()
    title = f"Drop in {metric['name']}{f', {counted}' if counted else ''}"
    drawn = {
        kind: heat(
            rows,
            [numbers.share(ratio) for ratio in record["ratios"]],
            title=title,
            x_label=f"share of the layer’s {_parts(record)} removed",
            width=width,
        )
        for kind, width in WIDTHS.items()
    }
    legend = [(swatch("kept"), f"at most {_limit(record)}")]
    if worst > record["limit"]:
        shown = numbers.difference(worst, metric["unit"])
        legend += [(swatch("lost"), "beyond it"), (swatch("lost", 1.0), f"the worst, {shown}")]
    if any(not cell["removed"] for row in record["rows"] for cell in row["cells"]):
        legend.append((swatch("empty"), "too few to remove any"))
    return {"title": title, "svg": drawn, "legend": legend}


def _cell(cell: dict[str, Any], worst: float, record: Mapping[str, Any]) -> HeatCell:
    unit = record["metric"]["unit"]
    if not cell["removed"]:
        return HeatCell(numbers.ABSENT, "empty", tip="nothing could be removed")
    figure = numbers.difference(cell["drop"], unit)
    reached = f"{record['metric']['name']} {numbers.metric(cell['metric'], unit)}"
    tip = f"{reached}, {cell['removed']:,} {_parts(record)} fewer"
    if _within(cell, record):
        return HeatCell(figure, "kept", tip=tip)
    drop = worst if cell["drop"] is None else cell["drop"]
    beyond = (drop - record["limit"]) / (worst - record["limit"]) if worst > drop else 1.0
    return HeatCell(figure, "lost", math.sqrt(beyond), tip)


def _counts(record: Mapping[str, Any]) -> dict[str, str]:
    return {name: numbers.count(record[name]) for name in ("parameters", "macs")}


def _ranked(row: dict[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: what the layer can lose, and what that saves."""
    cells = [cell for cell in row["cells"] if cell["ratio"] <= row["tolerated"]]
    cell = cells[-1] if cells else None
    return {
        "name": row["name"],
        "size": f"{row['size']:,}",
        "tolerated": tolerated(row),
        "drop": numbers.difference(cell["drop"], record["metric"]["unit"]) if cell else "",
        "parameters": _saved(cell, record, "parameters"),
        "macs": _saved(cell, record, "macs"),
    }


def _saved(cell: dict[str, Any] | None, record: Mapping[str, Any], what: str) -> str:
    """How much of the whole network a cell saves, as a share."""
    if cell is None or record[what] is None:
        return ""
    return f"{100 * (1 - cell[what] / record[what]):.1f} %"


def _listed(row: dict[str, Any], cell: dict[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    unit = record["metric"]["unit"]
    return {
        "name": row["name"],
        "ratio": numbers.share(cell["ratio"]),
        "removed": f"{cell['removed']:,}",
        "metric": numbers.metric(cell["metric"], unit),
        "drop": numbers.difference(cell["drop"], unit),
        "parameters": numbers.count(cell["parameters"]),
        "macs": numbers.count(cell["macs"]),
    }
