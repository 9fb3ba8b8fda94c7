"""A run told to an experiment tracker: what stands there afterwards, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from attar.cli import app
from attar.errors import UsageError
from attar.pipeline.tracking import FOLDER, flat, tracked
from attar.recipe import load_recipe
from run_fixture import STAGES, run_recipe, write_recipe


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves by name: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for events in folder.rglob("events.out.tfevents*"):
        file = EventAccumulator(str(events))
        file.Reload()
        for name in file.Tags()["scalars"]:
            found[name] = [(e.step, e.value) for e in file.Scalars(name)]
    return found


def test_tensorboard_shows_trainings_and_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))  # where nothing was computed yet
    path, folder = write_recipe(tmp_path / "recipe"), tmp_path / "run"
    recipe = load_recipe(str(path))
    with tracked(["tensorboard"], recipe, folder) as tell:
        run = run_recipe(path, folder, tell=tell)
    shown = scalars(folder / FOLDER)
    assert [step for step, _ in shown["teacher/loss"]] == [1, 2, 3]
    assert [step for step, _ in shown["02-prune recover/accuracy"]] == [1]
    for row in run.ledger["rows"]:
        ((_, value),) = shown[f"ledger/{row['stage']}/accuracy"]
        assert value == pytest.approx(row["metric"]["value"], abs=1e-6)
    assert {f"ledger/{stage}/drop" for stage in STAGES} < shown.keys()


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorbord", "did you mean 'tensorboard'"), ("comet_ml", "not installed")],
)
def test_a_tracker_that_cannot_be_had_is_refused(name: str, said: str, tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path)))
    with pytest.raises(UsageError, match=said), tracked([name], recipe, tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_the_command_line_refuses_before_anything_is_written(tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path), tmp_path / "run"
    words = ["run", str(path), "--track", "tensorbord", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "tensorboard" in done.output
    assert not out.exists()


def test_settings_stand_under_their_paths() -> None:
    nested = {"seed": 0, "stages": [{"prune": {"ratio": 0.5, "recover": None}}]}
    assert flat(nested) == {
        "seed": 0,
        "stages.0.prune.ratio": 0.5,
        "stages.0.prune.recover": "None",
    }
