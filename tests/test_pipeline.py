"""A whole run: what it leaves, what its figures mean, and what it doesn't compute twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import attar
from attar.errors import RecipeError
from attar.events import several
from attar.pipeline.budget import judge
from attar.pipeline.rows import timed_on
from attar.recipe import Budget, dump_recipe, load_recipe
from attar.runtimes.bundle import read_bundle
from attar.tasks.base import Metric
from attar.tasks.image_classification import ImageClassification
from attar.tasks.intervals import metric_drop, metric_interval
from run_fixture import (
    STAGES,
    TINY,
    Enough,
    Event,
    WholeRun,
    cached,
    hurried,
    lasting,
    ledger_of,
    logged,
    run_recipe,
    stop_at,
    write_recipe,
)

# -- what other programs read -------------------------------------------------------------------

INTERVAL = {"value": float, "low": float, "high": float}
METRIC = {**INTERVAL, "name": str, "unit": str, "split": str, "n": int}
DROP = {**INTERVAL, "split": str, "method": str, "against": str}
FILES = {"path": str, "bytes": int}
LATENCY = {"runtime": str, "batch": int, "threads": int, "p50_ms": float, "p90_ms": float}
ROW = {
    "stage": str,
    "index": int,
    "metric": METRIC,
    "validation": METRIC,
    "parameters": int,
    "nonzero": int,
    "macs": int,
    "bundle": {"path": str, "bytes": int, "files": [FILES]},
    "latency": [LATENCY],
    "seconds": float,
}
EXPORTED = {**ROW, "drop": DROP, "validation_drop": DROP, "agreement": float, "memory_mb": float}
COMPARED = {
    **EXPORTED,
    "packed_bytes": int,
    "parity": {"max_abs_diff": float, "agreement": float, "n": int},
}
LEDGER = {
    "schema": int,
    "attar": str,
    "task": str,
    "recipe": str,
    "seed": int,
    "environment": {"python": str, "cpu": str, "cores": int, "packages": {"torch": str}},
    "budget": {"max_drop": float, "size": int, "met": bool, "certain": bool},
    "rows": [ROW],
}


def require_like(found: Any, wanted: Any, place: str = "ledger") -> None:
    """Fails unless every field that is wanted is there, of its type; more may be there."""
    if isinstance(wanted, dict):
        for key, inner in wanted.items():
            assert key in found, f"{place} lacks {key}"
            require_like(found[key], inner, f"{place}.{key}")
    elif isinstance(wanted, list):
        assert found, f"{place} is empty"
        for i, one in enumerate(found):
            require_like(one, wanted[0], f"{place}[{i}]")
    else:
        kinds = (int, float) if wanted is float else wanted
        assert isinstance(found, kinds), f"{place} is {found!r}"
        assert isinstance(found, bool) == (wanted is bool), f"{place} is {found!r}"


def test_the_ledger_is_as_agreed(whole_run: WholeRun) -> None:
    ledger = whole_run.ledger
    require_like(ledger, LEDGER)
    for row in ledger["rows"][1:]:
        require_like(row, EXPORTED if row["stage"] == "plain-int8" else COMPARED, row["stage"])
    assert (ledger["schema"], ledger["task"]) == (1, "image-classification")
    assert (ledger["recipe"], ledger["seed"]) == ("tiny", 0)
    names = [row["stage"] for row in ledger["rows"]]
    assert names == ["teacher", "exported", "plain-int8", *STAGES, "deploy"]
    assert [row["index"] for row in ledger["rows"]] == [0, 0, 0, 1, 2, 3, 4, 5]
    teacher, *others = ledger["rows"]
    assert teacher["latency"][0]["runtime"] == "pytorch-eager"
    assert {row["latency"][0]["runtime"] for row in others} == {"onnxruntime"}
    assert {row["metric"]["split"] for row in ledger["rows"]} == {"test"}
    assert {row["validation"]["split"] for row in ledger["rows"]} == {"validation"}
    assert {row["metric"]["n"] for row in ledger["rows"]} == {359}
    assert {row["validation"]["n"] for row in ledger["rows"]} == {144}
    assert {"passes_on_p50_ms", "passes_off_p50_ms", "gain"} <= set(others[-1]["graph"])
    assert whole_run.run.ledger == ledger


def test_the_folder_is_as_agreed(whole_run: WholeRun) -> None:
    folder = whole_run.folder
    files = {p.name for p in folder.iterdir() if p.is_file()}
    assert {"recipe.yaml", "ledger.json", "report.html", "log.jsonl"} <= files
    for index, name in enumerate(STAGES, start=1):
        stage = folder / "stages" / f"{index:02}-{name}"
        assert (stage / "student" / "weights.safetensors").is_file()
        assert (stage / "bundle" / "manifest.json").is_file()
    bundle = {p.name for p in (folder / "bundle").iterdir()}
    assert bundle == {"manifest.json", "model.onnx", "golden.npz", "predict.py"}
    assert {p.name for p in (folder / "student").iterdir()} == {
        "student.json", "weights.safetensors", "edits.safetensors",
    }  # fmt: skip
    pickles = [p for p in folder.rglob("*") if p.suffix in {".pt", ".pth", ".pkl"}]
    assert not pickles


def test_the_recipe_in_the_folder_is_resolved_and_reads_back(whole_run: WholeRun) -> None:
    text = (whole_run.folder / "recipe.yaml").read_text()
    assert load_recipe(whole_run.folder) == load_recipe(whole_run.recipe)
    assert dump_recipe(load_recipe(whole_run.folder)) == text
    assert yaml.safe_load(text)["deploy"] == {
        "runtime": "onnxruntime", "batch": 1, "threads": 1, "graph": "all",
    }  # fmt: skip


def test_sizes_are_those_of_the_files_that_load(whole_run: WholeRun) -> None:
    for row in whole_run.ledger["rows"]:
        place = whole_run.folder / row["bundle"]["path"]
        for file in row["bundle"]["files"]:
            assert (place / file["path"]).stat().st_size == file["bytes"]
        assert row["bundle"]["bytes"] == sum(f["bytes"] for f in row["bundle"]["files"])
        if row["stage"] != "teacher":
            assert read_bundle(place).bytes == row["bundle"]["bytes"]


def test_every_bundle_names_its_recipe_and_its_files(whole_run: WholeRun) -> None:
    recipe = hashlib.sha256((whole_run.folder / "recipe.yaml").read_bytes()).hexdigest()
    bundles = sorted(whole_run.folder.rglob("manifest.json"))
    assert len(bundles) == len(whole_run.ledger["rows"]) - 1
    for path in bundles:
        manifest = json.loads(path.read_text())
        assert manifest["recipe_sha256"] == recipe
        assert (manifest["schema"], manifest["task"]) == (1, "image-classification")
        for file in manifest["files"]:
            content = (path.parent / file["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_the_log_has_every_epoch(whole_run: WholeRun) -> None:
    told = [(e["label"], e["epoch"]) for e in logged(whole_run.folder, "epoch")]
    three = [1, 2, 3]
    assert told == [
        *(("teacher", n) for n in three), *(("distill", n) for n in three),
        ("recover", 1), ("recover", 1),
    ]  # fmt: skip
    rows = [e["row"]["stage"] for e in logged(whole_run.folder, "row")]
    assert rows == [row["stage"] for row in whole_run.ledger["rows"]]


# -- what the figures mean ----------------------------------------------------------------------


def test_figures_agree_with_each_other(whole_run: WholeRun) -> None:
    teacher, *others = whole_run.ledger["rows"]
    assert teacher["metric"]["value"] > 0.5, "the tiny teacher has learnt something"
    assert "drop" not in teacher
    for row in whole_run.ledger["rows"]:
        for key in ("metric", "validation", "drop", "validation_drop"):
            if key in row:
                assert row[key]["low"] <= row[key]["value"] <= row[key]["high"], row["stage"]
    for row in others:
        for drop, key in (("drop", "metric"), ("validation_drop", "validation")):
            expected = teacher[key]["value"] - row[key]["value"]
            assert row[drop]["value"] == pytest.approx(expected, abs=2e-6)
        assert 0 <= row["agreement"] <= 1


def test_exporting_alone_changes_no_answer(whole_run: WholeRun) -> None:
    teacher, exported = whole_run.row("teacher"), whole_run.row("exported")
    assert exported["metric"]["value"] == teacher["metric"]["value"]
    assert exported["agreement"] == 1.0
    assert exported["parity"]["agreement"] == 1.0
    assert exported["parity"]["n"] == 144  # all of validation, where it has fewer than 512


def test_what_stages_did_shows_in_their_rows(whole_run: WholeRun) -> None:
    distill, prune, share, quantize = (whole_run.row(name) for name in STAGES)
    assert prune["nonzero"] < 0.7 * distill["nonzero"]
    assert share["nonzero"] <= prune["nonzero"]  # what was pruned stays zero
    for small in (share, quantize):  # of a few values, or in bytes
        assert small["bundle"]["bytes"] < 0.4 * prune["bundle"]["bytes"]
    assert whole_run.row("deploy")["metric"]["value"] == quantize["metric"]["value"]


def row_of(**changes: Any) -> dict[str, Any]:
    row = {
        "validation_drop": {"value": 0.004, "low": -0.01, "high": 0.012},
        "latency": [{"p50_ms": 0.1, "p90_ms": 0.3}],
        "bundle": {"bytes": 40_000},
        "memory_mb": 12.0,
    }
    return row | changes


@pytest.mark.parametrize(
    ("limits", "met", "certain"),
    [
        ({}, True, True),
        ({"max_drop": "0.5%"}, True, False),
        ({"max_drop": "1.2%"}, True, True),
        ({"max_drop": "0.3%"}, False, False),
        ({"latency_ms": 0.2}, True, False),
        ({"latency_ms": 0.3}, True, True),
        ({"latency_ms": 0.05}, False, False),
        ({"size": "40KB"}, True, True),
        ({"size": 39_999}, False, False),
        ({"memory": "12MB"}, True, True),
        ({"memory": "11.9MB"}, False, False),
        ({"max_drop": "1.2%", "size": "1KB"}, False, False),
    ],
)
def test_a_budget_is_met_by_estimates_and_certain_by_bounds(limits, met, certain) -> None:
    verdict = judge(Budget.model_validate(limits), row_of())
    assert (verdict["met"], verdict["certain"]) == (met, certain)
    assert {f["name"] for f in verdict["figures"]} == set(limits)
    for figure in verdict["figures"]:
        assert verdict[figure["name"]] == figure["limit"]


def test_the_budget_is_judged_on_validation_not_on_test() -> None:
    row = row_of(drop={"value": 0.5, "low": 0.4, "high": 0.6})
    assert judge(Budget.model_validate({"max_drop": "2%"}), row)["certain"]


def test_the_written_verdict_is_that_of_the_last_row(whole_run: WholeRun) -> None:
    written = whole_run.ledger["budget"]
    limits = Budget.model_validate({"max_drop": "60%", "size": "1MB"})
    assert written == judge(limits, whole_run.row("deploy"))
    assert whole_run.run.budget_met is written["met"] is True


class Perplexity(ImageClassification):
    """A metric that is better the lower it is, and no share of right answers."""

    name = "perplexity"

    def __init__(self) -> None:
        self.metric = Metric("perplexity", "", higher_is_better=False)

    def value(self, statistics: np.ndarray) -> float:
        return float(np.exp(-np.log(statistics[:, 3]).mean()))

    def hits(self, statistics: np.ndarray) -> None:
        return None


def test_a_drop_of_a_metric_to_be_lowered_is_its_rise() -> None:
    random = np.random.default_rng(0)
    before = np.tile(random.uniform(0.5, 0.9, (200, 1)), 5)
    after = before * 0.8
    task = Perplexity()
    drop = metric_drop(task, before, after)
    assert drop.value == pytest.approx(task.value(after) - task.value(before)) and drop.value > 0
    assert 0 < drop.low <= drop.value <= drop.high
    interval = metric_interval(task, before)
    assert interval.low <= interval.value <= interval.high
    better = metric_drop(task, after, before)
    assert better.high < 0
    row = row_of(validation_drop={k: getattr(better, k) for k in ("value", "low", "high")})
    assert judge(Budget.model_validate({"max_drop": "0.1%"}), row)["certain"]


def test_passes_off_is_the_final_graph_itself(
    whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no stages, the graph before optimisation is the exported teacher, not plain int8."""
    from attar.runtimes.onnxruntime import OnnxRuntime

    honest, bare = OnnxRuntime.session, []

    def session(self: Any, folder: Path, *, threads: int = 1, passes: Any = "all") -> Any:
        if passes == "none":
            bare.append((folder / "model.onnx").read_bytes())
        return honest(self, folder, threads=threads, passes=passes)

    monkeypatch.setattr(OnnxRuntime, "session", session)
    recipe = write_recipe(tmp_path, TINY.partition("student:")[0])
    run_recipe(recipe, tmp_path / "run")
    exported = tmp_path / "run" / "stages" / "00-exported" / "bundle" / "model.onnx"
    assert bare[-1] == exported.read_bytes()


def test_a_batch_larger_than_validation_is_measured_as_large_as_it_is_said(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    from attar.pipeline.job import job_of
    from attar.pipeline.rows import inputs_of

    job = job_of(load_recipe(whole_run.recipe, ["deploy.batch=200"]))
    (images,) = inputs_of(job.data.validation, job.task, job.deploy.batch)
    assert images.shape == (200, 1, 8, 8)
    np.testing.assert_array_equal(images[144:], images[:56])


# -- what is not computed twice -----------------------------------------------------------------


def test_an_unchanged_prefix_is_taken_from_the_store(whole_run: WholeRun, tmp_path: Path) -> None:
    first = cached(whole_run.events)
    assert not first["04-quantize"]
    heard: list[Event] = []
    listeners = several(heard.append, stop_at("row", stage="quantize"))
    with pytest.raises(Enough):
        change = "stages.quantize.observer=minmax"
        run_recipe(whole_run.recipe, tmp_path / "run", change, tell=listeners)
    assert cached(heard) == {name: name != "04-quantize" for name in first if name != "deploy"}
    before, after = lasting(whole_run.ledger)["rows"], lasting(ledger_of(tmp_path / "run"))["rows"]
    assert before[:-2] == after[:-1]
    assert not any(e["event"] == "epoch" for e in heard), "nothing is trained again"
    epochs = [(e["label"], e["epoch"]) for e in logged(tmp_path / "run", "epoch")]
    assert epochs == [(e["label"], e["epoch"]) for e in logged(whole_run.folder, "epoch")]


def test_another_budget_computes_nothing_and_is_judged_anew(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    heard: list[Event] = []
    run = run_recipe(whole_run.recipe, tmp_path / "run", "budget.size=1KB", heard=heard)
    assert all(was for name, was in cached(heard).items() if name != "deploy")
    assert not run.budget_met
    assert lasting(run.ledger)["rows"] == lasting(whole_run.ledger)["rows"]
    manifest = json.loads((tmp_path / "run" / "bundle" / "manifest.json").read_text())
    recipe = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert manifest["recipe_sha256"] == hashlib.sha256(recipe).hexdigest()
    assert read_bundle(tmp_path / "run" / "bundle").golden()


def test_what_another_recipe_left_in_the_folder_goes(whole_run: WholeRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_recipe(whole_run.recipe, folder)
    (folder / "notes.txt").write_text("a person's own")
    shorter = write_recipe(tmp_path, TINY.partition("  - share")[0])
    with pytest.raises(Enough):
        run_recipe(shorter, folder, resume=True, tell=stop_at("row", stage="prune"))
    assert sorted(p.name for p in (folder / "stages").iterdir()) == [
        "00-exported", "00-plain-int8", "00-teacher", "01-distill", "02-prune",
    ]  # fmt: skip
    assert not (folder / "report.html").exists() and not (folder / "bundle").exists()
    assert (folder / "notes.txt").exists()


@pytest.mark.long
def test_a_recipe_gives_the_same_ledger_in_a_fresh_place(
    whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(99)  # what happened in this process before is of no consequence
    again = run_recipe(write_recipe(tmp_path), tmp_path / "run")
    assert lasting(again.ledger) == lasting(whole_run.ledger)
    for name in ("weights.safetensors", "edits.safetensors"):
        assert (tmp_path / "run/student" / name).read_bytes() == (
            whole_run.folder / "student" / name
        ).read_bytes()
    other = run_recipe(write_recipe(tmp_path), tmp_path / "other", "seed=1")
    assert lasting(other.ledger)["rows"] != lasting(again.ledger)["rows"]
    assert other.ledger["seed"] == 1


# -- searches, and a teacher that is prepared ---------------------------------------------------

AUTO = (
    TINY.partition("student:")[0].replace("train:", "prepare: [PREPARED], train:")
    + """\
stages:
  - prune: {granularity: weight, ratio: auto}
  - share: {bits: auto}
budget: {max_drop: 10%}
"""
)
AUTO = AUTO.replace("PREPARED", "{prune: {granularity: weight, ratio: 0.3}}")


def test_searches_take_the_strongest_that_keeps_the_budget_on_a_copy_of_the_prepared_teacher(
    tmp_path: Path,
) -> None:
    heard: list[Event] = []
    recipe, folder = write_recipe(tmp_path, AUTO), tmp_path / "run"
    listeners = several(heard.append, stop_at("row", stage="share"))
    with pytest.raises(Enough):
        run_recipe(recipe, folder, tell=listeners)
    assert list(cached(heard)) == ["teacher", "teacher-01-prune", "01-prune", "02-share"]
    teacher, _, _, prune, share = ledger_of(folder)["rows"]
    assert teacher["nonzero"] < 0.75 * teacher["parameters"], "the teacher was pruned first"
    assert prune["parameters"] == teacher["parameters"], "the student is a copy of it"
    tried = [event for event in heard if event["event"] == "trial"]
    assert {trial["setting"] for trial in tried} == {"ratio", "bits"}
    kept: dict[str, list[float]] = {"ratio": [], "bits": []}
    for trial in tried:
        assert trial["kept"] is (trial["drop"] <= 0.1)
        if trial["kept"]:
            kept[trial["setting"]].append(trial["value"])
    gone = 1 - prune["nonzero"] / prune["parameters"]
    assert gone == pytest.approx(max([0.3, *kept["ratio"]]), abs=0.02)
    shared = attar.load(folder, stage="02-share")
    most = max(len(w.unique()) for n, w in shared.named_parameters() if n.endswith("weight"))
    assert most <= 2 ** min(kept["bits"]) + 1
    assert share["validation_drop"]["value"] <= 0.1 + 1e-6

    with pytest.raises(Enough):
        run_recipe(recipe, folder, resume=True, tell=stop_at("row", stage="share"))
    again = [(e["setting"], e["value"]) for e in logged(folder, "trial")]
    assert again == [(e["setting"], e["value"]) for e in tried], "the log has them all the same"


def test_a_copy_of_a_quantized_teacher_is_not_pruned(tmp_path: Path) -> None:
    text = AUTO.replace("{prune: {granularity: weight, ratio: 0.3}}", "{quantize: {}}")
    with pytest.raises(RecipeError, match=r"prune .* can't come after quantize"):
        load_recipe(write_recipe(tmp_path, text))


# -- looking before, measuring after ------------------------------------------------------------


def test_check_says_what_a_run_will_meet(whole_run: WholeRun) -> None:
    from attar.pipeline import check

    with hurried():
        found = check(load_recipe(whole_run.recipe, ["student=null"]))
    data = {"train": 300, "validation": 144, "test": 359, "classes": 10, "shape": [1, 8, 8]}
    require_like(found["data"], {"name": str})
    assert data.items() <= found["data"].items()
    network, exported = found["teacher"], whole_run.row("exported")["bundle"]["bytes"]
    assert network["parameters"] == whole_run.row("teacher")["parameters"]
    for form in ("eager", "float", "int8"):
        assert network[form]["p50_ms"] > 0
    assert network["float"]["bytes"] == pytest.approx(exported, rel=0.05)
    assert network["int8"]["bytes"] < network["float"]["bytes"]
    assert network["prunable"]["channels"] > 0
    estimate = found["estimate"]
    assert (estimate["teacher_epochs"], estimate["student_epochs"]) == (3, 5)
    assert estimate["seconds"] > 0 and estimate["disk_bytes"] > 0
    json.dumps(found)


def test_check_says_what_kept_answers_will_take(whole_run: WholeRun) -> None:
    from attar.pipeline import check

    kept = ["stages.distill.views=2", "stages.distill.store={format: float16}"]
    with hurried():
        found = check(load_recipe(whole_run.recipe, kept))
    (answers,) = found["estimate"]["answers"]
    seconds = answers.pop("seconds")
    assert answers == {"examples": 300, "views": 2, "bytes": 300 * 2 * 10 * 2}
    assert found["estimate"]["disk_bytes"] > answers["bytes"] and seconds >= 0


def test_evaluate_repeats_the_ledger_on_every_split(whole_run: WholeRun) -> None:
    from attar.pipeline import evaluate

    deploy = whole_run.row("deploy")
    for split, key in (("test", "metric"), ("validation", "validation")):
        metric = evaluate(whole_run.folder, split=split)["metric"]
        assert metric["value"] == pytest.approx(deploy[key]["value"], abs=1e-6)
        assert (metric["split"], metric["n"]) == (split, deploy[key]["n"])
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert evaluate(whole_run.folder, split="train")["metric"]["n"] == 300


def test_ledgers_are_read_by_path(whole_run: WholeRun) -> None:
    assert attar.ledger(whole_run.folder) == ledger_of(whole_run.folder)


def test_timing_leaves_the_number_of_threads_as_it_was() -> None:
    """Else every training after the first row would run on the deploy target's one thread."""
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = []
        timed_on(1, {"look": lambda: seen.append(torch.get_num_threads())}, seconds=0.01)
        with pytest.raises(ZeroDivisionError):
            timed_on(2, {"fail": lambda: 1 / 0}, seconds=0.01)
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(own)
