from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from attar.errors import UsageError
from attar.stages.base import Context
from attar.stages.share import Share
from attar.student import Student
from attar.training.config import Training


@dataclass(frozen=True)
class Bench(Context):
    """A context whose metric is 1 minus the mean distance of the weights from `target`."""

    target: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    trained: list[tuple[Path, str, int]] = field(default_factory=list)

    def evaluate(self, module: nn.Module, split: str = "validation") -> float:
        assert split == "validation"
        return 1 - float((module.weight - self.target).detach().abs().mean())

    def train(self, student: Student, training: Training, objective=None, **rest: Any) -> Student:
        self.trained.append((self.work, rest.get("label", "recover"), training.epochs))
        return student


def bench(student: Student, tmp_path: Path, events: list, **fields: Any) -> Bench:
    task = SimpleNamespace(metric=SimpleNamespace(higher_is_better=True))
    return Bench(
        task=task,
        data=None,
        teacher=None,
        seed=0,
        work=tmp_path,
        tell=events.append,
        target=student.module.weight.detach().clone(),
        **fields,
    )


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    return Student(nn.Linear(40, 40))


def test_the_stage_shares_records_and_recovers(student, tmp_path):
    run = bench(student, tmp_path, [])
    shared = Share(bits=3, recover=Training(epochs=2)).apply(student, run)
    assert [edit.kind for edit in shared.edits] == ["shared"]
    assert shared.module.weight.unique().numel() == 8
    assert run.found["bits"] == 3
    assert run.found["layers"]["weight"]["values"] == 8
    assert 0 < run.found["distortion"] < 0.1
    assert run.trained == [(tmp_path, "recover", 2)]


def test_auto_takes_the_fewest_bits_that_keep_the_budget(student, tmp_path):
    events: list = []
    run = bench(student, tmp_path, events, max_drop=0.005, baseline=1.0)
    shared = Share(bits="auto", recover=Training(epochs=6)).apply(student, run)
    by_bits = {t["value"]: t for t in run.found["tried"]}
    chosen = run.found["bits"]
    assert by_bits[chosen]["kept"] and not by_bits[chosen - 1]["kept"]
    assert shared.module.weight.unique().numel() == 2**chosen
    assert [e["value"] for e in events if e["event"] == "trial"] == list(by_bits)
    assert run.trained[-1] == (tmp_path, "recover", 6), "trials recover shortly, the choice fully"
    assert {epochs for _, _, epochs in run.trained[:-1]} == {2}


def test_nothing_is_shared_where_even_eight_bits_drop_too_much(student, tmp_path):
    events: list = []
    before = student.module.weight.clone()
    run = bench(student, tmp_path, events, max_drop=-1.0, baseline=1.0)
    same = Share(bits="auto").apply(student, run)
    assert same.edits == [] and torch.equal(same.module.weight, before)
    assert any(e["event"] == "note" and "nothing is shared" in e["text"] for e in events)


def test_only_auto_depends_on_the_budget():
    assert Share(bits="auto").searches
    assert not Share(bits=4).searches


def test_auto_without_a_budget_is_refused(student, tmp_path):
    with pytest.raises(UsageError, match=r"set budget\.max_drop"):
        Share(bits="auto").apply(student, bench(student, tmp_path, []))


@pytest.mark.parametrize("bits", [0, 9, "many"])
def test_bits_are_one_to_eight_or_auto(bits):
    with pytest.raises(ValidationError):
        Share(bits=bits)
