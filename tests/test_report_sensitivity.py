"""The page of a sensitivity analysis: true in its words and figures, whole in one file."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from attar.report.heat import HeatCell, HeatRow, heat
from attar.report.sensitivity import cautions, headline, render_sensitivity, sentences, write_page

RATIOS = (0.25, 0.5)
Drops = tuple[float | None, float | None]


def record(rows: dict[str, Drops], *, ranked: list[str] | None = None, **changes: Any) -> Any:
    """What `sensitivity.json` holds, by the names of rows with their drops at 25 % and 50 %; a name
    of several layers has commas."""
    made = []
    for name, drops in rows.items():
        within = [r for r, d in zip(RATIOS, drops, strict=True) if d is not None and d <= 0.01]
        cells = [
            {"ratio": ratio, "removed": int(16 * ratio), "parameters": 1000 - int(400 * ratio),
             "macs": 50_000 - int(9000 * ratio), "metric": None if drop is None else 0.9 - drop,
             "drop": drop}
            for ratio, drop in zip(RATIOS, drops, strict=True)
        ]  # fmt: skip
        first = next((r for r in RATIOS if r not in within), 1)
        tolerated = max((r for r in within if r < first), default=0.0)
        layers = name.split(", ")
        made.append(
            {"name": name, "layers": layers, "size": 16, "tolerated": tolerated, "cells": cells}
        )
    return {
        "schema": 1, "attar": "0.1.0", "recipe": "mine",
        "student": {"model": "resnet18", "after": ["distill"], "trained": True, "fingerprint": ""},
        "granularity": "channel", "criterion": "magnitude", "split": "validation",
        "metric": {"name": "accuracy", "unit": "fraction", "higher_is_better": True},
        "examples": 2000, "baseline": 0.9, "parameters": 1000, "macs": 50_000, "limit": 0.01,
        "ratios": list(RATIOS), "rows": made, "ranked": ranked or list(rows),
        "kept": {"fc": "its channels are the network's output"}, **changes,
    }  # fmt: skip


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


STEADY, HALF, BROKEN = (0.0, 0.002), (0.004, 0.1234), (0.05, 0.4)


@pytest.mark.parametrize(
    ("rows", "head", "said"),
    [
        (
            {"conv1": BROKEN, "conv2": HALF, "conv3": STEADY},
            "conv1 breaks first, conv3 can lose most",
            ["conv1 breaks first: without 25 % of its channels, accuracy is 5.00 points worse.",
             "conv3 can lose most: 50 % of its channels for at most 1.00 points."],
        ),
        (
            {"a, b, c": HALF, "d": STEADY, "e": STEADY},
            "a breaks first, e can lose most",
            ["a (with 2 that share its channels) breaks first: without 50 % of its channels, "
             "accuracy is 12.34 points worse.",
             "e and d can lose most: 50 % of their channels, one at a time, for at most 1.00 "
             "points."],
        ),
        (
            {"a": STEADY, "b": STEADY},
            "Every layer can lose 50 % of its channels",
            ["Each can lose 50 % of its channels for at most 1.00 points."],
        ),
        (
            {"a": BROKEN, "b": BROKEN},
            "No layer can lose 25 % of its channels",
            ["a breaks first: without 25 % of its channels, accuracy is 5.00 points worse.",
             "No layer can lose 25 % of its channels for at most 1.00 points."],
        ),
        (
            {"a": HALF},
            "a can lose 25 % of its channels",
            ["a breaks first: without 50 % of its channels, accuracy is 12.34 points worse.",
             "a can lose most: 25 % of its channels for at most 1.00 points."],
        ),
        (
            {"a": (0.2, 0.3)},
            "a can’t lose 25 % of its channels",
            ["a breaks first: without 25 % of its channels, accuracy is 20.00 points worse.",
             "No layer can lose 25 % of its channels for at most 1.00 points."],
        ),
    ],
)  # fmt: skip
def test_the_words_say_what_breaks_and_what_holds(rows, head, said) -> None:
    made = record(rows)
    assert (headline(made), sentences(made)) == (head, said)
    page = words(render_sensitivity(made))
    assert head in page and all(one in page for one in said)


def test_every_figure_is_on_the_page(tmp_path) -> None:
    made = record({"conv1": (-0.0125, 0.0777), "<b>": BROKEN}, ranked=["<b>", "conv1"])
    (tmp_path / "sensitivity.json").write_text(json.dumps(made))
    html = write_page(tmp_path).read_text()
    assert "<b></text>" not in html and "&lt;b&gt;" in html
    drawn = re.findall(r'class="heat-figure"[^>]*>([^<]+)<', html)
    assert drawn == ["−1.25", "7.77", "5.00", "40.00"] * 2  # wide and narrow
    page = words(html)
    for figure in ("−1.25", "7.77", "82.23 %", "800", "45,500", "10.0 %", "4.5 %", "&lt; 25 %"):
        assert figure in page
    for said in ("accuracy 90.00 % on 2,000 validation examples", "fc : its channels"):
        assert said in page
    assert not re.search(r'(?:src|href)="', html)


def test_what_is_within_the_limit_is_told_by_colour_and_beyond_it_by_how_much() -> None:
    html = render_sensitivity(record({"a": (0.01, 0.02), "b": (0.3, None)}))
    tones = re.findall(r'class="heat (\w+)" fill-opacity="([\d.]+)"', html)[:4]
    assert [tone for tone, _ in tones] == ["kept", "lost", "lost", "lost"]
    assert float(tones[1][1]) < float(tones[2][1]) == float(tones[3][1])
    assert "the worst, 30.00" in words(html)


def test_a_cell_where_nothing_went_has_no_figure() -> None:
    made = record({"a": (0.0, 0.0)})
    made["rows"][0]["cells"][0]["removed"] = 0
    html = render_sensitivity(made)
    assert re.findall(r'class="heat-figure"[^>]*>([^<]+)<', html)[:2] == ["–", "0.00"]
    assert "too few to remove any" in words(html)


def test_single_weights_are_zero_and_save_nothing() -> None:
    made = record({"a": STEADY}, granularity="weight", macs=None)
    for cell in made["rows"][0]["cells"]:
        cell["macs"] = None
    page = words(render_sensitivity(made))
    assert "set to zero" in page and "MACs" not in page and "share their channels" not in page


def test_figures_that_say_little_come_with_a_caution() -> None:
    made = record({"a": STEADY})
    assert cautions(made) == []
    assert "Only 100 examples: each is 1.00 points" in cautions({**made, "examples": 100})[0]
    made["student"]["trained"] = False
    assert cautions(made)[0].startswith("No stage has taught this student yet")


def test_another_metric_has_no_points() -> None:
    metric = {"name": "perplexity", "unit": "nats", "higher_is_better": False}
    made = record({"a": BROKEN, "b": STEADY}, metric=metric, examples=10)
    assert sentences(made)[0].endswith("perplexity is 0.05 worse.") and cautions(made) == []
    assert "points" not in words(render_sensitivity(made))


@pytest.mark.parametrize("width", [348, 1040])
@pytest.mark.parametrize("columns", [1, 9])
def test_cells_stand_side_by_side_inside_the_picture(width, columns) -> None:
    rows = [
        HeatRow("encoder." * 20 + str(i), "512 channels", [HeatCell("1.00", "lost")] * columns)
        for i in range(3)
    ]
    names = [f"{i} %" for i in range(columns)]
    drawn = heat(rows, names, title="t", x_label="x", width=width)
    high = int(re.search(r'viewBox="0 0 \d+ (\d+)"', drawn)[1])  # type: ignore[index]
    form = r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"'
    boxes = [tuple(map(float, box)) for box in re.findall(form, drawn)]
    assert len(boxes) == 3 * columns
    for i, (x, y, w, h) in enumerate(boxes):
        assert min(x, y, w) >= 0 and x + w <= width and y + h <= high
        if (i + 1) % columns:
            assert x + w <= boxes[i + 1][0]
        elif i + 1 < len(boxes):
            assert y + h <= boxes[i + 1][1]
    assert drawn.count("…</text>") == 3 and drawn.count("encoder." * 20) == 3
