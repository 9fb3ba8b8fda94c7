"""Choosing by costs: the solver against trying everything, and layers' costs as measured."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import UsageError
from attar.measure.cost import macs
from attar.models.cifar_resnet import CifarResNet
from attar.planning import layers
from attar.planning.layers import LayerTimes, Shape, shapes_of
from attar.planning.solver import GAP, Cost, OverBudget, cost_of, solve
from attar.runtimes.base import runtimes

amounts = st.floats(0, 10, allow_subnormal=False)


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    losses = [np.array([draw(amounts) for _ in range(n)]) for n in sizes]
    costs, switches = [], [n for n, size in enumerate(sizes) if size == 2]
    for _ in range(draw(st.integers(1, 5))):
        a = draw(st.integers(0, len(sizes) - 1))
        b = draw(st.none() | st.integers(0, len(sizes) - 1))
        shape = (sizes[a],) if b is None else (sizes[a], sizes[b])
        table = np.array([draw(amounts) for _ in range(int(np.prod(shape)))]).reshape(shape)
        unless = draw(st.none() | st.sampled_from(switches)) if switches else None
        costs.append(Cost(a, b, table, unless))
    return losses, costs, draw(st.floats(0, 1)), draw(amounts)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_a_solution_is_the_best_there_is(problem):
    losses, costs, place, fixed = problem
    every = {
        chosen: sum(loss[i] for loss, i in zip(losses, chosen, strict=True))
        for chosen in itertools.product(*(range(len(loss)) for loss in losses))
    }
    paid = {chosen: fixed + cost_of(chosen, costs) for chosen in every}
    low, high = min(paid.values()), max(paid.values())
    budget = low + place * (high - low) + 1e-6
    best = min(every[chosen] for chosen in every if paid[chosen] <= budget)
    found = solve(losses, costs, budget, fixed)
    assert paid[tuple(found)] <= budget + 1e-4
    assert every[tuple(found)] <= best + 2 * GAP * max(1.0, best) + 1e-4


def test_a_budget_that_nothing_keeps_names_the_cheapest():
    costs = [Cost(0, 1, np.array([[9.0, 5.0], [4.0, 7.0]]))]
    with pytest.raises(OverBudget) as error:
        solve([np.zeros(2), np.zeros(2)], costs, budget=3, fixed=1)
    assert error.value.chosen == [1, 0] and error.value.cost == 5


def test_shapes_are_those_that_pytorch_counts():
    nets = [
        (CifarResNet((1, 1, 1), 3, 5), torch.randn(1, 3, 32, 32)),
        (nn.Sequential(nn.Conv1d(4, 8, 5, 2, 3, 2), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8)),
         torch.randn(1, 4, 40)),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(1, 7, 6)),
        (nn.Conv2d(4, 8, 3, padding="same", groups=2), torch.randn(1, 4, 9, 7)),
    ]  # fmt: skip
    for net, x in nets:
        shapes = shapes_of(net, (x,))
        assert sum(s.macs for s in shapes.values()) == macs(net, (x,))
        for path, shape in shapes.items():
            built, own = shape.build(), net.get_submodule(path)
            assert built.weight.shape == own.weight.shape
            assert shape.input_size()[0] == 1


def test_layers_that_cannot_be_built_anew_are_left_out():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 2),
        nn.ReLU(),
    )
    assert shapes_of(net, (torch.randn(1, 3, 8, 8),)) == {}


WIDE = Shape("Conv2d", 64, 64, (1, 16, 16), 1, (3, 3), (1, 1), (1, 1), (1, 1))


def test_times_are_measured_once_and_kept(tmp_path):
    asked: list[int] = []
    times = LayerTimes("onnxruntime", 1, tmp_path, tell=asked.append)
    narrow = replace(WIDE, inputs=16, outputs=16)
    dense = Shape("Linear", 32, 8, (1, 5))
    first = times.microseconds([WIDE, narrow, dense, WIDE])
    assert set(first) == {WIDE, narrow, dense} and asked == [3]
    assert first[WIDE] > 0 and first[dense] >= 0  # in whole microseconds
    again = LayerTimes("onnxruntime", 1, tmp_path, tell=asked.append)
    assert again.microseconds([narrow, WIDE]) == {narrow: first[narrow], WIDE: first[WIDE]}
    assert asked == [3]
    depthwise = replace(WIDE, groups=64)
    assert again.microseconds([depthwise, WIDE])[WIDE] == first[WIDE] and asked == [3, 1]
    assert LayerTimes("onnxruntime", 2, tmp_path)._known == {}  # other threads, other times


@pytest.mark.parametrize(
    "text", ["", "[", "[{}]", '{"us": 1}', '[{"shape": {"kind": 1}, "us": 2}]']
)
def test_a_damaged_file_of_times_is_measured_anew(tmp_path, text):
    times = LayerTimes("onnxruntime", 1, tmp_path)
    times._file.write_text(text)
    narrow = replace(WIDE, inputs=8, outputs=8)
    assert set(LayerTimes("onnxruntime", 1, tmp_path).microseconds([narrow])) == {narrow}
    assert len(json.loads(times._file.read_text())) == 1


def test_many_layers_take_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "AT_ONCE", 2)
    shapes = [Shape("Linear", 8 * n, 16, (1,)) for n in range(1, 6)]
    assert set(LayerTimes("onnxruntime", 1, tmp_path).microseconds(shapes)) == set(shapes)


def test_linear_layers_over_positions_have_their_time(tmp_path):
    wide = Shape("Linear", 512, 512, (1, 64))
    assert LayerTimes("onnxruntime", 1, tmp_path).microseconds([wide])[wide] > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_quantized_layers_have_times_of_their_own(runtime, tmp_path):
    if not runtimes.get(runtime).available()[0]:
        pytest.skip(f"{runtime} is not installed")
    wide = Shape("Conv2d", 64, 64, (1, 32, 32), 1, (3, 3), (1, 1), (1, 1), (1, 1))
    in_float, in_int8 = (LayerTimes(runtime, 1, tmp_path, int8=int8) for int8 in (False, True))
    assert in_float.microseconds([wide])[wide] > 0 and in_int8.microseconds([wide])[wide] > 0
    assert len(list(tmp_path.iterdir())) == 2, "in a file of their own"


def test_a_runtime_that_tells_no_times_is_refused(tmp_path):
    with pytest.raises(UsageError, match="give macs or parameters instead of latency_ms"):
        LayerTimes("executorch", 1, tmp_path)


def test_a_layer_without_a_time_is_refused_and_not_free(tmp_path, monkeypatch):
    times = LayerTimes("onnxruntime", 1, tmp_path)
    monkeypatch.setattr(type(times._runtime), "layer_times", lambda *a, **k: {"layers.0": 3.0})
    shapes = [Shape("Linear", 8, 8, (1,)), Shape("Conv1d", 8, 8, (1, 9), 1, (3,), (1,), (1,), (1,))]
    with pytest.raises(UsageError, match="doesn't tell how long a layer of kind Conv1d takes"):
        times.microseconds(shapes)
