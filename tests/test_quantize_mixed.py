"""Mixed precision: what a layer loses in int8, and the plan made of losses and times."""

from __future__ import annotations

import json
import re
from functools import cache
from html import unescape

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.data.base import Batch
from attar.errors import DataError, UsageError
from attar.measure.intervals import Interval
from attar.quantize import Scheme, quantize, quantized_reference
from attar.quantize.bench import RuntimeBench
from attar.quantize.fallback import LIMIT
from attar.quantize.mixed import plan
from attar.quantize.precision_plan import PrecisionPlan
from attar.quantize.sensitivity import (
    SQUARED,
    LayerLoss,
    Sensitivity,
    divergences,
    sensitivity,
    squared_differences,
)
from attar.quantize.switched import Switched
from attar.report import write_report
from attar.runtimes.base import runtimes
from attar.student import Student
from attar.tasks.base import Metric, tasks
from attar.tasks.image_classification import ImageClassification
from attar.tasks.intervals import metric_drop
from attar.training.evaluation import statistics_of
from network_fixture import Encoder
from report_fixture import details, write_run

TASK = tasks.get("image-classification")()


class Residual(nn.Module):
    """Two branches that are added, and a ReLU after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.left(x) + self.right(x)).relu()
        return self.head(self.pool(x).flatten(1))


class Planted(nn.Module):
    """A layer that reads values far larger than all others, and makes nothing of them."""

    def __init__(self, channel: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.register_buffer("scale", torch.ones(8, 1, 1))
        self.scale[0] = channel
        with torch.no_grad():
            self.third.weight[:, 0] = 0
            self.head.weight *= 20  # answers that are sure of something

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        x = self.third(x * self.scale).relu()  # what is scaled is float, and its input is not
        return self.head(x.mean((2, 3)))


def quantized_of(net, data, bits=7):
    """Makes the student with some layers in float, each once; and what it is traced with."""
    student, example = Student(net.eval()), TASK.example(data)
    shapes = TASK.dynamic_shapes(example)

    @cache
    def quantized(float_layers):
        scheme = Scheme(float_layers=float_layers, weight_bits=bits)
        examples = ((b.inputs,) for b in data.train.batches(64))
        return quantize(student, scheme, examples, example=example, dynamic_shapes=shapes)

    return quantized, {"example": example, "dynamic_shapes": shapes}


def switched_of(net, data):
    quantized, traced = quantized_of(net, data)
    int8, stored = quantized(()), quantized(("*",))
    prepared = int8.edits[-1].prepared(int8.module, *traced.values())
    return Switched(prepared, stored.edits[-1].grids), quantized, traced


def answers(student, traced, inputs):
    with torch.no_grad():
        return quantized_reference(student.edits, student.module, *traced.values())(*inputs)


@pytest.fixture(params=[Residual, Encoder])
def net(request):
    torch.manual_seed(0)
    return request.param()


def test_switched_layers_answer_as_what_is_exported_does(digits, net):
    switched, quantized, traced = switched_of(net, digits)
    inputs = (digits.validation.pick(range(40)).inputs,)
    deployed = answers(quantized(("*",)), traced, inputs)
    assert torch.allclose(switched.answers(inputs), deployed, atol=1e-6)
    every = answers(quantized(()), traced, inputs)
    apart = (every - deployed).abs().mean()
    off = (switched.answers(inputs, switched.layers) - every).abs().mean()
    assert off < 0.15 * apart  # rounding at the edge of a step


def test_one_layer_alone_answers_as_its_own_export(digits, net):
    switched, quantized, traced = switched_of(net, digits)
    inputs = (digits.validation.pick(range(40)).inputs,)
    each = dict(switched.answers_of_each(inputs))
    assert list(each) == [*switched.layers, None]
    assert torch.equal(each[None], switched.answers(inputs))
    deployed = answers(quantized(("*",)), traced, inputs)
    for layer in switched.layers:
        if layer in ("left", "right"):  # exported alone, each takes the whole sum onto grids
            continue
        alone = answers(quantized(tuple(set(switched.layers) - {layer})), traced, inputs)
        assert torch.equal(each[layer], switched.answers(inputs, [layer]))
        apart = (alone - deployed).abs().mean()
        assert (each[layer] - alone).abs().mean() + apart > 0
        assert (each[layer] - alone).abs().mean() < 0.15 * apart, layer


def test_a_layer_is_found_whose_input_no_single_grid_holds(digits):
    def ranked(net):
        quantized, traced = quantized_of(net, digits)
        batches = digits.validation.batches(50)
        return sensitivity(quantized(()), quantized(("*",)), batches, TASK, **traced)

    plain, planted = ranked(Planted()), ranked(Planted(1000.0))
    first, second, *_ = planted.ranked()
    assert first.layer == "third" and first.loss > 20 * second.loss
    assert first.loss > 5 * plain.losses()["third"] and first.error < first.loss / 2
    assert planted.unit == "nats" and planted.examples == len(digits.validation)


def test_divergences_are_those_of_pytorch_one_by_one():
    a, b = torch.randn(2, 6, 5, dtype=torch.float64)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    expected = [F.kl_div(q[i], p[i], log_target=True, reduction="sum") for i in range(6)]
    assert torch.allclose(divergences(a, b), torch.stack(expected))
    assert torch.allclose(divergences(a, a + 3), torch.zeros(6, dtype=torch.float64), atol=1e-12)


def test_squared_differences_know_no_unit_of_the_answers():
    a, b = torch.randn(2, 50, 3, dtype=torch.float64)
    assert torch.allclose(squared_differences(a, b), squared_differences(9 * a + 1, 9 * b + 1))
    mean = a.mean(0).expand_as(a)
    assert float(squared_differences(a, mean).mean()) == pytest.approx(1)


class Regression(ImageClassification):
    """How large the digit is."""

    def __init__(self) -> None:
        self.metric = Metric("error", "", higher_is_better=False)

    def statistics(self, output, batch: Batch) -> np.ndarray:
        return np.square(np.asarray(output)[:, :1] - batch.targets.numpy()[:, None])

    def value(self, statistics: np.ndarray) -> float:
        return float(statistics.mean())

    def hits(self, statistics: np.ndarray) -> None:
        return None

    def verdicts(self, statistics: np.ndarray) -> None:
        return None


def test_answers_without_classes_are_compared_by_squares(digits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))
    quantized, traced = quantized_of(net, digits)
    batches = digits.validation.batches(50)
    found = sensitivity(quantized(()), quantized(("*",)), batches, Regression(), **traced)
    assert found.unit == SQUARED and all(0 < one.loss < 0.01 for one in found.layers)


def test_a_sensitivity_needs_examples_and_a_quantized_student(digits, tiny_net):
    quantized, traced = quantized_of(tiny_net(), digits)
    with pytest.raises(DataError, match="there are none"):
        sensitivity(quantized(()), quantized(("*",)), [], TASK, **traced)
    with pytest.raises(UsageError, match="not quantized"):
        sensitivity(Student(tiny_net()), quantized(("*",)), [], TASK, **traced)


class Faked:
    """A runtime and a validation split that add up: layers' times, what is lost, and some noise.

    layers: float and int8 microseconds, nats, and the drop in int8. noise: the whole's ratio by
    layers in float, added.
    """

    def __init__(self, layers, other=20.0, noise=()):
        self.layers, self.other, self.noise = layers, other, dict(noise)
        self.asked = []

    def _float(self, layer, float_layers):
        return layer in float_layers or "*" in float_layers

    def ratio(self, float_layers):
        took = sum(v[0 if self._float(k, float_layers) else 1] for k, v in self.layers.items())
        whole = self.other + sum(v[0] for v in self.layers.values())
        value = (took + self.other) / whole + self.noise.get(len(float_layers), 0.0)
        return Interval(value, value - 0.01, value + 0.01, "faked")

    def times(self, float_layers):
        return {k: v[:2] for k, v in self.layers.items() if not self._float(k, float_layers)}

    def drop(self, float_layers):
        self.asked.append(float_layers)
        lost = sum(v[3] for k, v in self.layers.items() if not self._float(k, float_layers))
        return Interval(lost, lost - 0.002, lost + 0.002, "faked")

    @property
    def losses(self):
        none = Interval(0, 0, 0, "faked")
        return Sensitivity(
            "nats", 100, [LayerLoss(k, v[2], v[2] / 10, none) for k, v in self.layers.items()]
        )


def planned(bench, **limits):
    return plan(bench, bench.losses, bench.drop, **limits)


QUIET = (100.0, 40.0, 1e-4, 0.0)
LOUD = (50.0, 20.0, 1.0, 0.05)


def test_the_sensitive_layer_alone_stays_float():
    bench = Faked({"a": QUIET, "b": LOUD, "c": QUIET})
    found = planned(bench, max_drop=0.002)
    assert found.float_layers == ("b",)
    rows = {row.layer: row for row in found.layers}
    assert rows["b"].precision == "float" and rows["a"].precision == "int8"
    assert "100% of what all layers lose" in rows["b"].why and "saves 30 µs" in rows["b"].why
    assert (rows["b"].float_us, rows["b"].int8_us, rows["b"].loss) == (50.0, 20.0, 1.0)


def test_nothing_stays_float_where_int8_keeps_the_limit_and_nothing_more_is_measured():
    bench = Faked({"a": QUIET, "b": LOUD})
    found = planned(bench, max_drop=0.06)
    assert found.float_layers == () and bench.asked == [()]


def test_all_stays_float_where_no_faster_arrangement_keeps_the_limit():
    bench = Faked({"a": LOUD, "b": LOUD})
    found = planned(bench, max_drop=0.001)
    assert found.float_layers == ("*",) and found.chosen is None and len(found.tried) > 1
    assert all(row.precision == "float" for row in found.layers) and "keeps the drop" in found.why


def test_all_stays_float_where_int8_is_slower_and_says_so():
    found = planned(Faked({"a": (40.0, 60.0, 1e-4, 0.0)}), max_drop=0.1)
    assert found.float_layers == ("*",) and "not faster" in found.why and not found.tried


def test_a_layer_that_int8_slows_is_float_however_little_it_loses():
    slow = (20.0, 45.0, 1e-6, 0.0)
    bench = Faked({"a": QUIET, "slow": slow, "b": LOUD, "c": QUIET})
    for limit, kept in ((0.06, ("slow",)), (0.002, ("slow", "b"))):
        found = planned(bench, max_drop=limit)
        assert found.float_layers == kept
        assert next(r.why for r in found.layers if r.layer == "slow").startswith("45 µs in int8")


def test_what_the_recipe_leaves_in_float_stays_so():
    bench = Faked({"a": QUIET, "b": LOUD})
    found = planned(bench, max_drop=0.06, given=("a",))
    assert found.float_layers == ("a",) and found.layers[0].why == "the recipe says so"


def test_a_latency_is_kept_with_the_least_loss():
    bench = Faked({"a": QUIET, "b": LOUD, "c": (100.0, 40.0, 0.5, 0.02)})
    least = planned(bench, latency=bench.ratio(()).value + 0.03)
    assert least.float_layers == () and least.asks == "latency"
    middle = planned(bench, latency=bench.ratio(("b",)).value + 0.01)
    assert middle.float_layers == ("b",)
    assert planned(bench, latency=0.9).float_layers == ("b", "c")
    with pytest.raises(UsageError, match="at best on this machine, more than the 20% asked for"):
        planned(bench, latency=0.2)
    with pytest.raises(UsageError, match="more than the 90% asked for"):
        planned(Faked({"a": (40.0, 60.0, 1e-4, 0.0)}), latency=0.9)


def test_exactly_one_limit_is_given():
    for limits in ({}, {"max_drop": 0.1, "latency": 0.8}):
        with pytest.raises(UsageError, match="give one of them"):
            planned(Faked({"a": QUIET}), **limits)


def test_a_runtime_that_tells_no_times_is_planned_by_losses_alone():
    bench = Faked({"a": QUIET, "b": LOUD, "c": QUIET})
    bench.times = lambda _: {}
    found = planned(bench, max_drop=0.002)
    assert found.float_layers == ("b",) and found.layers[0].float_us is None


LAYER = st.tuples(st.floats(5, 200), st.floats(5, 200), st.floats(0, 2), st.floats(-0.002, 0.05))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(LAYER, min_size=1, max_size=6),
    st.floats(0.0, 0.1),
    st.lists(st.tuples(st.integers(0, 6), st.floats(-0.1, 0.1)), max_size=4),
)
def test_the_chosen_keeps_the_limit_and_is_the_fastest_tried_that_does(layers, limit, noise):
    bench = Faked({f"l{i}": layer for i, layer in enumerate(layers)}, noise=noise)
    found = planned(bench, max_drop=limit)
    able = [t for t in found.tried if t.drop <= limit and t.ratio < 1 and t.ratio_high <= LIMIT]
    assert [t for t in found.tried if t.kept] == able
    if found.chosen is None:
        assert found.float_layers == ("*",) and not able
    else:
        best = found.tried[found.chosen]
        assert (
            found.float_layers == best.float_layers and bench.drop(best.float_layers).value <= limit
        )
        assert best.ratio == min(t.ratio for t in able)
    assert planned(bench, max_drop=limit) == found
    assert PrecisionPlan.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_plan_is_replayed_without_measuring_on_its_own_network_only():
    bench = Faked({"0": QUIET, "2": LOUD})
    record = json.loads(json.dumps(planned(bench, max_drop=0.002).to_json()))
    again = PrecisionPlan.from_json(record)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert again.for_network(net) == ("2",)
    with pytest.raises(UsageError, match="a layer 2, which this one lacks"):
        again.for_network(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UsageError, match="no plan of layers' precision"):
        PrecisionPlan.from_json({"schema": 9})


def test_a_planted_layer_is_left_in_float_by_a_plan_that_the_runtime_measured(
    digits, tmp_path, monkeypatch
):
    net = Planted(1000.0)
    quantized, traced = quantized_of(net, digits)
    before = statistics_of(net, digits.validation, TASK)
    losses = sensitivity(
        quantized(()), quantized(("*",)), digits.validation.batches(50), TASK, **traced
    )
    inputs = tuple(x[:1].numpy() for x in traced["example"])
    bench = RuntimeBench(
        runtimes.get("onnxruntime")(), quantized, tmp_path, **traced, inputs=inputs
    )
    # so small a network's times are noise: each layer in int8 is taken to save the same
    faked = Faked(dict.fromkeys(losses.losses(), QUIET))
    monkeypatch.setattr(bench, "ratio", faked.ratio)
    monkeypatch.setattr(bench, "times", faked.times)

    def moved(layers):
        # of labels, an untrained network knows nothing: against its own answers
        after = bench.statistics(layers, digits.validation, TASK)
        own = before.copy()
        own[:, 0], after[:, 0] = 1, after[:, 2] == before[:, 2]
        return metric_drop(TASK, own, after)

    found = plan(bench, losses, moved, max_drop=0.1)
    assert moved(()).value > 0.5
    assert found.float_layers == ("third",)


def test_the_page_shows_the_plan_in_words_the_most_sensitive_layer_first(tmp_path):
    bench = Faked({"a": QUIET, "b": LOUD, "<c>": QUIET})
    record = planned(bench, max_drop=0.002).to_json()
    told = details() | {"found": {"01-quantize": {"precision": json.loads(json.dumps(record))}}}
    html = write_report(write_run(tmp_path, details=told)).read_text(encoding="utf-8")
    section = html[html.index("What was adjusted") : html.index("Inside the")]
    text = " ".join(re.sub("<[^>]+>", " ", section).split())
    assert "for a drop of at most 0.20 points on validation" in text
    assert "1 layer stays float: 0.56 of float's time, the fastest" in unescape(text)
    assert text.index("b float 1 ± 0.1 50 20 100% of what") < text.index("a int8 0.0001 ± 1e-05")
    assert "kept, chosen" in text and "broken" in text and "&lt;c&gt;" in text
    assert not set('{}"') & set(text)
