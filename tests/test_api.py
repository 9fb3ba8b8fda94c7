"""The Python face: a person's own modules, loaders and parts, and the student back in a process of
its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attar
from attar.errors import CheckpointError, UsageError
from attar.events import several
from attar.measure.cost import nonzero, parameters
from attar.pipeline import evaluate
from attar.pipeline.job import handed_in, job_of
from attar.recipe import load_recipe
from attar.runtimes.bundle import read_bundle
from run_fixture import (
    TINY,
    Enough,
    Event,
    WholeRun,
    hurried,
    in_fresh_process,
    run_recipe,
    stop_at,
    write_recipe,
)

QUICK = {"epochs": 2, "batch_size": 32, "optimizer": {"lr": 0.01}}


class Net(nn.Module):
    """A network of a person's own, for 6 × 6 gray images in three classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright row; which row is the class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    inputs = 0.5 * torch.rand(count, 1, 6, 6, generator=generator)
    inputs[torch.arange(count), 0, 2 * targets] += 0.7
    return inputs, targets


def loaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    sets = [TensorDataset(*examples(n, seed)) for n, seed in ((192, 1), (90, 2), (90, 3))]
    return DataLoader(sets[0], 32, shuffle=True), DataLoader(sets[1], 32), DataLoader(sets[2], 32)


def trained() -> Net:
    torch.manual_seed(0)
    net, (inputs, targets) = Net(), examples(192, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(30):
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


class Own:
    """What `attar.compress` made of a module, loaders and stages, and what it was given."""

    def __init__(self, folder: Path) -> None:
        self.teacher = trained()
        self.before = {k: v.clone() for k, v in self.teacher.state_dict().items()}
        torch.manual_seed(1)
        stages = [
            attar.Distill(criteria=["kd"], **QUICK),
            attar.Prune(granularity="channel", ratio=0.5, recover={**QUICK, "epochs": 1}),
            attar.Share(bits=4),
            attar.Quantize(fallback="off"),
        ]
        self.folder = folder / "run"
        with hurried():
            self.run = attar.compress(
                self.teacher,
                student=Net(8 * 3),
                data=loaders(),
                stages=stages,
                classes=["top", "middle", "bottom"],
                budget={"max_drop": "50%"},
                out=self.folder,
            )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    return Own(tmp_path_factory.mktemp("own"))


# -- compress -----------------------------------------------------------------------------------


def test_modules_and_loaders_of_ones_own_are_compressed_and_left_as_they_were(own: Own) -> None:
    assert [row["stage"] for row in own.run.ledger["rows"]] == [
        "teacher", "exported", "plain-int8", "distill", "prune", "share", "quantize", "deploy",
    ]  # fmt: skip
    assert own.run.ledger["rows"][0]["metric"]["value"] > 0.8
    assert own.teacher.training, "the teacher stays in the mode it was in"
    for name, value in own.teacher.state_dict().items():
        assert torch.equal(value, own.before[name])
    manifest = json.loads((own.folder / "bundle" / "manifest.json").read_text())
    assert manifest["outputs"][0]["classes"] == ["top", "middle", "bottom"]


def test_the_student_is_an_ordinary_module_pruned_for_real(own: Own) -> None:
    student = own.run.student
    assert type(student) is Net and not student.training
    assert student.conv.out_channels < 24
    assert student.head.in_features == 16 * student.conv.out_channels
    last = own.run.ledger["rows"][-1]
    assert parameters(student) == last["parameters"] and nonzero(student) == last["nonzero"]
    assert len(student.conv.weight.unique()) <= 16, "its weights share 2^4 values"
    loss = nn.functional.cross_entropy(student(examples(8, 5)[0]), examples(8, 5)[1])
    loss.backward()  # it can be trained on


def test_the_exported_file_answers_as_the_student(own: Own) -> None:
    inputs, _ = examples(60, 7)
    with torch.no_grad():
        eager = own.run.student(inputs).numpy()
    deployed = own.run.session(inputs)
    assert deployed.shape == eager.shape
    assert (deployed.argmax(1) == eager.argmax(1)).mean() > 0.95
    assert np.abs(deployed - eager).max() < 0.1 * np.abs(eager).max()  # int8
    np.testing.assert_array_equal(own.run.session(inputs.numpy()), deployed)
    shared = read_bundle(own.folder / "stages" / "03-share" / "bundle").session()
    np.testing.assert_allclose(shared(inputs.numpy())[0], eager, atol=1e-4)


def test_a_run_shows_itself_in_a_notebook(own: Own) -> None:
    html = own.run._repr_html_()
    for row in own.run.ledger["rows"]:
        assert row["stage"] in html
    assert own.run.report().is_file()
    assert own.run.budget_met


def test_its_recipe_says_what_it_can_and_is_not_run_from_a_file(own: Own) -> None:
    recipe = load_recipe(own.folder)
    assert recipe.teacher.model == "python:Net"
    assert [stage.name for stage in recipe.stages] == ["distill", "prune", "share", "quantize"]
    for use in (attar.run, lambda *_, **__: evaluate(own.folder)):
        with pytest.raises(UsageError, match=r"handed in from Python.*attar\.compress"):
            use(recipe, own.folder, resume=True)


def test_data_may_be_functions_that_give_fresh_iterators(tmp_path: Path) -> None:
    def batches(count: int, seed: int) -> Any:
        def fresh() -> Iterator[tuple[Tensor, Tensor]]:
            inputs, targets = examples(count, seed)
            yield from zip(inputs.split(32), targets.split(32), strict=True)

        return fresh

    with hurried(), pytest.raises(Enough):
        attar.compress(
            trained(),
            data=[batches(192, 1), batches(90, 2), batches(90, 3)],
            stages=[],
            out=tmp_path / "run",
            tell=stop_at("row", stage="exported"),
        )
    teacher, exported = attar.ledger(tmp_path / "run")["rows"]
    assert teacher["metric"]["value"] == exported["metric"]["value"] > 0.8
    assert (teacher["metric"]["n"], exported["agreement"]) == (90, 1.0)


class Halve(attar.Stage):
    """Halves the last layer's weights, a stage of a person's own."""

    name: ClassVar[str] = "halve"
    by: float = 0.5

    def apply(self, student: attar.Student, run: attar.Context) -> attar.Student:
        with torch.no_grad():
            student.module.head.weight.mul_(self.by)
        return student


def test_a_stage_of_ones_own_takes_part(own: Own, tmp_path: Path) -> None:
    place = tmp_path / "run"
    with hurried(), pytest.raises(Enough):
        attar.compress(
            own.teacher,
            data=loaders(),
            stages=[Halve(by=0.25)],
            out=place,
            tell=stop_at("row", stage="halve"),
        )
    student = attar.load(place, model=Net(), stage="01-halve")
    assert torch.allclose(student.head.weight, own.teacher.head.weight / 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": {"max_dorp": "1%"}}, "did you mean 'max_drop'"),
        ({"budget": {"max_drop": 5}}, "budget.max_drop"),
        ({"deploy": {"runtime": "onnxruntim"}}, "did you mean 'onnxruntime'"),
        ({"stages": [attar.Quantize(), attar.Prune(ratio=0.5)]}, "prune .* can't come after"),
        ({"stages": [attar.Prune]}, "a stage is one name with its settings"),
        ({"name": "../up"}, "name"),
        ({"data": [1, 2]}, "data has 2 parts; give three"),
        ({"student": "resnet18"}, r"is an nn\.Module, not a str"),
        ({"task": "image-clasification"}, "did you mean 'image-classification'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    right = {"data": loaders(), "stages": [], "out": tmp_path / "run"}
    with pytest.raises(UsageError, match=said) as caught:
        attar.compress(Net(), **{**right, **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_module_is_known_by_its_weights_and_by_what_it_does(tmp_path: Path) -> None:
    """A `forward` that was mended in a notebook must not get the old one's results."""

    def net(body: str, value: float = 1.0) -> nn.Module:
        path = tmp_path / f"net{len(list(tmp_path.iterdir()))}.py"
        path.write_text(
            "from torch import nn\n"
            "class Net(nn.Sequential):\n"
            f"    def forward(self, x):\n        {body}\n"
        )
        from attar.files import from_file

        made = from_file(f"{path}:Net", trusted=True)(nn.Linear(2, 2))
        nn.init.constant_(made[0].weight, value)
        nn.init.zeros_(made[0].bias)
        return made

    first = handed_in(net("return self[0](x)")).key
    assert handed_in(net("return self[0](x)")).key == first
    assert handed_in(net("return -self[0](x)")).key != first
    assert handed_in(net("return self[0](x)", 2.0)).key != first


# -- load ---------------------------------------------------------------------------------------


def answer(place: str, stage: str | None, inputs: np.ndarray, out: str, own_module: bool) -> None:
    """In a fresh process: loads a run's student and writes its answers and its widths."""
    module = Net(8 * 3) if own_module else None
    student = attar.load(place, model=module, stage=stage)
    assert not own_module or student is module
    with torch.no_grad():
        answers = student(torch.from_numpy(inputs)).numpy()
    np.savez(out, answers=answers, parameters=parameters(student))


def test_a_fresh_process_loads_the_student_into_a_fresh_module(own: Own, tmp_path: Path) -> None:
    inputs, out = examples(20, 9)[0].numpy(), str(tmp_path / "out.npz")
    assert in_fresh_process(answer, str(own.folder), None, inputs, out, True) == 0
    with np.load(out) as found, torch.no_grad():
        expected = own.run.student(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(found["answers"], expected, atol=1e-6)
        assert found["parameters"] == parameters(own.run.student) < parameters(Net(24))


def test_a_fresh_process_loads_a_recipes_student_and_its_stages(
    whole_run: WholeRun, tmp_path: Path
) -> None:
    inputs = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)
    for stage in (None, "02-prune"):
        out = str(tmp_path / f"{stage}.npz")
        assert in_fresh_process(answer, str(whole_run.folder), stage, inputs, out, False) == 0
        bundle = whole_run.folder / "stages" / (stage or "03-share") / "bundle"
        with np.load(out) as found:  # the bundle before quantization answers as the student
            exported = read_bundle(bundle).session()(inputs)[0]
            np.testing.assert_allclose(found["answers"], exported, atol=1e-4)
            assert found["parameters"] == whole_run.row("prune")["parameters"]


def test_what_can_not_be_loaded_is_said(own: Own, whole_run: WholeRun, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"attar\.load\(run, model=MyNetwork\(\)\)"):
        attar.load(own.folder)
    with pytest.raises(CheckpointError, match="the network is not the one that was pruned"):
        attar.load(own.folder, model=Net(7))
    with pytest.raises(UsageError, match=r"it has: 00-.*01-distill, 02-prune"):
        attar.load(whole_run.folder, stage="02-prun")
    with pytest.raises(CheckpointError, match=r"student\.json is missing"):
        attar.load(tmp_path)


# -- parts from a file --------------------------------------------------------------------------

PARTS = '''\
"""A person's own model, data source and task."""
import numpy as np
import torch
from torch import nn
from attar.data.parts import Examples, Parts, Source
from attar.tasks.image_classification import ImageClassification

def net(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, classes))

class Rows(Source):
    """Noise with a bright row."""
    def load(self, config):
        def part(count, seed):
            random = np.random.default_rng(seed)
            images = random.integers(0, 100, (count, 1, 4, 4)).astype(np.uint8)
            targets = np.arange(count) % 4
            images[np.arange(count), 0, targets] += 120
            return Examples(images, targets.astype(np.int64))
        splits = {"train": part(160, 1), "validation": part(80, 2), "test": part(80, 3)}
        return Parts.of("rows", tuple("abcd"), splits)

class Sure(ImageClassification):
    name = "sure"

'''

LOSSES = '''\
from attar.distill.criterion import Criterion

class Gap(Criterion):
    """Mean difference."""
    def forward(self, student, teacher, batch=None):
        return (student.logits - teacher.logits).abs().mean()
'''

OWN = """\
name: parts
task: parts.py:Sure
data: {source: parts.py:Rows}
teacher: {model: parts.py:net, train: {epochs: 8, optimizer: {lr: 0.05}, batch_size: 32}}
student: {model: parts.py:net}
stages:
  - distill: {criteria: [{losses.py:Gap: {weight: 0.5}}], epochs: 2, batch_size: 32}
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe beside the files it names; nothing was allowed to run yet."""
    monkeypatch.setenv("ATTAR_CONFIG", str(tmp_path / "config"))
    monkeypatch.chdir("/")  # paths start at the recipe, not here
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "losses.py").write_text(LOSSES)
    return write_recipe(tmp_path, OWN)


def test_parts_of_ones_own_join_a_run_once_they_are_allowed(parts: Path) -> None:
    folder, asked = parts.parent / "run", []
    with pytest.raises(UsageError, match=r"parts\.py.*--trust"):
        run_recipe(parts, folder)

    def allow(question: str) -> bool:
        asked.append(question)
        return True

    heard: list[Event] = []
    listeners = several(heard.append, stop_at("row", stage="distill"))
    with pytest.raises(Enough):
        run_recipe(parts, folder, trusted=allow, tell=listeners)
    assert [Path(question.split()[0]).name for question in asked] == ["parts.py", "losses.py"]
    ledger = attar.ledger(folder)
    assert ledger["task"] == "sure" and ledger["rows"][0]["metric"]["value"] > 0.7
    assert "Gap" in next(e for e in heard if e.get("label") == "distill")["terms"]
    assert type(attar.load(folder, stage="01-distill")) is nn.Sequential
    job_of(load_recipe(parts))  # it is not asked again

    (parts.parent / "losses.py").write_text(LOSSES.replace("mean()", "sum()"))
    with pytest.raises(UsageError, match=r"losses\.py changed since it was last allowed"):
        run_recipe(parts, folder, resume=True)
    with pytest.raises(Enough) as taught:
        run_recipe(
            parts, folder, resume=True, trusted=True, tell=stop_at("stage", name="01-distill")
        )
    assert taught.value.event["cached"] is False, "another criterion teaches anew"


def test_a_criterion_alone_is_asked_about_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTAR_CONFIG", str(tmp_path / "config"))
    (tmp_path / "losses.py").write_text(LOSSES)
    stages = "stages:\n  - distill: {criteria: [losses.py:Gap], epochs: 1}\n"
    recipe = load_recipe(write_recipe(tmp_path, TINY.partition("stages:")[0] + stages))
    with pytest.raises(UsageError, match="--trust"):
        job_of(recipe)
    asked: list[str] = []
    job_of(recipe, trusted=lambda question: not asked.append(question))
    assert len(asked) == 1
    distill = attar.Distill(criteria=[f"{tmp_path / 'losses.py'}:Gap"], epochs=1)
    (tmp_path / "losses.py").write_text(LOSSES + "\n")
    with pytest.raises(UsageError, match="trusted=True"):
        attar.compress(Net(), data=loaders(), stages=[distill], out=tmp_path / "run")
    with pytest.raises(UsageError, match="no 'Gab'; did you mean 'Gap'"):
        attar.compress(
            trained(),
            data=loaders(),
            stages=[attar.Distill(criteria=[f"{tmp_path / 'losses.py'}:Gab"], epochs=1)],
            out=tmp_path / "run",
            trusted=True,
        )
