import json
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
from attar.student.packed import packed_size
from attar.tasks.image_classification import ImageClassification
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


def swept(tmp_path, student, max_drop: float | None, **fields: Any):
    """A list of bits tried on the bench: the shared student, its context, the events."""
    events: list = []
    run = bench(student, tmp_path, events, max_drop=max_drop, **{"baseline": 1.0, **fields})
    shared = Share(bits=[4, 1, 3, 2], recover=Training(epochs=2)).apply(student, run)
    return shared, run, events


def test_of_a_list_the_smallest_that_keeps_the_budget_is_chosen(student, tmp_path):
    shared, run, events = swept(tmp_path, student, 0.02)
    by_bits = {point["bits"]: point for point in run.found["curve"]}
    kept = [bits for bits, point in by_bits.items() if point["drop"] <= 0.02]
    assert 0 < len(kept) < 4
    assert [bits for bits, point in by_bits.items() if point["chosen"]] == [min(kept)]
    assert run.found["bits"] == min(kept) and run.found["method"] == "kmeans"
    assert shared.module.weight.unique().numel() == 2 ** min(kept)
    sizes = [by_bits[bits]["bytes"] for bits in (1, 2, 3, 4)]
    assert sizes == sorted(sizes)
    assert run.found["limit"] == pytest.approx(0.98)
    assert not [e for e in events if e["event"] == "note"]


def test_of_a_list_that_breaks_the_budget_the_best_is_chosen_and_a_note_says_so(student, tmp_path):
    shared, run, events = swept(tmp_path, student, -1.0)
    best = max(run.found["curve"], key=lambda point: point["metric"])
    assert best["chosen"] and best["bits"] == 4
    assert shared.module.weight.unique().numel() == 16
    (note,) = [e["text"] for e in events if e["event"] == "note"]
    assert "no bits of the list keeps the budget" in note and "4, the best" in note


def test_of_a_list_without_a_budget_the_best_is_chosen(student, tmp_path):
    shared, run, events = swept(tmp_path, student, None, baseline=None)
    assert shared.module.weight.unique().numel() == 16
    assert {(p["drop"], p["kept"]) for p in run.found["curve"]} == {(None, None)}
    assert "limit" not in run.found and not [e for e in events if e["event"] == "note"]


def test_each_of_a_list_is_trained_once_in_full_and_apart(student, tmp_path):
    _, run, _ = swept(tmp_path, student, 0.02)
    assert run.trained == [(tmp_path / f"bits-{b}", "recover", 2) for b in (4, 1, 3, 2)]


def test_trials_of_a_list_are_told_and_fit_the_screen(student, tmp_path):
    from attar.screen import trial_line

    _, _, events = swept(tmp_path, student, 0.02)
    trials = [e for e in events if e["event"] == "trial"]
    assert [e["value"] for e in trials] == [4, 1, 3, 2]
    lines = [trial_line(e) for e in trials]
    assert lines[0].endswith("keeps the budget") and lines[1].endswith("too much")
    assert all("packed, drop" in line for line in lines)
    _, _, events = swept(tmp_path, student, None, baseline=None)
    lines = [trial_line(e) for e in events if e["event"] == "trial"]
    assert all("metric" in line and "budget" not in line for line in lines)


def test_auto_records_its_curve(student, tmp_path):
    run = bench(student, tmp_path, [], max_drop=0.005, baseline=1.0)
    Share(bits="auto").apply(student, run)
    curve, tried = run.found["curve"], run.found["tried"]
    assert [p["bits"] for p in curve] == [t["value"] for t in tried]
    assert [p["bits"] for p in curve if p["chosen"]] == [run.found["bits"]]
    assert all(
        p["metric"] == t["metric"] and p["bytes"] > 0 for p, t in zip(curve, tried, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dkm", "values": 8},
        {"method": "dkm", "scope": "network"},
        {"method": "kmeans", "rate": 0.1},
        {"method": "kmeans", "ratio": 0.1},
        {"method": "rate", "rate": 0.1, "bits": 3},
        {"method": "rate", "rate": 0.1, "temperature": 1.0},
        {"method": "hashed", "ratio": 0.1, "importance": "fisher"},
    ],
)
def test_a_setting_of_another_method_is_refused(settings):
    with pytest.raises(ValidationError, match=r"is for method .*, not for .*: leave it out"):
        Share(**settings, recover=Training(epochs=1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "rate"}, "takes rate"),
        ({"method": "rate", "rate": 0.1, "size": "2KB"}, "takes rate"),
        ({"method": "hashed"}, "takes ratio"),
        ({"method": "dkm"}, "give recover"),
        ({"bits": []}, "empty list"),
        ({"bits": 3, "values": 8}, "takes the place of bits"),
    ],
)
def test_what_a_method_needs_is_asked_for(settings, said):
    training = {} if settings == {"method": "dkm"} else {"recover": Training(epochs=1)}
    with pytest.raises(ValidationError, match=said):
        Share(**settings, **training)


def on_digits(digits, tmp_path, **fields: Any) -> Context:
    return Context(
        task=ImageClassification(),
        data=digits,
        teacher=None,
        seed=0,
        work=tmp_path,
        **fields,
    )


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 3}, "shared"),
        ({"method": "dkm", "bits": 2}, "shared"),
        ({"method": "rate", "rate": 0.1}, "shared"),
        ({"method": "rate", "size": "1.5KB"}, "shared"),
        ({"method": "hashed", "ratio": 0.25}, "hashed"),
    ],
)
def test_each_method_makes_a_smaller_packed_file_of_digits(
    settings, kind, tiny_net, digits, tmp_path
):
    student = Student(tiny_net())
    run = on_digits(digits, tmp_path)
    shared = Share(**settings, recover=Training(epochs=1)).apply(student.copy(), run)
    shared.check()
    assert kind in [edit.kind for edit in shared.edits]
    assert run.found["method"] == settings.get("method", "kmeans")
    assert run.found["layers"]
    assert packed_size(shared) < 0.6 * packed_size(student)
    json.dumps(run.found, allow_nan=False)


def test_a_size_that_cannot_be_met_is_refused(tiny_net, digits, tmp_path):
    student = Student(tiny_net())
    run = on_digits(digits, tmp_path)
    with pytest.raises(UsageError, match="size 40 B can't be met"):
        Share(method="rate", size="40B", recover=Training(epochs=1)).apply(student, run)


def test_what_is_told_of_trainings_says_which_candidate_they_are_of(tiny_net, digits, tmp_path):
    events: list = []
    student = Student(tiny_net())
    run = on_digits(digits, tmp_path, tell=events.append)
    Share(bits=[2, 3], recover=Training(epochs=1)).apply(student, run)
    told = [e["label"] for e in events if e["event"] == "epoch"]
    assert told == ["recover, bits = 2", "recover, bits = 3"]
    assert list(run.histories) == ["recover"]
