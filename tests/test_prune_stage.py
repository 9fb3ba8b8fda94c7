"""The prune stage: what a recipe says, and what the run hears."""

import json
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from attar.data.base import Batch
from attar.errors import UsageError
from attar.measure.cost import parameters
from attar.prune.channels import Prunable
from attar.runtimes.target import Target
from attar.stages.base import Context, stages
from attar.stages.prune import Prune
from attar.student import Student
from attar.training.config import Training
from run_fixture import ledger_of, run_recipe, stops_after, write_recipe


class Digits:
    """Ten random images, as a split and the task that reads it."""

    metric = SimpleNamespace(higher_is_better=True)
    images = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def batches(self, batch_size: int, **options: Any):
        yield Batch(self.images, None, torch.arange(10))

    def arguments(self, batch: Batch):
        return (batch.inputs,), {}

    def example(self, data: Any):
        return (self.images[:2],)


@dataclass(frozen=True)
class Bench(Context):
    """A context whose metric is the share of the first layer's channels or weights left."""

    trained: list[tuple[str, str, int, int]] = field(default_factory=list)

    def evaluate(self, module: nn.Module, split: str = "validation") -> float:
        assert split == "validation"
        return int(module[0].weight.count_nonzero()) / (32 * 9)

    def train(self, student: Student, training: Training, objective=None, **rest: Any) -> Student:
        width = student.module[0].out_channels
        label = rest.get("label", "recover")
        self.trained.append((self.work.name, label, training.epochs, width))
        return student


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return Student(
        nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 24), nn.ReLU(),
            nn.Linear(24, 10),
        )
    )  # fmt: skip


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def run(tmp_path: Path, events) -> Bench:
    digits = Digits()
    return Bench(
        task=digits, data=SimpleNamespace(train=digits), teacher=None, seed=0,
        work=tmp_path / "prune", tell=events.append, max_drop=0.5, baseline=1.0,
    )  # fmt: skip


def test_channels_go_and_the_run_keeps_what_was_done(student, run, events):
    pruned = Prune(ratio=0.5, recover=Training(epochs=3)).apply(student, run)
    assert pruned.module[0].out_channels == 16
    assert run.trained == [("prune", "recover", 3, 16)]
    assert run.found == {
        "granularity": "channel",
        "criterion": "magnitude",
        "ratio": 0.5,
        "channels": {
            "0": {"before": 32, "after": 16},
            "3": {"before": 24, "after": 16},
            "5": {"before": 10, "after": 10},
        },
        "kept_whole": {"5": "its channels are the network's output"},
    }
    assert not events


def test_gradual_pruning_trains_between_its_steps(student, run):
    stage = Prune(ratio=0.75, schedule={"cubic": 3}, recover={"epochs": 7}, round_to=1)
    assert stage.apply(student, run).module[0].out_channels == 8
    assert [(label, epochs) for _, label, epochs, _ in run.trained] == [
        ("recover 1 of 3", 2),
        ("recover 2 of 3", 2),
        ("recover 3 of 3", 3),
    ]
    assert [width for *_, width in run.trained] == [15, 9, 8]
    assert run.found["channels"]["0"] == {"before": 32, "after": 8}


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)
        nn.init.normal_(self.layer.weight, std=scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).relu()


def test_blocks_go_by_how_little_they_are_missed(student, run, events):
    blocks = [Residual(scale) for scale in (0.5, 1e-4, 0.6, 1e-3, 0.7)]
    deep = Student(nn.Sequential(*list(student.module)[:5], *blocks, student.module[5]))
    digits = run.task
    digits.logits = lambda output: output
    data = SimpleNamespace(train=digits, validation=digits)
    run = Bench(**{**run.__dict__, "data": data})
    stage = Prune(granularity="block", ratio=0.6, schedule={"cubic": 2}, recover={"epochs": 2})
    pruned = stage.apply(deep, run)
    assert run.found == {
        "granularity": "block", "ratio": 0.6, "blocks": run.found["blocks"]
    }  # fmt: skip
    assert set(run.found["blocks"][:2]) == {"6", "8"} and len(run.found["blocks"]) == 3
    assert [label for _, label, *_ in run.trained] == ["recover 1 of 2", "recover 2 of 2"]
    assert sum(isinstance(m, Residual) for m in pruned.module.modules()) == 2
    assert events[0]["text"].startswith("prune: blocks taken out, the least missed first: ")


def test_weights_become_zero(student, run):
    pruned = Prune(granularity="weight", ratio=0.6, exclude=["5"]).apply(student, run)
    assert run.found["weights"] == {
        "0": {"weights": 288, "kept": 116},
        "3": {"weights": 27648, "kept": 11060},
    }
    assert int(pruned.module[0].weight.count_nonzero()) == 116
    assert [e.kind for e in pruned.edits] == ["masked"]


def test_activation_sees_the_training_data(student, run):
    with torch.no_grad():
        student.module[0].bias[::2] = -100
    kept = student.module[0].bias[1::2].clone()
    pruned = Prune(criterion="activation", ratio=0.5).apply(student, run)
    assert torch.equal(pruned.module[0].bias, kept)


def test_auto_takes_the_strongest_ratio_within_the_budget(student, run, events):
    stage = Prune(ratio="auto", granularity="weight", recover=Training(epochs=6))
    assert stage.searches
    pruned = stage.apply(student, run)
    assert run.found["ratio"] == 0.5
    assert int(pruned.module[0].weight.count_nonzero()) == 144
    tried = {t["value"]: t["kept"] for t in run.found["tried"]}
    assert tried[0.5] and not tried[0.6]
    assert [e["value"] for e in events if e["event"] == "trial"] == list(tried)
    assert run.trained[0][:3] == ("ratio-0.5", "recover at 0.5", 2)
    assert run.trained[-1][:3] == ("prune", "recover", 6)


def test_auto_that_finds_nothing_leaves_the_student(student, run, events):
    hopeless = Bench(**{**run.__dict__, "max_drop": 0.01})
    assert Prune(ratio="auto", granularity="weight").apply(student, hopeless) is student
    assert "nothing is pruned" in events[-1]["text"]


def test_auto_needs_a_budget(student, run):
    without = Bench(**{**run.__dict__, "max_drop": None})
    with pytest.raises(UsageError, match="max_drop"):
        Prune(ratio="auto").apply(student, without)


def test_floors_and_layers_that_stay_are_said(student, run, events):
    Prune(ratio=0.95, exclude=["3"]).apply(student, run)
    said = " ".join(e["text"] for e in events if e["event"] == "note")
    assert "all channels stay in 3: excluded by '3'" in said
    assert "the floor keeps more channels than asked in 0" in said
    assert run.found["kept_whole"]["3"] == "excluded by '3'"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "less than 1"),
        ({}, "give ratio"),
        ({"criterion": "threshold", "ratio": 0.5}, "takes a threshold and no ratio"),
        ({"ratio": 0.5, "threshold": 0.1}, "threshold is for criterion: threshold"),
        ({"ratio": 0.5, "criterion": "apoz", "granularity": "weight"}, "scores channels"),
        ({"ratio": 0.5, "schedule": {"cubic": 4}}, "needs a ratio, and recover"),
        ({"ratio": 0.5, "schedule": {"cubic": 1}}, "greater than or equal to 2"),
        ({"ratio": 0.5, "ratoi": 0.5}, "ratoi"),
        ({"granularity": "block", "ratio": 0.5, "criterion": "taylor"}, "leave criterion"),
        ({"granularity": "block", "ratio": 0.5, "scope": "global"}, "leave criterion"),
        ({"granularity": "block", "macs": "50%"}, "macs is for granularity: channel"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Prune(**fields)


def test_an_unknown_criterion_names_near_ones():
    with pytest.raises(UsageError, match="did you mean 'magnitude'"):
        Prune(ratio=0.5, criterion="magnitudes")


def test_pruning_comes_before_sharing_and_quantizing():
    assert stages.get("prune") is Prune
    assert set(Prune.not_after) == {"quantize", "share"}


# --- to a budget, in whole runs

BUDGETED = """\
name: budgeted
data: {source: digits, subset: 300}
teacher: {model: digits-small, train: {epochs: 3, batch_size: 32, optimizer: {lr: 0.01}}}
stages: [{prune: {macs: 60%}}]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("budgeted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTAR_CACHE", str(place / "cache"))
        yield write_recipe(place, BUDGETED)


def after_pruning(recipe: Path, *settings: str, heard: list[Any] | None = None):
    folder = Path(tempfile.mkdtemp(dir=recipe.parent)) / "run"
    run_recipe(recipe, folder, *settings, heard=heard if heard is not None else [])
    rows = {row["stage"]: row for row in ledger_of(folder)["rows"]}
    return rows["exported"], rows["prune"], folder


@pytest.mark.parametrize(("unit", "sensitivity"), [("macs", "true"), ("parameters", "false")])
def test_what_may_be_left_is_kept_in_the_ledger(recipe, unit, sensitivity):
    amount = f"stages=[{{prune: {{{unit}: 60%, sensitivity: {sensitivity}}}}}]"
    before, after, folder = after_pruning(recipe, amount)
    assert 0.4 * before[unit] < after[unit] <= 0.6 * before[unit]
    plan = json.loads((folder / "stages" / "01-prune" / "plan.json").read_text())
    assert (plan["unit"], plan["after"]) == (unit, after[unit])
    assert ("validation" in plan["losses"]) == (sensitivity == "true")


def test_bytes_that_may_be_left_are_those_of_the_file(recipe):
    before, after, _ = after_pruning(recipe, "stages=[{prune: {size: 25KB}}]")
    assert before["bundle"]["bytes"] > 30_000
    assert 20_000 < after["bundle"]["bytes"] <= 25_500  # the row's file has its description in it


@pytest.mark.long
def test_bytes_can_be_those_of_the_quantized_file(recipe):
    _, after, folder = after_pruning(recipe, "stages=[{prune: {size: 8KB, precision: int8}}]")
    found = json.loads((folder / "details.json").read_text())["found"]["01-prune"]["size"]
    assert found["after"] <= found["limit"] == 8000 < found["before"] < 30_000
    assert after["bundle"]["bytes"] > 8000, "the float file is larger"


def test_milliseconds_that_may_be_left_are_measured(recipe, monkeypatch):
    timed: list[float] = []

    def latency_ms(target: Target, student: Student) -> float:  # which no busy machine changes
        timed.append(parameters(student.module) / 1e4)
        return timed[-1]

    monkeypatch.setattr(Target, "latency_ms", latency_ms)
    heard: list[Any] = []
    _, _, folder = after_pruning(
        recipe, "stages=[{prune: {latency_ms: 90%, floor: 2}}]", heard=heard
    )
    found = json.loads((folder / "details.json").read_text())["found"]["01-prune"]
    told = " ".join(e.get("text", "") for e in heard)
    assert "layers in onnxruntime, once on this machine" in told
    assert found["latency_ms"]["before"] == timed[0] and found["latency_ms"]["after"] in timed[1:]
    assert found["latency_ms"]["after"] <= found["latency_ms"]["limit"] == 0.9 * timed[0]


def test_a_plan_that_was_begun_is_gone_on_with(recipe, monkeypatch):
    """Times differ from one moment to the next; what was trained must still fit the plan."""
    slower = iter(range(1, 100))

    def latency_ms(target: Target, student: Student) -> float:
        return parameters(student.module) / 1e4 + next(slower) * 1e-3

    monkeypatch.setattr(Target, "latency_ms", latency_ms)
    stages = "stages=[{prune: {latency_ms: 90%, floor: 2, recover: {epochs: 2, batch_size: 32}}}]"
    folder = Path(tempfile.mkdtemp(dir=recipe.parent)) / "run"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, folder, stages, tell=stops_after(1, "recover"))
    monkeypatch.setattr(Prunable, "prune", no_choice_is_made_anew(Prunable.prune))
    run_recipe(recipe, folder, stages, heard=[], resume=True)
    assert json.loads((folder / "stages/01-prune/plan.json").read_text())["unit"] == "latency_ms"


def no_choice_is_made_anew(prune):
    def checked(self, select):
        assert not isinstance(select, partial), "a plan was made anew"
        return prune(self, select)

    return checked


def test_a_plan_given_back_makes_the_same_student(recipe):
    *_, folder = after_pruning(recipe)
    place = folder / "stages" / "01-prune"
    *_, again = after_pruning(recipe, f"stages=[{{prune: {{plan: {place / 'plan.json'}}}}}]")
    weights = "stages/01-prune/student/weights.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()
    assert json.loads((again / "stages/01-prune/plan.json").read_text())["parts"]


def test_a_budget_out_of_reach_is_an_error_that_says_how_far_one_gets(recipe):
    with pytest.raises(UsageError, match=r"macs: 1,000 is below what any plan reaches: .* \d+"):
        after_pruning(recipe, "stages=[{prune: {macs: 1000}}]")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"macs": "50%", "ratio": 0.5}, "give one of ratio and macs"),
        ({"macs": "50%", "size": "10KB"}, "give one of macs and size"),
        ({"macs": "50%", "granularity": "weight"}, "macs is for granularity: channel"),
        ({"latency_ms": 1, "scope": "global"}, "latency_ms says by itself what goes where"),
        ({"macs": "50%", "precision": "int8"}, "precision says of which file size and latency_ms"),
        ({"ratio": 0.5, "depth": False}, "depth is for a budget"),
        ({"ratio": 0.5, "sensitivity": False}, "sensitivity is for a budget"),
        ({"macs": "120%"}, "no share to keep: it lies between"),
        ({"macs": -5}, "-5 is no amount"),
        ({"parameters": "many"}, "'many' is no amount"),
        ({"size": "10 apples"}, "is not a size"),
        ({"plan": "nowhere.json"}, "there is no plan nowhere.json"),
        ({"latency_ms": True}, "True is no amount"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Prune(**fields)


def test_results_hang_on_the_deploy_target_where_it_is_measured():
    assert Prune(latency_ms=1).measures_runtime and Prune(size="1MB").measures_runtime
    assert not Prune(macs="50%").measures_runtime and not Prune(ratio=0.5).measures_runtime
