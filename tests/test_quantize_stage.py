"""The quantize stage: what it decides from measurements, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from attar.errors import UsageError
from attar.measure.intervals import Interval
from attar.quantize import Quantized
from attar.quantize.bench import RuntimeBench
from attar.quantize.fallback import decide
from attar.stages.base import Context
from attar.stages.quantize import Quantize
from attar.student import Student
from attar.tasks.base import tasks


class Faked:
    """A runtime that takes the time it is told.

    ratios: int8 over float by the layers left in float. layers: float and int8 microseconds.
    """

    def __init__(self, ratios, layers):
        self.ratios, self.layers = ratios, layers
        self.asked = []

    def ratio(self, float_layers):
        self.asked.append(float_layers)
        value = self.ratios[float_layers]
        return Interval(value, value - 0.02, value + 0.02, "faked")

    def times(self, float_layers):
        return {k: v for k, v in self.layers.items() if k not in float_layers}


WINS, LOSES = (100.0, 40.0), (20.0, 35.0)


def test_int8_stays_where_every_layer_wins():
    bench = Faked({(): 0.4}, {"a": WINS, "b": WINS})
    decision = decide(bench)
    assert decision.float_layers == () and decision.ratio == 0.4
    assert bench.asked == [()]


def test_a_layer_that_loses_stays_float_and_says_why():
    bench = Faked({(): 0.6, ("b",): 0.5}, {"a": WINS, "b": LOSES, "c": WINS})
    found = decide(bench).found()
    assert found["float_layers"] == [{"layer": "b", "why": "35 µs in int8, 20 µs in float"}]
    assert found["int8_over_float"]["ratio"] == 0.5
    assert [t["float_layers"] for t in found["int8_over_float"]["tried"]] == ["none", "b"]


def test_a_profile_that_the_whole_does_not_confirm_changes_nothing():
    bench = Faked({(): 0.6, ("b",): 0.61}, {"a": WINS, "b": LOSES})
    assert decide(bench).float_layers == ()


def test_the_layer_that_loses_most_is_tried_alone_where_all_together_do_not_help():
    layers = {"a": WINS, "b": LOSES, "c": (20.0, 90.0)}
    bench = Faked({(): 0.6, ("c", "b"): 0.62, ("c",): 0.5}, layers)
    assert decide(bench).float_layers == ("c",)


@pytest.mark.parametrize("ratio", [1.04, 1.3])
def test_everything_stays_float_where_int8_may_be_slower(ratio):
    decision = decide(Faked({(): ratio}, {"a": LOSES}))
    assert decision.float_layers == ("*",)
    assert "not faster" in decision.found()["float_layers"][0]["why"]


def test_layers_that_the_recipe_names_stay_float_whatever_is_measured():
    bench = Faked({("a",): 0.7, ("a", "b"): 0.5}, {"a": WINS, "b": LOSES, "c": WINS})
    decision = decide(bench, ("a",))
    assert decision.float_layers == ("a", "b")
    assert decision.why["a"] == "the recipe says so"


@pytest.fixture
def run(digits, tmp_path) -> Context:
    task = tasks.get("image-classification")()
    return Context(task=task, data=digits, teacher=None, seed=0, work=tmp_path)


def test_the_stage_measures_and_decides_in_the_runtime(run, tiny_net, monkeypatch):
    notes = []
    monkeypatch.setattr(RuntimeBench, "ratio", lambda *_: Interval(1.2, 1.1, 1.3, "faked"))
    student = Quantize(calibration=64).apply(
        Student(tiny_net().eval()), replace(run, tell=notes.append)
    )
    edit = student.edits[-1]
    assert isinstance(edit, Quantized) and edit.scheme.all_float
    assert all(key.endswith("/weight") for key in edit.grids)
    assert "computes in float" in edit.summary()
    assert any("stays float" in note["text"] for note in notes)
    assert run.found["float_layers"][0]["layer"] == "*"


def test_a_plan_in_the_recipe_needs_no_measuring_and_repeats(run, tiny_net, monkeypatch):
    monkeypatch.setattr(RuntimeBench, "ratio", lambda *_: pytest.fail("measured"))
    stage = Quantize(calibration=100, float_layers=["0"], fallback="off", weight_bits=7)
    first, second = (stage.apply(Student(tiny_net().eval()), run).edits[-1] for _ in range(2))
    assert first.scheme.float_layers == ("0",) and first.scheme.calibration == 100
    assert first.to_json() == second.to_json()
    assert all(torch.equal(t, second.tensors()[k]) for k, t in first.tensors().items())
    assert run.found["float_layers"] == [{"layer": "0", "why": "the recipe says so"}]
    assert run.found["safe_on"] == "any CPU"


def test_a_layer_that_does_not_exist_is_named(run):
    student = Student(nn.Sequential(nn.Conv2d(1, 2, 3)).eval())
    with pytest.raises(UsageError, match="no layer 'conv9'"):
        Quantize(float_layers=["conv9"], fallback="off").apply(student, run)


def test_an_unknown_observer_is_refused_when_the_recipe_is_read():
    with pytest.raises(UsageError, match="did you mean 'minmax'"):
        Quantize(observer="minmix")
