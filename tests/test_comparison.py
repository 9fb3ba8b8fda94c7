"""The same student under several criteria: what is run, what is kept, what is said."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attar.cli import app
from attar.errors import UsageError
from attar.pipeline import comparison
from attar.pipeline.comparison import ALONE, Comparison, Trial, compare, criteria_of, standings
from attar.recipe import load_recipe
from attar.tasks.base import Metric
from run_fixture import TINY, hurried, write_recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Comparison, list[Any]]:
    """The recipe, the folder, what came out, and what was told."""
    place, heard = tmp_path_factory.mktemp("compared"), []
    recipe = write_recipe(place)
    with hurried():
        made = compare(
            load_recipe(recipe),
            ["kd", {"dkd": {"others": 2}}],
            place / "out",
            seeds=2,
            tell=heard.append,
        )
    return recipe, place / "out", made, heard


def test_every_criterion_and_the_student_alone_run_for_every_seed(done) -> None:
    _, folder, made, _ = done
    names = [ALONE, "kd", "dkd: {others: 2}"]
    assert [(t.criterion, t.seed) for t in made.trials] == [(n, s) for s in (0, 1) for n in names]
    for trial in made.trials:
        ledger = json.loads((trial.folder / "ledger.json").read_text())
        stages = [row["stage"] for row in ledger["rows"]]
        assert "distill" in stages and "quantize" not in stages
        row = ledger["rows"][stages.index("distill")]
        assert (trial.validation, trial.test) == (
            row["validation"]["value"],
            row["metric"]["value"],
        )
        terms = json.loads((trial.folder / "log.jsonl").read_text().splitlines()[-1])
        assert terms["event"] == "done" and trial.folder.parent == folder


def test_the_student_alone_is_taught_by_the_task_only(done) -> None:
    _, folder, _, _ = done

    def terms(name: str) -> set[str]:
        events = map(json.loads, (folder / name / "log.jsonl").read_text().splitlines())
        return {
            t
            for e in events
            if e["event"] == "epoch"
            for t in e["terms"]
            if e["label"] == "distill"
        }

    assert terms("alone-0") == {"task"}
    assert terms("kd-0") == {"kd", "task"} and terms("dkd-others-2-7e5a3f-0") == {"dkd", "task"}


def test_what_is_finished_is_read_and_not_run_again(done, monkeypatch) -> None:
    recipe, folder, made, _ = done

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(comparison, "run", forbidden)
    again = compare(load_recipe(recipe), ["kd", {"dkd": {"others": 2}}], folder, seeds=2)
    assert again == made
    fewer = compare(load_recipe(recipe), ["kd"], folder, seeds=1)
    assert [t.criterion for t in fewer.trials] == [ALONE, "kd"]
    with pytest.raises(AssertionError, match="ran again"):
        compare(load_recipe(recipe), [{"kd": {"temperature": 2}}], folder, seeds=1)


def test_standings_are_means_over_seeds_with_the_best_on_validation_first() -> None:
    figures = {ALONE: [(0.8, 0.7), (0.8, 0.72)], "kd": [(0.9, 0.75), (0.92, 0.79)]}
    trials = [
        Trial(name, seed, *figures[name][seed], Path(name)) for name in figures for seed in (0, 1)
    ]
    best, alone = standings(Comparison(trials, Metric("accuracy", "fraction")))
    assert (best.criterion, best.seeds) == ("kd", 2)
    assert best.validation == pytest.approx(0.91)
    assert best.test_sd == pytest.approx(statistics.stdev([0.75, 0.79]))
    assert best.gain == pytest.approx(0.06) and best.gain_sd == pytest.approx(
        statistics.stdev([0.05, 0.07])
    )
    assert (alone.criterion, alone.gain) == (ALONE, None)
    turned = standings(Comparison(trials, Metric("loss", "", higher_is_better=False)))
    assert [one.criterion for one in turned] == [ALONE, "kd"]
    assert turned[1].gain == pytest.approx(-0.06)


def test_the_command_prints_a_table_and_json(done) -> None:
    recipe, folder, _, _ = done
    words = ["compare", str(recipe), "-k", "kd", "-k", "dkd: {others: 2}", "--seeds", "2"]
    shown = CliRunner().invoke(app, [*words, "--out", str(folder)])
    assert shown.exit_code == 0, shown.output
    for said in (
        "criterion",
        "test accuracy",
        "gain, points",
        "alone",
        "kd",
        "dkd: {others: 2}",
        "±",
    ):
        assert said in shown.output
    told = CliRunner().invoke(app, [*words, "--out", str(folder), "--json"])
    standing = json.loads(told.stdout)["standings"]
    assert {one["criterion"] for one in standing} == {ALONE, "kd", "dkd: {others: 2}"}


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        ("kdd", "kdd"),
        ("kd: {temprature: 2}", "did you mean 'temperature'"),
        ("[kd, dist]", "is no criterion: write a name"),
        ("kd: {", "is no criterion: write a name"),
    ],
)
def test_wrong_criteria_are_said_in_a_sentence(tmp_path, criterion, said) -> None:
    recipe = write_recipe(tmp_path)
    shown = CliRunner().invoke(app, ["compare", str(recipe), "-k", criterion])
    assert shown.exit_code == 2 and said in shown.output and "Traceback" not in shown.output


def test_a_recipe_without_distill_has_nothing_to_compare(tmp_path) -> None:
    lines = [x for x in TINY.splitlines() if not x.startswith(("  - distill", "student:"))]
    recipe = write_recipe(tmp_path, "\n".join(lines))
    with pytest.raises(UsageError, match="has no distill stage"):
        compare(load_recipe(recipe), ["kd"], tmp_path / "out")


def test_criteria_that_differ_at_their_ends_have_folders_of_their_own() -> None:
    long = "feature: {layers: [{student: layer1.0.conv1, teacher: layer1.0.conv1}], weight: "
    labels = [f"{long}{w}}}" for w in (1, 2)] + ["a.py:Mine", "b.py:Mine", "kd", "kd: {weight: 2}"]
    shorts = [comparison._short(one) for one in labels]
    assert len(set(shorts)) == len(labels) and max(map(len, shorts)) < 50
    assert all(re.fullmatch("[A-Za-z0-9._-]+", one) for one in shorts)


def test_a_criterion_is_read_as_a_recipe_has_it() -> None:
    assert criteria_of("kd") == "kd"
    assert criteria_of("losses.py:Mine: {weight: 2}") == {"losses.py:Mine": {"weight": 2}}
