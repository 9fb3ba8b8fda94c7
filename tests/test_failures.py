"""What goes wrong in a run, what is said then, and that nothing finished is lost."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import attar
from attar.data import from_loaders
from attar.errors import (
    ConstraintBroken,
    DataError,
    ExportError,
    ParityError,
    StorageError,
    TrainingError,
    UsageError,
)
from attar.events import several
from attar.stages.base import Context, Stage, stages
from attar.store import sole_writer
from attar.student import Student
from run_fixture import (
    TINY,
    Enough,
    Event,
    WholeRun,
    in_fresh_process,
    lasting,
    ledger_of,
    logged,
    run_recipe,
    run_until,
    stop_at,
    write_recipe,
)

KILLED = -9


def attar_command(*arguments: object) -> Result:
    from attar.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert "Traceback" not in result.output
    return result


def teacher_only(settings: str = "") -> str:
    """The tiny recipe without stages; `settings` go beside the teacher's model."""
    head = TINY.partition("stages:")[0].partition("student:")[0]
    return head.replace("train: {", "train: {" + settings) + "stages: []\n"


# -- killed -------------------------------------------------------------------------------------

MOMENTS: list[tuple[Event, int]] = [
    ({"event": "epoch", "label": "teacher", "epoch": 2}, 0),  # told, its checkpoint not yet there
    ({"event": "stage", "name": "01-distill"}, 5),  # its checkpoint is being written
    ({"event": "stage", "name": "02-prune"}, 0),
    ({"event": "epoch", "label": "recover", "epoch": 1}, 3),
    ({"event": "stage", "name": "04-quantize"}, 4),  # its entry is being written
    ({"event": "stage", "name": "deploy"}, 4),
    ({"event": "budget"}, 0),
]


def kill_and_go_on(moments: list[tuple[Event, int]], place: Path) -> Path:
    """The folder of a run that was killed at each of these moments in turn, then left alone."""
    recipe, folder, cache = write_recipe(place), place / "run", place / "cache"
    for when, writes in moments:
        assert in_fresh_process(run_until, recipe, folder, cache, when, writes) == KILLED, when
    assert in_fresh_process(run_until, recipe, folder, cache, {"event": "never"}) == 0
    return folder


def require_same(folder: Path, undisturbed: WholeRun) -> None:
    assert lasting(ledger_of(folder)) == lasting(undisturbed.ledger)
    for name in ("student/weights.safetensors", "student/edits.safetensors", "bundle/model.onnx"):
        assert (folder / name).read_bytes() == (undisturbed.folder / name).read_bytes(), name
    trained = [{(e["label"], e["epoch"]) for e in logged(f, "epoch")}
               for f in (folder, undisturbed.folder)]  # fmt: skip
    assert trained[0] == trained[1], "the log has the epochs from before the kill too"
    assert (folder / "report.html").is_file()


def test_a_run_killed_in_every_stage_ends_as_an_undisturbed_one(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    folder = kill_and_go_on(MOMENTS, tmp_path)
    require_same(folder, whole_run)
    parts = tmp_path / "cache" / "store" / "parts"
    assert not list(parts.iterdir()), "what was half written is gone"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_any_write_ends_as_an_undisturbed_one(
    whole_run: WholeRun, tmp_path: Path, seed: int
) -> None:
    random = np.random.default_rng(seed)
    recipe, folder, cache = write_recipe(tmp_path), tmp_path / "run", tmp_path / "cache"
    start = {"event": "run"}
    kills = 0
    for attempt in range(1, 60):
        writes = int(random.integers(1, 20 * attempt))
        code = in_fresh_process(run_until, recipe, folder, cache, start, writes)
        if code == 0:
            break
        assert code == KILLED
        kills += 1
    assert code == 0 and kills >= 3
    require_same(folder, whole_run)


# -- the run's folder ---------------------------------------------------------------------------


def test_a_folder_that_another_run_writes_is_left_alone(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with sole_writer(folder):
        with pytest.raises(StorageError, match="another run is writing"):
            run_recipe(whole_run.recipe, folder)
        result = attar_command("run", whole_run.recipe, "--out", folder)
        assert (result.exit_code, "another run is writing" in result.stderr) == (1, True)
        assert [p.name for p in folder.iterdir()] == [".lock"]


def test_a_finished_run_is_not_run_over_unasked(whole_run: WholeRun) -> None:
    before = (whole_run.folder / "ledger.json").read_bytes()
    with pytest.raises(UsageError, match="holds a run already: go on with it"):
        run_recipe(whole_run.recipe, whole_run.folder)
    assert (whole_run.folder / "ledger.json").read_bytes() == before


# -- a full disk --------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")


def full_at(where: str) -> Callable[..., Any]:
    """What a function does whose folder has no room."""

    def fail(*arguments: Any, **settings: Any) -> None:
        if where == "copytree":  # which goes on, and collects what failed as text
            raise shutil.Error([("a", "b", str(FULL))])
        raise FULL

    return fail


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("shutil", "copytree"),  # the view of an entry
        ("numpy", "savez_compressed"),  # a row's answers
        ("pathlib.Path", "write_text"),  # the ledger
        ("attar.pipeline.ledger", "write_bundle"),
        ("attar.training.loop", "save_checkpoint"),
    ],
)
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(
    owner: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path, teacher_only().replace("epochs: 3", "epochs: 1"))
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{name}", full_at(name))
        with pytest.raises(StorageError, match=r"no room left to write .*--resume"):
            run_recipe(recipe, tmp_path / "run", tell=stop_at("row", stage="exported"))
    entries = tmp_path / "cache" / "store" / "entries"
    for entry in entries.glob("*"):
        assert (entry / "student").is_dir(), "only whole entries are kept"
    with pytest.raises(Enough):
        run_recipe(recipe, tmp_path / "run", tell=stop_at("row", stage="teacher"), resume=True)


def test_a_log_line_cut_off_by_a_full_disk_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path, teacher_only())

    def cut(event: Event) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:
            (log,) = (tmp_path / "cache").rglob("events.jsonl")
            log.write_text(log.read_text() + '{"event": "epo\n')
            raise Enough(event)

    with pytest.raises(Enough):
        run_recipe(recipe, tmp_path / "run", tell=cut)
    with pytest.raises(Enough):
        run_recipe(recipe, tmp_path / "run", tell=stop_at("row", stage="teacher"), resume=True)
    told = [e["epoch"] for e in logged(tmp_path / "run", "epoch")]
    assert set(told) == {1, 2, 3}


# -- stages that fail ---------------------------------------------------------------------------


class Regrow(Stage):
    """Sets every weight to one, masks or not."""

    name: ClassVar[str] = "regrow"

    def apply(self, student: Student, run: Context) -> Student:
        with torch.no_grad():
            for parameter in student.module.parameters():
                parameter.fill_(1.0)
        return student


def test_a_mask_that_grew_back_fails_the_run_and_loses_nothing(
    whole_run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages._parts, "regrow", Regrow)
    text = TINY.partition("  - share")[0] + "  - regrow\n"
    recipe, folder = write_recipe(tmp_path, text), tmp_path / "run"
    with pytest.raises(ConstraintBroken, match=r"weights of conv1\.weight are no longer zero"):
        run_recipe(recipe, folder)
    result = attar_command("run", recipe, "--out", folder, "--resume")
    assert result.exit_code == 1
    assert "a constraint of the student is broken" in result.stderr
    kept = [row["stage"] for row in ledger_of(folder)["rows"]]
    assert kept == ["teacher", "exported", "plain-int8", "distill", "prune"]
    pruned = lasting({"rows": ledger_of(folder)["rows"]})["rows"][-1]
    assert pruned == lasting(whole_run.ledger)["rows"][4]
    assert attar_command("report", folder).exit_code == 0


def test_a_loss_that_is_no_number_ends_the_run_with_advice(tmp_path: Path) -> None:
    rate = "optimizer: {name: sgd, lr: 1.0e+6}"
    text = teacher_only().replace("optimizer: {lr: 0.01}", rate)
    recipe = write_recipe(tmp_path, text)
    result = attar_command("run", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    for word in ("teacher: the loss became", "optimizer.lr is 1e+06", "clip", "warmup"):
        assert word in line
    with pytest.raises(TrainingError):
        run_recipe(recipe, tmp_path / "run", resume=True)


def test_an_export_that_answers_otherwise_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attar.runtimes.onnxruntime_session import OnnxSession

    honest = OnnxSession.__call__
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    store = Path(tmp_path / "cache" / "store" / "entries")
    recipe = write_recipe(tmp_path, teacher_only().replace("epochs: 3", "epochs: 1"))
    monkeypatch.setattr(OnnxSession, "__call__", lambda *a: tuple(x + 1 for x in honest(*a)))
    with pytest.raises(ParityError, match="differ from PyTorch's"):
        run_recipe(recipe, tmp_path / "run")
    assert [row["stage"] for row in ledger_of(tmp_path / "run")["rows"]] == ["teacher"]
    assert not list(store.glob("*/bundle")), "what answers wrongly is not kept"


def test_a_baseline_that_can_not_be_made_is_left_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attar.runtimes import onnxruntime_plain

    def fail(*arguments: Any) -> None:
        raise ExportError("ONNX Runtime can't quantize this")

    monkeypatch.setattr(onnxruntime_plain, "quantize_plainly", fail)
    text = TINY.partition("  - share")[0].replace("subset: 300", "subset: 299")
    recipe, heard = write_recipe(tmp_path, text), []
    listeners = several(heard.append, stop_at("row", stage="distill"))
    with pytest.raises(Enough):
        run_recipe(recipe, tmp_path / "run", tell=listeners)
    rows = [row["stage"] for row in ledger_of(tmp_path / "run")["rows"]]
    assert rows == ["teacher", "exported", "distill"]
    assert any("no row plain-int8" in event.get("text", "") for event in heard)


# -- networks that don't fit --------------------------------------------------------------------


def loaders(seed: int = 0, noise: bool = False) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Three splits of 2 batches of 32 images in four classes."""
    generator = torch.Generator().manual_seed(seed)

    def split() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (torch.rand(32, 1, 4, 4, generator=generator), torch.arange(32) % 4) for _ in range(2)
        ]

    return [split(), split(), split()]


def flat(classes: int = 4, inputs: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        ((flat(7), None), "answers with 7 classes and the data have 4"),
        ((flat(4), flat(3)), "answers with 3 classes and the data have 4"),
        ((flat(4, 25), None), r"the teacher can't answer to inputs of shape \(1, 4, 4\)"),
        ((flat(4), flat(4, 25)), r"the student can't answer to inputs of shape \(1, 4, 4\)"),
    ],
)
def test_networks_that_do_not_fit_the_data_are_refused_before_anything_long(
    networks: tuple[nn.Module, nn.Module | None], said: str, tmp_path: Path
) -> None:
    teacher, student = networks
    heard: list[Event] = []
    with pytest.raises(DataError, match=said):
        attar.compress(
            teacher,
            student=student,
            data=loaders(),
            stages=[attar.Distill(epochs=1)],
            out=tmp_path / "run",
            tell=heard.append,
        )
    assert not [e for e in heard if e["event"] in ("stage", "epoch", "row")]


def test_a_network_that_answers_nan_is_refused(tmp_path: Path) -> None:
    broken = flat()
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(DataError, match="the teacher answers with infinities or NaN"):
        attar.compress(broken, data=loaders(), stages=[], out=tmp_path / "run")


class Fickle(nn.Module):
    """Its control flow depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = flat()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if float(x.sum()) > 0 else -self.net(x)


def test_a_network_that_can_not_be_exported_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"can't export Fickle.*\(return self.net\(x\) if"):
        attar.compress(Fickle(), data=loaders(), stages=[], out=tmp_path / "run")
    assert [row["stage"] for row in ledger_of(tmp_path / "run")["rows"]] == ["teacher"]


class Memory(nn.Module):
    """Knows the answers to the examples it was shown, and guesses at the others."""

    def __init__(self, examples: torch.Tensor, answers: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("examples", examples.flatten(1))
        self.register_buffer("answers", nn.functional.one_hot(answers).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        distance = (x.flatten(1)[:, None] - self.examples[None]).square().sum(-1)
        return (-50 * distance).softmax(-1) @ self.answers


def test_a_teacher_that_has_seen_the_validation_examples_is_noticed_with_the_cure(
    tmp_path: Path,
) -> None:
    splits = loaders()
    inputs, targets = (torch.cat(part) for part in zip(*splits[1], strict=True))
    heard: list[Event] = []
    with pytest.raises(Enough):
        attar.compress(
            Memory(inputs, targets),
            data=from_loaders(*splits),
            stages=[],
            out=tmp_path / "run",
            tell=lambda e: (heard.append(e), stop_at("stage", name="deploy")(e)),
        )
    notes = [e["text"] for e in heard if e["event"] == "note"]
    (said,) = [text for text in notes if "has seen the validation examples" in text]
    assert "validation: {from: test, fraction: 0.5}" in said
    first = ledger_of(tmp_path / "run")["rows"][0]
    assert first["validation"]["value"] == 1.0 > first["metric"]["value"] + 0.3


def test_an_honest_teacher_is_not_suspected(whole_run: WholeRun) -> None:
    notes = [e["text"] for e in whole_run.events if e["event"] == "note"]
    assert not [text for text in notes if "has seen" in text]


# -- checkpoints --------------------------------------------------------------------------------


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def checkpoint_recipe(folder: Path, checkpoint: Path) -> Path:
    teacher = "teacher: {model: digits-small, checkpoint: CHECKPOINT}\n"
    head, rest = teacher_only().split("teacher:", 1)
    text = head + teacher.replace("CHECKPOINT", str(checkpoint)) + rest.partition("\n")[2]
    return write_recipe(folder, text)


def test_a_hostile_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    for name, save in (("bare.pth", pickle_to), ("zip.pth", torch.save)):
        checkpoint = tmp_path / name
        save({"state_dict": {"conv1.weight": Trap(sprung)}}, checkpoint)
        recipe = checkpoint_recipe(tmp_path, checkpoint)
        for command in (("run", "--out", tmp_path / "run"), ("check",)):
            result = attar_command(command[0], recipe, *command[1:])
            assert result.exit_code == 1
            (line,) = result.stderr.strip().splitlines()
            assert str(checkpoint) in line
    assert not sprung.exists() and not (tmp_path / "run").exists()


def pickle_to(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(tmp_path: Path) -> None:
    checkpoint = tmp_path / "other.pth"
    torch.save(flat().state_dict(), checkpoint)
    result = attar_command("run", checkpoint_recipe(tmp_path, checkpoint), "--out", tmp_path / "r")
    assert result.exit_code == 1
    assert "missing" in result.stderr and "conv1.weight" in result.stderr
    assert "unexpected" in result.stderr and "1.weight" in result.stderr
    checkpoint.unlink()
    result = attar_command("run", checkpoint_recipe(tmp_path, checkpoint), "--out", tmp_path / "r")
    assert (result.exit_code, str(checkpoint) in result.stderr) == (1, True)
    assert not (tmp_path / "r").exists()
