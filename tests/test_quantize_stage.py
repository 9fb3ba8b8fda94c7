"""The quantize stage: what it decides from measurements, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from attar.errors import UsageError
from attar.measure.intervals import Interval
from attar.quantize import Quantized, quantized_reference
from attar.quantize.bench import RuntimeBench
from attar.quantize.fallback import decide
from attar.quantize.rounding import Effort, round_weights
from attar.runtimes.target import Target
from attar.stages.base import Context
from attar.stages.quantize import Quantize
from attar.stages.quantizing import spread_over
from attar.student import Student
from attar.student.packed import packed
from attar.tasks.base import tasks
from network_fixture import Encoder


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


QUICK = {"epochs": 2, "batch_size": 100, "precision": "float32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "float16", "observer": "minmax"}, "observer is for scheme int8, not for float"),
        ({"scheme": "int8", "group": 32}, "group is for scheme int8-weights or int4-weights"),
        ({"scheme": "int8-weights", "mixed": {"max_drop": 0.01}}, "mixed is for scheme int8"),
        ({"method": "qat"}, "give recover"),
        ({"method": "qat", "scheme": "bfloat16"}, "qat is for scheme int8 or int8-weights or"),
        ({"method": "qat", "recover": QUICK, "correct_biases": True}, "are for method: ptq"),
        (
            {"method": "qat", "recover": QUICK, "scheme": "int4-weights", "group": 32},
            "training learns a scale a row",
        ),
        ({"scheme": "int4-weights", "recover": QUICK}, "is trained with method: qat"),
        ({"steps": "fixed"}, "steps is for method: qat"),
        ({"mixed": {}}, "give max_drop or latency_ms, one of them"),
        ({"mixed": {"max_drop": 0.01, "latency_ms": "80%"}}, "one of them"),
        ({"mixed": {"max_drop": 0.01}, "fallback": "off"}, "mixed chooses what stays float"),
        ({"mixed": {"max_drop": 0.5}}, "would be 50% of all answers"),
        ({"smooth": 2}, "less than or equal to 1"),
    ],
)
def test_what_would_be_ignored_is_refused_when_the_recipe_is_read(settings, message):
    with pytest.raises(ValidationError, match=message):
        Quantize(**settings)


def test_what_is_written_out_is_read_again():
    stage = Quantize(method="qat", recover=QUICK, mixed={"latency_ms": "80%"})
    assert Quantize.model_validate(stage.model_dump(mode="json")) == stage


@pytest.mark.parametrize("make", [None, Encoder], ids=["cnn", "transformer"])
@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"scheme": "int8-weights"}, "weights-quantized"),
        ({"scheme": "int4-weights", "rounding": "adaptive"}, "weights-quantized"),
        ({"scheme": "float16"}, "weights-quantized"),
        ({"scheme": "int8-dynamic", "fallback": "off", "smooth": 0.5}, "quantized-dynamically"),
    ],
    ids=["int8-weights", "int4-weights", "float16", "int8-dynamic"],
)
def test_every_scheme_leaves_its_edit_and_answers_nearly_as_before(
    make, settings, kind, run, tiny_net, monkeypatch
):
    quick = partial(round_weights, effort=Effort(examples=32, iterations=20))
    monkeypatch.setattr("attar.stages.quantizing.weights.round_weights", quick)
    network = (make or tiny_net)().eval()
    before = answers_of(network, run)
    student = Quantize(**settings).apply(Student(network), run)
    assert student.edits[-1].kind == kind and run.found["scheme"] == settings["scheme"]
    graph = quantized_reference(student.edits, student.module, *traced(run).values())
    apart = (answers_of(graph, run) - before).abs().max() / before.abs().max()
    assert 0 < apart < (0.3 if "int4" in settings["scheme"] else 0.05)
    assert student.check() is None


def test_dynamic_int8_that_is_slower_leaves_weights_in_bytes(run, monkeypatch):
    monkeypatch.setattr(RuntimeBench, "ratio", lambda *_: Interval(1.2, 1.1, 1.3, "faked"))
    student = Quantize(scheme="int8-dynamic").apply(Student(Encoder().eval()), run)
    assert student.edits[-1].kind == "weights-quantized"
    assert run.found["float_layers"][0]["layer"] == "*"


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_int8_students_are_packed_as_integers(scheme, run):
    student = Quantize(scheme=scheme, fallback="off").apply(Student(Encoder().eval()), run)
    stored = packed(student).tensors
    assert {stored[f"{layer}.weight"].form for layer in ("embed", "up", "down", "head")} == {"rows"}


def test_of_two_files_of_the_same_4_bit_weights_the_faster_is_kept(run, monkeypatch):
    times = iter([2.0, 1.0])
    monkeypatch.setattr(Target, "latency_ms", lambda *_: next(times))
    student = Quantize(scheme="int4-weights").apply(Student(Encoder().eval()), run)
    assert student.edits[-1].scheme.kernel == run.found["kernel"]["chosen"] == "matmulnbits"
    assert student.edits[-1].scheme.group == 32


@pytest.mark.parametrize("scheme", ["int8", "int4-weights"])
@pytest.mark.parametrize("make", [None, Encoder], ids=["cnn", "transformer"])
def test_a_teacher_of_features_trains_the_quantized_network(make, scheme, run, tiny_net):
    network, layer = (tiny_net, "1") if make is None else (make, "up")
    teacher = network().eval()
    student = Quantize(
        scheme=scheme,
        method="qat",
        recover={**QUICK, "criteria": ["kd", {"feature": {"layers": [layer]}}]},
        **({"fallback": "off", "calibration": 64} if scheme == "int8" else {}),
    ).apply(Student(network().eval()), replace(run, teacher=teacher))
    history = run.histories["recover"]
    assert len(history) == 2 and {"kd", "feature", "task"} == history[0]["gradients"].keys()
    assert student.edits[-1].rounds == ("activations" if scheme == "int8" else "weights")
    assert student.check() is None


def test_a_plan_of_precision_is_kept_for_a_stage_that_was_killed(run, tiny_net, monkeypatch):
    monkeypatch.setattr(RuntimeBench, "ratio", lambda *_: Interval(0.5, 0.49, 0.51, "faked"))
    stage = Quantize(mixed={"max_drop": "10%"}, calibration=64)
    stage.apply(Student(tiny_net().eval()), run)
    plan = run.found["precision"]
    assert plan["asks"] == "max_drop" and {one["layer"] for one in plan["layers"]} == {
        "0",
        "4",
        "8",
    }
    monkeypatch.setattr(
        "attar.stages.quantizing.static.plan", lambda *_, **__: pytest.fail("planned")
    )
    again = replace(run, found={})
    stage.apply(Student(tiny_net().eval()), again)
    assert again.found["precision"] == plan


def test_corrections_say_what_they_did(run, tiny_net):
    stage = Quantize(
        equalise=True, correct_biases=True, observer="moving-average", fallback="off",
        calibration=128,
    )  # fmt: skip
    student = stage.apply(Student(tiny_net().eval()), run)
    assert run.found["equalised"]["undone"] == [] and run.found["corrected"]["layers"] == 3
    assert student.edits[-1].biases
    assert run.found["inside"]["runtime"] == "onnxruntime"
    assert [one["layer"] for one in run.found["inside"]["layers"] if one["op"] == "linear"] == ["8"]


def test_validation_of_another_kind_than_calibration_is_told(run, tiny_net):
    notes = []
    bright = replace(run.data, validation=Brighter(run.data.validation))
    Quantize(calibration=128, fallback="off", inside=True).apply(
        Student(tiny_net().eval()), replace(run, data=bright, tell=notes.append)
    )
    said = [n["text"] for n in notes if "calibration data look different" in n["text"]]
    assert said and "of values are clipped" in said[0]


def test_examples_to_look_at_are_spread_over_a_split(run):
    split = run.data.validation
    seen = torch.cat([b.indices for b in spread_over(split, 72)])
    assert len(seen) == 72 and torch.equal(seen, split.pick(range(0, 144, 2)).indices)
    assert sum(len(b.indices) for b in spread_over(split, 10_000)) == len(split)


class Brighter:
    """A split whose images are ten times as bright."""

    def __init__(self, split):
        self._split = split

    def __len__(self):
        return len(self._split)

    def pick(self, places):
        return self._brighter(self._split.pick(places))

    def batches(self, *args, **kwargs):
        return map(self._brighter, self._split.batches(*args, **kwargs))

    def _brighter(self, batch):
        return batch._replace(inputs=batch.inputs * 10)


def traced(run):
    example = run.task.example(run.data)
    return {"example": example, "dynamic_shapes": run.task.dynamic_shapes(example)}


def answers_of(network, run):
    with torch.no_grad():
        return network(run.data.validation.pick(range(32)).inputs)
