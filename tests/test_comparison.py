"""The same student under several criteria: what is run, what is kept, what is said."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner

from attar.cli import app
from attar.errors import UsageError
from attar.pipeline import comparison
from attar.pipeline.comparison import (
    ALONE,
    Comparison,
    Trial,
    Variant,
    compare,
    criteria_of,
    record,
    standings,
)
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
    assert [(t.variant.label, t.seed) for t in made.trials] == [
        (n, s) for s in (0, 1) for n in names
    ]
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
    assert [t.variant for t in fewer.trials] == [Variant(ALONE), Variant("kd")]
    with pytest.raises(AssertionError, match="ran again"):
        compare(load_recipe(recipe), [{"kd": {"temperature": 2}}], folder, seeds=1)


def compared(figures: dict[Variant, list[tuple[float, float]]], **metric: Any) -> Comparison:
    """A comparison with these (validation, test), a pair for each seed from 0 on."""
    trials = [
        Trial(variant, seed, *reached, 0.99, Path("out") / f"{variant.label}-{seed}")
        for variant, seeds in figures.items()
        for seed, reached in enumerate(seeds)
    ]
    asked = max(map(len, figures.values())) * len(figures)
    judge = Metric("accuracy", "fraction", **metric)
    return Comparison(load_recipe("digits"), trials, asked, judge)


def test_standings_are_means_over_seeds_with_the_best_on_validation_first() -> None:
    kd, alone = Variant("kd"), Variant(ALONE)
    figures = {alone: [(0.8, 0.7), (0.8, 0.72)], kd: [(0.9, 0.75), (0.92, 0.79)]}
    best, last = standings(compared(figures))
    assert (best.variant, best.seeds) == (kd, 2)
    assert best.validation == pytest.approx(0.91)
    assert best.test_sd == pytest.approx(statistics.stdev([0.75, 0.79]))
    assert best.gain == pytest.approx(0.06)
    assert best.gain_sd == pytest.approx(statistics.stdev([0.05, 0.07]))
    assert (best.gain_low, best.better) == (None, None)  # two seeds
    assert (last.variant, last.gain) == (alone, None)
    turned = standings(compared(figures, higher_is_better=False))
    assert [one.variant for one in turned] == [alone, kd]
    assert turned[1].gain == pytest.approx(-0.06)


def test_a_gains_interval_is_that_of_a_paired_t_test() -> None:
    alone = [0.70, 0.71, 0.69, 0.72]
    better, unsure = [0.74, 0.76, 0.74, 0.75], [0.72, 0.69, 0.70, 0.74]
    figures = {
        Variant(name): [(0.5, test) for test in tests]
        for name, tests in ((ALONE, alone), ("kd", better), ("dist", unsure), ("dkd", alone))
    }
    found = {one.variant.criterion: one for one in standings(compared(figures))}
    for name, tests in (("kd", better), ("dist", unsure)):
        interval = stats.ttest_rel(tests, alone).confidence_interval(0.95)
        low, high = found[name].gain_low, found[name].gain_high
        assert (low, high) == pytest.approx((interval.low, interval.high))
    assert (found["kd"].better, found["dist"].better) == (True, False)
    assert (found["dkd"].gain, found["dkd"].gain_low) == (0, None)  # equal gains have no spread


def test_a_gain_is_over_the_student_alone_on_the_same_examples() -> None:
    figures = {
        Variant(name, method, size): [(test, test)]
        for name, method, size, test in (
            (ALONE, "random", 100, 0.3),
            ("kd", "random", 100, 0.4),
            (ALONE, "random", 500, 0.6),
            ("kd", "random", 500, 0.65),
            (ALONE, "herding", 100, 0.5),
            ("kd", "herding", 100, 0.45),
        )
    }
    gains = {
        (one.variant.method, one.variant.size): one.gain
        for one in standings(compared(figures))
        if one.variant.criterion == "kd"
    }
    assert gains == {
        ("random", 100): pytest.approx(0.1),
        ("random", 500): pytest.approx(0.05),
        ("herding", 100): pytest.approx(-0.05),
    }


def test_what_is_known_is_written_after_every_training_and_at_the_end(
    done, tmp_path, monkeypatch
) -> None:
    recipe, folder, made, _ = done
    compare(load_recipe(recipe), ["kd", {"dkd": {"others": 2}}], folder, seeds=2)
    written = json.loads((folder / "comparison.json").read_text())
    assert (written["done"], written["asked"]) == (6, 6)
    assert written == json.loads(json.dumps(record(made, folder)))
    assert {one["folder"] for one in written["trials"]} == {t.folder.name for t in made.trials}
    assert "criteria compared" in (folder / "comparison.html").read_text()

    ledgers, seen = {t.folder.name: t.folder / "ledger.json" for t in made.trials}, []

    def quick(recipe: Any, place: Path, **_: Any) -> Any:
        if (tmp_path / "comparison.json").exists():
            so_far = json.loads((tmp_path / "comparison.json").read_text())
            seen.append((so_far["done"], len(so_far["trials"])))
        ledger = json.loads(ledgers[place.name].read_text())
        return type("Finished", (), {"ledger": ledger})

    monkeypatch.setattr(comparison, "run", quick)
    compare(load_recipe(recipe), ["kd"], tmp_path, seeds=2)
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_sets_of_several_sizes_are_taught_to_every_criterion_and_to_none(tmp_path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    with hurried():
        made = compare(recipe, ["kd"], tmp_path, seeds=1, sizes=[60, 30], methods=["random"])
    assert [t.variant.label for t in made.trials] == [
        "alone on 30 (random)", "kd on 30 (random)", "alone on 60 (random)", "kd on 60 (random)",
    ]  # fmt: skip
    for trial in made.trials:
        details = json.loads((trial.folder / "details.json").read_text())
        assert details["found"]["01-distill"]["transfer"]["chosen"] == trial.variant.size


def test_a_recipes_own_set_keeps_what_is_not_compared(tmp_path) -> None:
    text = TINY.replace("distill: {", "distill: {transfer: {fraction: 0.5, deduplicate: true}, ", 1)
    recipe = load_recipe(write_recipe(tmp_path, text))
    recipes = comparison._variants(recipe, ["kd"], [30], ["herding"])
    transfer = recipes[Variant("kd", "herding", 30)].stages[-1].transfer
    assert (transfer.count, transfer.fraction, transfer.method) == (30, None, "herding")
    assert transfer.deduplicate is True
    plain = comparison._variants(recipe, ["kd"], [], [])[Variant("kd")].stages[-1].transfer
    assert plain.fraction == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "herding"], "say how many, with --size"),
        (["--method", "herdin", "--size", "30"], "transfer alone on 30 (herdin)"),
        (["--size", "0"], "--size"),
    ],
)
def test_wrong_sets_are_said_in_a_sentence(tmp_path, words, said) -> None:
    recipe = write_recipe(tmp_path)
    shown = CliRunner().invoke(app, ["compare", str(recipe), "-k", "kd", *words])
    assert shown.exit_code == 2 and said in shown.output and "Traceback" not in shown.output


def test_names_of_folders_stay_what_they_were(tmp_path) -> None:
    """Comparisons that were begun earlier go on."""
    assert comparison._short(Variant("kd").label) == "kd"
    assert comparison._short(Variant("dkd: {others: 2}").label) == "dkd-others-2-7e5a3f"


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
    assert f"page: {folder / 'comparison.html'}" in shown.output
    told = CliRunner().invoke(app, [*words, "--out", str(folder), "--json"])
    printed = json.loads(told.stdout)
    assert {one["criterion"] for one in printed["standings"]} == {ALONE, "kd", "dkd: {others: 2}"}
    assert {
        **json.loads((folder / "comparison.json").read_text()),
        "folder": str(folder),
    } == printed


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
