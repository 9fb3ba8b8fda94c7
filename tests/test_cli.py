"""The command line: what it prints, what it ends with, and what it never does."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from attar import load
from attar.cli import app
from attar.errors import DataError
from attar.screen import Screen, budget_line

RECIPE = """\
name: quick
data: {source: digits, subset: 300}
teacher: {model: digits-wide, train: {epochs: 2}}
stages:
  - prune: {granularity: channel, ratio: 0.5, recover: {epochs: 1}}
  - quantize: {fallback: off}
budget: {max_drop: 50%, size: 1GB}
"""

OWN_NETWORK = """\
from torch import nn

def net():
    convolution = nn.Conv2d(1, 16, 3, padding=1)
    return nn.Sequential(
        convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )
"""


def attar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def json_of(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_and_mistakes_wait_for_no_heavy_import() -> None:
    """PyTorch takes seconds to import; `--help` may not."""
    code = (
        "import sys; from attar.cli import app\n"
        "for words in (['--help'], ['run', '--help'], ['predict', '--help'], ['list'], ['nope']):\n"
        "    try: app(words)\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'onnxruntime', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "check",
        "init",
        "list",
        "evaluate",
        "predict",
        "bench",
        "report",
        "sensitivity",
        "pack",
        "unpack",
    ],
)
def test_every_command_teaches_by_example(command: str) -> None:
    result = attar(command, "--help")
    assert result.exit_code == 0
    assert f"attar {command} " in result.output.replace("attar list", "attar list ")


def test_wrong_usage_ends_with_2_and_one_sentence(tmp_path: Path) -> None:
    assert attar("run").exit_code == 2
    assert attar("run", "digits", "--nope").exit_code == 2
    result = attar("run", "digit")
    assert result.exit_code == 2
    assert "did you mean 'digits'" in result.stderr
    assert "Traceback" not in result.output
    result = attar("list", "modles")
    assert (result.exit_code, "did you mean 'models'" in result.stderr) == (2, True)
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = attar("run", tmp_path / "r.yaml", "--set", "seed=x")
    assert (result.exit_code, "a whole number" in result.stderr) == (2, True)


def raising(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException) -> list[object]:
    """The arguments of a run that fails with `error`."""
    import attar.pipeline

    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(attar.pipeline, "run", fail)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    return ["run", recipe, "--out", tmp_path / "run"]


def test_a_failure_ends_with_1_and_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = raising(monkeypatch, tmp_path, DataError("the class 'cat' is empty"))
    result = attar(*arguments)
    assert (result.exit_code, result.stderr) == (1, "error: the class 'cat' is empty\n")
    assert "Traceback" in attar("--debug", *arguments).stderr


def test_what_nobody_expected_leaves_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    result = attar(*raising(monkeypatch, tmp_path, ZeroDivisionError("division by zero")))
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    (kept,) = (tmp_path / "cache").glob("failure-*.txt")
    assert str(kept) in result.stderr
    assert "ZeroDivisionError" in kept.read_text()


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = raising(monkeypatch, tmp_path, KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["/bin/attar", *map(str, arguments)])
    result = attar(*arguments)
    assert result.exit_code == 130
    assert "stopped; go on with: attar run" in result.stderr
    assert result.stderr.rstrip().endswith("--resume")


def test_lists_say_what_each_part_is() -> None:
    assert set(json_of(attar("list", "--json"))) >= {"recipes", "models", "stages", "criteria"}
    for kind in json_of(attar("list", "--json")):
        parts = json_of(attar("list", kind, "--json"))
        assert parts, kind
        assert all(parts.values()), kind
    assert "cifar-resnet20" in attar("list", "models").stdout


def test_runtimes_are_listed_with_whether_they_work_here(monkeypatch):
    from attar.cli.catalog import described
    from attar.runtimes.base import runtimes

    version = importlib.metadata.version("onnxruntime")
    assert f"Works here: {version}." in described("runtimes")["onnxruntime"]
    missing = classmethod(lambda cls: (False, "pip install openvino"))
    monkeypatch.setattr(runtimes.get("openvino"), "available", missing)
    assert "Not here: pip install openvino." in described("runtimes")["openvino"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "r.yaml").write_text(RECIPE)
    result = attar("run", folder / "r.yaml", "--out", folder / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ledger"]["budget"]["met"] is True
    return folder / "run"


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of a seven."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = digits.images[int(np.flatnonzero(digits.target == 7)[0])]
    path = tmp_path_factory.mktemp("pictures") / "seven.png"
    Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).save(path)
    return path


def test_a_folder_that_holds_a_run_is_not_written_unasked(finished: Path, tmp_path: Path) -> None:
    recipe = finished / "recipe.yaml"
    before = (finished / "ledger.json").read_text()
    result = attar("run", recipe, "--out", finished)
    assert result.exit_code == 2
    for way in ("--resume", "--out", "--overwrite"):
        assert way in result.stderr
    assert (finished / "ledger.json").read_text() == before
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("words")
    assert attar("run", recipe, "--out", mine, "--overwrite").exit_code == 2
    assert (mine / "chapter.txt").read_text() == "words"


def test_a_budget_that_is_missed_ends_with_3_and_by_how_much(finished: Path) -> None:
    """Resumed with a tighter budget: nothing is computed anew, so the answers are the same."""

    def accuracies() -> list[float]:
        rows = json.loads((finished / "ledger.json").read_text())["rows"]
        return [row["metric"]["value"] for row in rows]

    before = accuracies()
    result = attar("run", finished, "--resume", "--set", "budget.size=1KB")
    assert result.exit_code == 3
    assert "size" in result.stdout
    assert "over by" in result.stdout
    assert str(finished / "report.html") in result.stdout
    for stage in ("teacher", "exported", "plain-int8", "prune", "quantize", "deploy"):
        assert stage in result.stdout
    assert accuracies() == before


def test_a_dry_run_only_says_what_it_would_do(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = attar("run", tmp_path / "r.yaml", "--dry-run", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "prune" in result.stdout
    assert not (tmp_path / "run").exists()


def test_predict_names_the_class(finished: Path, seven: Path) -> None:
    (answer,) = json_of(attar("predict", finished, seven, "--top", 1, "--json"))["answers"]
    assert set(answer) == {"class", "probability"}
    assert answer["class"] in set("0123456789")
    lines = attar("predict", finished / "bundle", seven).stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[0] == answer["class"]
    assert lines[0].endswith("%")


def test_predict_and_bench_need_no_pytorch(finished: Path, seven: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom attar.cli import app\n"
        f"for words in (['predict', {str(finished)!r}, {str(seven)!r}],\n"
        f"              ['bench', {str(finished)!r}, '--seconds', '0.1']):\n"
        "    app(words, standalone_mode=False)\n"
    )
    environment = {**os.environ, "ATTAR_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_predict_says_what_it_can_not_read(finished: Path, tmp_path: Path) -> None:
    text = tmp_path / "note.png"
    text.write_text("no picture")
    result = attar("predict", finished, text)
    assert (result.exit_code, "can't read the image" in result.stderr) == (1, True)
    result = attar("predict", tmp_path, text)
    assert (result.exit_code, "neither a run nor a bundle" in result.stderr) == (1, True)
    assert "there is no run or bundle" in attar("predict", tmp_path / "no", text).stderr


def test_bench_replays_and_times(finished: Path) -> None:
    found = json_of(attar("bench", finished, "--seconds", "0.1", "--json"))
    assert found["golden"]["agrees"]
    assert found["latency"]["p50_ms"] > 0
    people = attar("bench", finished, "--seconds", "0.1").stdout
    assert " ms" in people


def test_a_packed_run_is_unpacked_into_a_students_folder(finished: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "small.attar", tmp_path / "student"
    found = json_of(attar("pack", finished, "--out", file, "--json"))
    assert found["bytes"] == file.stat().st_size
    ledger = json.loads((finished / "ledger.json").read_text())
    assert found["bytes"] == ledger["rows"][-1]["packed_bytes"]
    assert sum(t["bytes"] for t in found["tensors"]) < found["bytes"]
    shown = attar("pack", finished, "--out", file)
    assert f"{found['bytes']:,} bytes" in shown.output and "bits a weight" in shown.output

    assert str(folder) in attar("unpack", file, "--out", folder).output
    weights, again = load(finished).state_dict(), load(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    refused = attar("unpack", file, "--out", folder)
    assert (refused.exit_code, "is there already" in refused.stderr) == (2, True)
    assert attar("unpack", tmp_path / "none.attar").exit_code == 2


def test_evaluate_repeats_the_ledgers_figure(finished: Path) -> None:
    last = json.loads((finished / "ledger.json").read_text())["rows"][-1]
    found = json_of(attar("evaluate", finished, "--json"))
    assert found["metric"]["value"] == pytest.approx(last["metric"]["value"], abs=1e-6)


def test_evaluate_takes_other_data_as_the_bundle_wants_them(finished: Path) -> None:
    found = json_of(attar("evaluate", finished / "bundle", "--data", "digits", "--json"))
    again = json_of(attar("evaluate", finished, "--json"))
    assert found["metric"]["value"] == pytest.approx(again["metric"]["value"], abs=1e-6)


def test_report_is_one_page_or_a_comparison(finished: Path, tmp_path: Path) -> None:
    assert str(finished / "report.html") in attar("report", finished).stdout
    page = tmp_path / "both.html"
    assert attar("report", finished, finished, "--out", page).exit_code == 0
    assert "<html" in page.read_text()
    assert attar("report", tmp_path / "none").exit_code == 2


def started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(folder)
    return attar("init", "image-classification", "-m", "digits-small", "-d", "digits")


def test_init_writes_a_recipe_that_names_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = started(tmp_path, monkeypatch)
    assert (result.exit_code, "attar check recipe.yaml" in result.stdout) == (0, True)
    planned = attar("run", "recipe.yaml", "--dry-run").stdout
    assert "digits-small" in planned
    assert "quantize" in planned
    assert started(tmp_path, monkeypatch).exit_code == 2  # it is there already


@pytest.mark.long
def test_what_init_writes_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path, monkeypatch)
    assert json_of(attar("check", "recipe.yaml", "--json"))["estimate"]["seconds"] > 0
    result = attar("run", "recipe.yaml")
    assert result.exit_code in (0, 3), result.output
    assert (tmp_path / "runs" / "recipe" / "bundle" / "predict.py").is_file()


@pytest.mark.long
def test_a_network_of_ones_own_and_a_folder_of_images_become_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = Path("photos", "test" if i % 4 == 0 else "train", str(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(folder / f"{i}.png")
    Path("nets.py").write_text(OWN_NETWORK)
    code = "import nets, torch; torch.save(nets.net().state_dict(), 'mine.pt')"
    subprocess.run([sys.executable, "-c", code], check=True)

    arguments = ("-m", "nets.py:net", "-c", "mine.pt", "-d", "photos")
    assert attar("init", "image-classification", *arguments).exit_code == 0
    refused = attar("check", "recipe.yaml")
    assert (refused.exit_code, "--trust" in refused.stderr) == (2, True)
    checked = json_of(attar("check", "recipe.yaml", "--trust", "--json"))
    assert checked["data"]["shape"] == [1, 8, 8]
    result = attar("run", "recipe.yaml", "--trust")
    assert result.exit_code in (0, 3), result.output
    answer = attar("predict", "runs/recipe", next(Path("photos/test/7").iterdir()))
    assert (answer.exit_code, answer.stdout.split()[0].isdigit()) == (0, True), answer.output


def shown(events: list[dict[str, Any]], *, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160, highlight=False)
    with Screen(console) as screen:
        for event in events:
            screen(event)
    return stream.getvalue()


TRAINING = [
    {"event": "run", "recipe": "quick", "folder": "runs/[quick]"},
    {"event": "stage", "name": "01-distill", "index": 1, "of": 2, "cached": False},
    {"event": "step", "label": "distill", "epoch": 1, "epochs": 2, "step": 3, "steps": 10,
     "loss": 1.5},
    {"event": "epoch", "label": "distill", "epoch": 1, "epochs": 2, "loss": 1.25, "terms": {},
     "metric": {"name": "accuracy", "value": 0.875}, "lr": 0.1, "seconds": 2.0, "eta_s": 2.0,
     "best": True},
    {"event": "trial", "setting": "ratio", "value": 0.5, "metric": 0.9, "drop": 0.01, "kept": True},
    {"event": "note", "text": "the classes [0] and [1] are few"},
    {"event": "something-new", "field": 1},
]  # fmt: skip


def test_a_pipe_gets_plain_lines() -> None:
    text = shown(TRAINING, terminal=False)
    assert "\x1b" not in text
    assert "quick → runs/[quick]" in text
    assert "distill · epoch 1 of 2 · loss 1.2500 · accuracy 87.50 %" in text
    assert "tried ratio = 0.5: drop 1.00, keeps the budget" in text
    assert "note: the classes [0] and [1] are few" in text


def test_a_terminal_gets_a_live_line() -> None:
    text = shown(TRAINING, terminal=True)
    assert "epoch 1 of 2" in text
    assert "left" in text


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (("max_drop", 0.005, 0.0125, False, False), "drop 1.25 points, allowed 0.50 points: over"),
        (("latency_ms", 0.2, 0.25, False, False), "over by 0.050 ms"),
        (("size", 50_000, 60_000, False, False), "size 60 KB, allowed 50 KB: over by 10 KB"),
        (("memory", 20_000_000, 10_000_000, True, True), "memory 10 MB, allowed 20 MB: met"),
        (("max_drop", 0.01, 0.005, True, False), "met by the estimate, not for certain"),
    ],
)
def test_the_verdict_says_by_how_much(figure: tuple[Any, ...], said: str) -> None:
    names = ("name", "limit", "value", "met", "certain")
    assert said in budget_line(dict(zip(names, figure, strict=True)))
