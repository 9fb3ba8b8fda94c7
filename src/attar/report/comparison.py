"""A comparison of criteria as one page: `comparison.html`, made of `comparison.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from attar import numbers
from attar.pipeline.comparison import ALONE, FEWEST
from attar.report.dots import DotRow, Mark, dots
from attar.report.lines import Line, lines, swatch
from attar.report.page import render
from attar.report.published import NOTE
from attar.store import write_whole

DOT_WIDTHS = {"wide": 760, "narrow": 348}
LINE_SIZES = {"wide": (760, 400), "narrow": (348, 320)}


def write_page(folder: Path) -> Path:
    """Writes `comparison.html` into the folder of a comparison from its `comparison.json`, finished
    or not. Raises `StorageError` where the page can't be written."""
    record = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    path = folder / "comparison.html"
    write_whole(path, render_comparison(record))
    return path


def render_comparison(record: dict[str, Any]) -> str:
    """The page's HTML. record: as `attar.pipeline.comparison.record` makes it."""
    metric, ranked = record["metric"], record["standings"]
    sized = any(one["size"] is not None for one in ranked)
    growing = len({one["size"] for one in ranked}) > 1
    return render(
        "comparison.html.j2",
        title=record["recipe"],
        metric=metric["name"],
        points=numbers.points(metric["unit"]),
        sentence=sentence(record),
        told=told(record),
        version=record["attar"],
        rows=[_row(one, record) for one in ranked],
        sized=sized,
        bounded=any(one["gain_low"] is not None for one in ranked),
        sources=_sources(ranked),
        note=NOTE,
        dots=None if growing else _dots(record),
        lines=_lines(record) if growing else None,
        cautions=cautions(record),
        trials=[_trial(one, metric["unit"]) for one in record["trials"]],
    )


def sentence(record: dict[str, Any]) -> str:
    """What came out, in one sentence: which criterion is best on validation, and by how much it is
    better than no teacher on test."""
    ranked = record["standings"]
    best = next((one for one in ranked if one["criterion"] != ALONE), None)
    if best is None:
        return "Only the student alone is trained so far"
    before = [_set(one) for one in ranked[: ranked.index(best)]]
    if _set(best) in before:
        said = f"No criterion beats the student alone on validation; {best['label']} comes closest"
    elif before:
        said = f"Of the criteria, {best['label']} is best on validation"
    else:
        said = f"{best['label']} is best on validation"
    if best["gain"] is None:
        return said
    unit = record["metric"]["unit"]
    above = "above" if best["gain"] >= 0 else "below"
    by = numbers.difference(abs(best["gain"]), unit) + numbers.points(unit)
    return f"{said}: on test {by} {above} the student alone{_bounds(best, unit)}"


def told(record: dict[str, Any]) -> dict[str, str] | None:
    """What the interval of the best criterion's gain says; `None` where there is no interval."""
    best = next((one for one in record["standings"] if one["criterion"] != ALONE), None)
    return None if best is None or best["gain_low"] is None else _certainty(best)


def cautions(record: dict[str, Any]) -> list[str]:
    """What keeps the figures from saying what they seem to say."""
    said, ranked = [], record["standings"]
    if record["done"] < record["asked"]:
        said.append(
            f"Not finished: {record['done']} of {record['asked']} trainings are done. The same "
            "command goes on."
        )
    counts = sorted({one["seeds"] for one in ranked})
    if len(counts) > 1:
        said.append(
            f"Seeds are unequal: some rows are means over {counts[0]}, others over {counts[-1]}. "
            "Gains are taken seed by seed; means over different seeds compare less well."
        )
    if counts and counts[0] < FEWEST:
        said.append(
            f"Fewer than {FEWEST} seeds: chance between trainings can't be told from a gain. "
            f"--seeds {FEWEST} adds to what is here."
        )
    return said


def _row(one: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    unit = record["metric"]["unit"]
    figure = one["published"]
    name, details = _parts(one)
    return {
        "name": name,
        "details": details,
        "role": _role(one, record),
        "seeds": one["seeds"],
        "validation": _with_spread(one, "validation", numbers.metric, unit),
        "test": _with_spread(one, "test", numbers.metric, unit),
        "gain": _with_spread(one, "gain", numbers.difference, unit),
        "span": numbers.span(
            {"low": one["gain_low"], "high": one["gain_high"]}, numbers.difference, unit
        ),
        "certainty": None if one["gain_low"] is None else _certainty(one),
        "published": numbers.metric(figure["value"]) if figure else "",
    }


def _sources(ranked: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Who published figures, and of which criteria."""
    found: dict[str, list[str]] = {}
    for one in ranked:
        if one["published"]:
            found.setdefault(one["published"]["source"], []).append(one["label"])
    return {source: "; ".join(labels) for source, labels in found.items()}


def _set(one: dict[str, Any]) -> tuple[str | None, int | None]:
    """The examples that a variant was taught on."""
    return one["method"], one["size"]


def _parts(one: dict[str, Any]) -> tuple[str, list[str]]:
    """A variant's name, and what more there is to say: its settings, its examples."""
    name, brace, settings = one["criterion"].partition(": {")
    told = [f"{{{settings}"] if brace else []
    return name, told + ([f"{one['size']:,}, {one['method']}"] if one["size"] is not None else [])


def _role(one: dict[str, Any], record: dict[str, Any]) -> str:
    if one["criterion"] == ALONE:
        return "baseline"
    return "final" if one is record["standings"][0] else "stage"


def _with_spread(
    one: dict[str, Any], name: str, show: Callable[[float | None, str], str], unit: str
) -> dict[str, str] | None:
    """A mean and, from two seeds on, what it varies by; `None` where there is none."""
    if one[name] is None:
        return None
    spread = numbers.difference(one[f"{name}_sd"], unit) if one["seeds"] > 1 else ""
    return {"mean": show(one[name], unit), "spread": spread}


def _certainty(one: dict[str, Any]) -> dict[str, str]:
    """What the interval says of the gain: a state, a word for the table, a sentence."""
    if one["gain_low"] > 0:
        said = "Better than alone: the whole interval is above 0"
        return {"state": "kept", "short": "better", "said": said}
    if one["gain_high"] < 0:
        said = "Worse than alone: the whole interval is below 0"
        return {"state": "missed", "short": "worse", "said": said}
    said = "Can’t be told from alone: the interval holds 0"
    return {"state": "likely", "short": "can’t be told", "said": said}


def _bounds(one: dict[str, Any], unit: str) -> str:
    span = {"low": one["gain_low"], "high": one["gain_high"]}
    shown = numbers.span(span, numbers.difference, unit)
    return f" ({shown})" if shown else ""


def _dots(record: dict[str, Any]) -> dict[str, Any]:
    """Every trial, criteria down, in the order of the standings."""
    metric, ranked, trials = record["metric"], record["standings"], record["trials"]
    rows = [
        DotRow(
            _parts(one)[0],
            [trial["test"] for trial in trials if trial["label"] == one["label"]],
            one["test"],
            one["test_sd"],
            ", ".join(_parts(one)[1]),
            _role(one, record),
        )
        for one in ranked
    ]
    alone = [one["test"] for one in ranked if one["criterion"] == ALONE]
    marks = [Mark("student alone", alone[0], "alone")] if len(alone) == 1 else []
    marks.append(Mark("teacher", statistics.fmean(one["teacher"] for one in trials), "teacher"))
    title = f"{metric['name'].capitalize()} on test"
    drawn = {
        kind: dots(
            rows,
            marks,
            title=title,
            x_label=f"{metric['name']} on test",
            show=lambda value: numbers.tick(value, metric["unit"]),
            width=width,
        )
        for kind, width in DOT_WIDTHS.items()
    }
    return {"title": title, "svg": drawn}


def _lines(record: dict[str, Any]) -> dict[str, Any]:
    """Test metric over the size of the set, a line for each criterion and method."""
    metric, series = record["metric"], _series(record["standings"])
    title = f"{metric['name'].capitalize()} on test by the size of the set"
    drawn = {
        kind: lines(
            series,
            title=title,
            x_label="examples taught on",
            y_label=f"{metric['name']} on test",
            show_x=numbers.count,
            show_y=lambda value: numbers.tick(value, metric["unit"]),
            width=width,
            height=height,
        )
        for kind, (width, height) in LINE_SIZES.items()
    }
    legend: list[tuple[Markup, str]] = [(swatch(line), line.name) for line in series]
    return {"title": title, "svg": drawn, "legend": legend}


def _series(ranked: Sequence[dict[str, Any]]) -> list[Line]:
    """Criteria have colours and methods signs, in the order of their names; the student alone is
    dashed."""
    methods = sorted({one["method"] for one in ranked})
    criteria = sorted({one["criterion"] for one in ranked} - {ALONE})
    found = []
    for criterion in (*criteria, ALONE):
        for method in methods:
            points = [
                (one["size"], one["test"], one["test_sd"])
                for one in ranked
                if (one["criterion"], one["method"]) == (criterion, method)
            ]
            if points:
                alone = criterion == ALONE
                found.append(
                    Line(
                        f"{'student alone' if alone else criterion}, {method}",
                        points,
                        None if alone else criteria.index(criterion),
                        methods.index(method),
                        dashed=alone,
                    )
                )
    return found


def _trial(one: dict[str, Any], unit: str) -> dict[str, Any]:
    shown = {name: numbers.metric(one[name], unit) for name in ("validation", "test", "teacher")}
    return {**shown, "label": one["label"], "seed": one["seed"], "folder": one["folder"]}
