"""The page of a comparison: true in its verdict and figures, whole in one file, drawn to scale."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.pipeline.comparison import ALONE, Comparison, Trial, Variant, record
from attar.recipe import Recipe, load_recipe
from attar.report.comparison import cautions, render_comparison, sentence, told, write_page
from attar.report.dots import DotRow, Mark, dots
from attar.report.lines import Line, lines
from attar.report.published import FIGURES, published
from attar.tasks.base import Metric

ACCURACY = Metric("accuracy", "fraction")
Figures = dict[tuple[str, str | None, int | None], list[float]]


def made(figures: Figures, *, asked: int | None = None, recipe: Recipe | None = None) -> Any:
    """The record of a comparison: by (criterion, method, size), the test accuracy of every seed;
    validation is the same."""
    folder = Path("out")
    trials = [
        Trial(Variant(*key), seed, test, test, 0.95, folder / f"{key[0]}-{key[1]}-{key[2]}-{seed}")
        for key, tests in figures.items()
        for seed, test in enumerate(tests)
    ]
    whole = Comparison(recipe or load_recipe("digits"), trials, asked or len(trials), ACCURACY)
    return json.loads(json.dumps(record(whole, folder)))


def plain(**figures: list[float]) -> Any:
    return made({(name, None, None): tests for name, tests in figures.items()})


BETTER = {"alone": [0.70, 0.71, 0.69], "kd": [0.75, 0.74, 0.75]}


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


@pytest.mark.parametrize(
    ("figures", "said", "state"),
    [
        (BETTER, "kd is best on validation: on test 4.67 points above the student alone (", "kept"),
        ({**BETTER, "kd": [0.69, 0.75, 0.70]}, "on test 1.33 points above the student", "likely"),
        (
            {**BETTER, "kd": [0.60, 0.62, 0.61], "dist": [0.5, 0.5, 0.5]},
            "No criterion beats the student alone on validation; kd comes closest: on test "
            "9.00 points below the student alone (",
            "missed",
        ),
    ],
)
def test_the_verdict_says_who_is_best_and_how_sure_that_is(figures, said, state) -> None:
    made = plain(**figures)
    assert said in sentence(made) and told(made)["state"] == state
    page = words(render_comparison(made))
    assert sentence(made) in page and told(made)["said"] in page


def test_a_verdict_on_sets_holds_each_against_its_own_student_alone() -> None:
    one = made(
        {(ALONE, "random", 50): [0.5], ("kd", "random", 50): [0.6], (ALONE, "random", 90): [0.8]}
    )
    assert sentence(one) == (
        "Of the criteria, kd on 50 (random) is best on validation: "
        "on test 10.00 points above the student alone"
    )


def test_every_figure_of_the_standings_is_on_the_page() -> None:
    made, page = plain(**BETTER), words(render_comparison(plain(**BETTER)))
    for one in made["standings"]:
        assert f"{100 * one['test']:.2f} % ± {100 * one['test_sd']:.2f}" in page
    kd = made["standings"][0]
    assert f"{100 * kd['gain_low']:.2f} to {100 * kd['gain_high']:.2f}" in page
    for trial in made["trials"]:
        assert f'href="{trial["folder"]}/report.html"' in render_comparison(made)


def test_what_limits_the_figures_is_said() -> None:
    whole = plain(**BETTER)
    assert cautions(whole) == []
    (unequal,) = cautions(plain(alone=[0.7, 0.7, 0.7, 0.71], kd=[0.8, 0.7, 0.8]))
    assert "means over 3, others over 4" in unequal
    (few,) = cautions(plain(alone=[0.7, 0.7], kd=[0.8, 0.7]))
    assert "Fewer than 3 seeds" in few
    begun = made({(ALONE, None, None): [0.7, 0.7, 0.7]}, asked=9)
    assert "3 of 9 trainings are done" in cautions(begun)[0]
    assert sentence(begun) == "Only the student alone is trained so far"
    render_comparison(begun)


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_seed_has_no_spread_and_no_interval(seeds: int) -> None:
    page = render_comparison(plain(alone=[0.7, 0.71, 0.7][:seeds], kd=[0.75, 0.74, 0.75][:seeds]))
    assert ("±</span>" in page or "± " in page.split("<tbody>")[1].split("</tbody>")[0]) == (
        seeds == 3
    )
    assert ("95 % interval<br>" in page) == (seeds == 3)


def test_the_page_is_one_file_for_both_themes_and_names_are_no_markup(tmp_path) -> None:
    unkind = plain(**{**BETTER, "<script>alert(1)</script>": [0.7, 0.7, 0.7]})
    (tmp_path / "comparison.json").write_text(json.dumps(unkind))
    page = write_page(tmp_path).read_text()
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(src|href)="(https?:)?//', page) and "@import" not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    for kind in ("wide", "narrow"):
        assert f'<div class="{kind}"><svg' in page


def test_sizes_make_a_line_for_each_criterion_and_method_and_dash_the_student_alone() -> None:
    figures: Figures = {
        (name, method, size): [0.5 + size / 1000, 0.52 + size / 1000]
        for name in (ALONE, "kd", "dist")
        for method in ("random", "herding")
        for size in (50, 200)
    }
    page = render_comparison(made(figures))
    wide = page.split('<div class="wide">')[1].split("</div>")[0]
    assert wide.count("<polyline") == 6 and wide.count('class="way dashed"') == 2
    legend = page.split('<p class="legend">')[1].split("</p>")[0]
    for name in ("kd, random", "dist, herding", "student alone, random"):
        assert f"</svg>{name}</span>" in legend
    assert "Seed by seed" not in page
    one_size = render_comparison(made({key: f for key, f in figures.items() if key[2] == 50}))
    assert "Seed by seed" in one_size and "<polyline" not in one_size


tests_of = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(tests_of, min_size=1, max_size=6), teacher=st.floats(0, 1))
def test_dots_are_drawn_to_scale_inside_the_picture(rows, teacher) -> None:
    """Places of all values follow from any two of them, whatever they are."""
    drawn = dots(
        [DotRow(f"c{i}", row, sum(row) / len(row), 0.0) for i, row in enumerate(rows)],
        [Mark("teacher", teacher, "teacher")],
        title="t", x_label="x", show="{:.3g}".format, width=700,
    )  # fmt: skip
    places = [float(x) for x in re.findall(r'<circle cx="([^"]+)"[^>]*class="single"', drawn)]
    values = [value for row in rows for value in row]
    assert len(places) == len(values) and all(0 <= x <= 700 for x in places)
    low, high = min(values), max(values)
    if high - low > 1e-3:
        left, right = min(places), max(places)
        for x, value in zip(places, values, strict=True):
            assert x == pytest.approx(left + (value - low) / (high - low) * (right - left), abs=0.2)
    lines_down = re.findall(r'<line x1="([^"]+)"[^>]*class="against teacher"', drawn)
    assert len(lines_down) == 1 and 0 <= float(lines_down[0]) <= 700


def test_a_mark_far_away_is_named_at_the_edge() -> None:
    rows = [DotRow("kd", [0.50, 0.51], 0.505, 0.007)]
    drawn = dots(
        rows, [Mark("teacher", 0.95, "teacher")], title="t", x_label="x", show=str, width=700
    )
    assert "teacher 0.95 →" in drawn
    near = dots(
        rows, [Mark("teacher", 0.515, "teacher")], title="t", x_label="x", show=str, width=700
    )
    assert "→" not in near


def test_long_names_stand_above_their_rows_where_the_picture_is_narrow() -> None:
    rows = [DotRow("correlation-congruence", [0.5, 0.6], 0.55, 0.05, "{gamma: 0.4}" * 5)]
    wide, narrow = (
        dots(rows, [], title="t", x_label="x", show=str, width=width) for width in (1000, 348)
    )
    assert 'class="label stage" text-anchor="end"' in wide
    assert '<text x="8.0"' in narrow and 'class="label stage" text-anchor="start"' in narrow
    assert "…</text>" in narrow and "…</text>" not in wide


def test_a_line_rises_with_what_is_reached_and_sizes_are_spaced_by_their_ratios() -> None:
    line = Line("kd", [(100, 0.5, 0.02), (1000, 0.6, 0.0), (10_000, 0.8, 0.01)])
    drawn = lines(
        [line], title="t", x_label="x", y_label="y", show_x="{:g}".format, show_y=str,
        width=760, height=400,
    )  # fmt: skip
    points = re.search(r'<polyline[^>]*points="([^"]+)"', drawn)[1].split()
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert (ys[0] - ys[1]) * 2 == pytest.approx(ys[1] - ys[2], abs=0.3)  # up is less in SVG
    bars = re.findall(r'y1="([^"]+)" x2="[^"]+" y2="([^"]+)" class="bar"', drawn)
    assert len(bars) == 2  # no spread, no bar
    for size in ("100", "1000", "10000"):
        assert f">{size}</text>" in drawn


FIELD = {
    "name": "field",
    "data": {"source": "torchvision", "name": "CIFAR100", "root": "data"},
    "teacher": {"model": "cifar-resnet56", "train": {"epochs": 240}},
    "student": {"model": "cifar-resnet20"},
    "stages": [{"distill": {"epochs": 240}}],
}


def field(**changes: Any) -> Recipe:
    return Recipe.model_validate({**FIELD, **changes})


def test_papers_figures_are_found_by_criterion_in_their_setting_alone() -> None:
    assert published(field(), "alone").value == 0.6906
    assert published(field(), "kd").value == 0.7066
    assert published(field(), "attention: {layers: auto, weight: 100}").value == 0.7055
    assert published(field(), "kd: {standardize: true, temperature: 2}").value == 0.7143
    assert published(field(), "jensen-shannon") is None
    assert published(field(), "losses.py:Mine: {weight: 2}") is None
    assert published(load_recipe("digits"), "kd") is None
    assert published(field(data={**FIELD["data"], "name": "org/cifar100"}), "kd") is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {**FIELD["data"], "name": "CIFAR10"}},
        {"data": {**FIELD["data"], "subset": {"count": 5000}}},
        {"teacher": {**FIELD["teacher"], "model": "cifar-resnet110"}},
        {"teacher": {**FIELD["teacher"], "arguments": {"width": 32}}},
        {"student": None},
        {"student": {"model": "cifar-resnet20", "arguments": {"stem_stride": 2}}},
        {"stages": [{"distill": {"epochs": 200}}]},
        {"stages": [{"distill": {"epochs": 240, "transfer": {"count": 5000}}}]},
        {"stages": [{"distill": {"epochs": 240, "teacher": {"model": "cifar-resnet110",
                                                            "checkpoint": "a.pt"}}}]},
        {"stages": [{"prune": {"ratio": 0.5}}, {"distill": {"epochs": 240}}]},
    ],
)  # fmt: skip
def test_another_setting_has_no_published_figures(changes) -> None:
    assert published(field(**changes), "kd") is None


def test_published_figures_are_of_criteria_that_there_are() -> None:
    from attar.distill.criterion import criteria

    for name, figure in FIGURES.items():
        assert name == ALONE or criteria.get(name)
        assert 0.69 < figure.value < 0.7234 and re.search(r"\b20\d\d\b", figure.source)


def test_the_column_is_there_only_where_a_figure_is() -> None:
    figures: Figures = {(name, None, None): tests for name, tests in BETTER.items()}
    there = made(figures, recipe=field())
    kd = next(one for one in there["standings"] if one["criterion"] == "kd")
    assert kd["published"] == asdict(FIGURES["kd"])
    page = words(render_comparison(there))
    assert "published" in page and "70.66 %" in page and "Tian et al. 2020" in page
    assert "published" not in words(render_comparison(made(figures)))
    sized = made({(ALONE, "random", 500): [0.5], ("kd", "random", 500): [0.6]}, recipe=field())
    assert all(one["published"] is None for one in sized["standings"])
