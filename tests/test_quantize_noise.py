"""Noise per layer: the formula, by hand on a small network; every kind of network; no noise."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import DataError
from attar.quantize import Scheme, quantize
from attar.quantize.edit import Quantized
from attar.quantize.noise import LayerNoise, _Ratio, in_json, student_noise
from attar.student import Student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def quantized(network: nn.Module, x: Tensor) -> tuple[Student, Quantized]:
    student = quantize(
        Student(network.eval()), Scheme(), [(x,)], example=(x[:2],), dynamic_shapes=SHAPES
    )
    edit = student.edits[-1]
    assert isinstance(edit, Quantized)
    return student, edit


def noise(student: Student, *batches: Tensor) -> list[LayerNoise]:
    given = ((b,) for b in batches)
    return student_noise(student, given, example=(batches[0][:2],), dynamic_shapes=SHAPES)


def test_ratios_are_those_of_their_formula() -> None:
    torch.manual_seed(0)
    x, network = torch.randn(40, 6), Two()
    student, edit = quantized(network, x)

    def on(value: Tensor, key: str, low: int, high: int) -> Tensor:
        scale, zero = edit.grids[key]
        if scale.numel() > 1:
            scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
        return (torch.clamp(torch.round(value / scale) + zero, low, high) - zero) * scale

    def layer(part: nn.Linear, name: str, value: Tensor) -> Tensor:
        return F.linear(value, on(part.weight, f"{name}:linear/weight", -127, 127), part.bias)

    def db(exact: Tensor, noisy: Tensor) -> float:
        return float(10 * torch.log10(exact.square().sum() / (exact - noisy).square().sum()))

    with torch.no_grad():
        one = F.relu(network.first(x))
        two = network.second(one)
        first = layer(network.first, "first", on(x, next(iter(inputs(edit))), 0, 255))
        first = on(F.relu(first), ":relu", 0, 255)
        own = layer(network.second, "second", on(one, ":relu", 0, 255))
        whole = layer(network.second, "second", first)
    found = noise(student, x[:25], x[25:])  # batches add up
    assert [(f.layer, f.operator) for f in found] == [("first", "linear"), ("second", "linear")]
    assert found[0].own_db == pytest.approx(db(one, first), abs=0.02)
    assert found[0].snr_db == pytest.approx(found[0].own_db, abs=1e-9)
    assert found[1].own_db == pytest.approx(db(two, own), abs=0.02)
    assert found[1].snr_db == pytest.approx(db(two, whole), abs=0.02)


def inputs(edit: Quantized) -> list[str]:
    return [key for key in edit.grids if key.endswith(":placeholder")]


def test_a_transformer_has_noise_in_every_layer_and_it_adds_up() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 1, 8, 8)
    found = noise(quantized(Encoder(), x)[0], x)
    assert {"embed", "attend", "up", "down", "head"} <= {f.layer for f in found}
    assert [f.number for f in found if f.layer == "attend"] == [0, 1]
    for one in found:
        assert one.own_db is not None and one.snr_db is not None
        assert 15 < one.snr_db <= one.own_db + 1 < 80, one
    assert found[0].own_db == found[0].snr_db, "nothing comes before the first layer"


def test_without_noise_or_signal_there_is_no_number() -> None:
    ratio = _Ratio()
    ratio.add(torch.ones(3), torch.ones(3))
    assert ratio.db == math.inf
    assert in_json(ratio.db) is None
    silent = _Ratio()
    silent.add(torch.zeros(3), torch.ones(3))
    assert silent.db is None and in_json(None) is None
    assert in_json(12.3456) == 12.35


def test_a_student_that_is_not_quantized_has_none_and_examples_are_needed() -> None:
    x = torch.randn(8, 6)
    assert noise(Student(Two().eval()), x) == []
    student, _ = quantized(Two(), x)
    with pytest.raises(DataError, match="needs examples"):
        student_noise(student, [], example=(x,), dynamic_shapes=SHAPES)
