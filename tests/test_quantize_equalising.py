"""Cross-layer equalisation: ranges that agree with the equations, in networks that answer alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import DataError, UsageError
from attar.prune import Masked
from attar.quantize import Scheme, quantize, quantized_reference, scaling
from attar.quantize.equalising import equalise
from attar.quantize.scaling import input_peaks
from attar.share import share_weights
from attar.student import Edit, Student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)


class Chain(nn.Module):
    """A convolution with a batch norm, a depthwise one, a grouped one, pooling, flattening, linear
    layers."""

    def __init__(self, activation: Any = F.relu) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.wide = nn.Conv2d(6, 8, 1, groups=2)
        self.hidden, self.head = nn.Linear(8 * 16, 12), nn.Linear(12, 10)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.stem(x)))
        x = self.activation(self.deep(x))
        x = F.max_pool2d(F.leaky_relu(self.wide(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def made(network: nn.Module, spread: float = 2.0, seed: int = 0) -> nn.Module:
    """The network with channels of very different ranges."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                rows = torch.randn(len(module.weight), generator=generator).mul(spread).exp2()
                module.weight.mul_(rows.reshape(-1, *[1] * (module.weight.dim() - 1)))
    return network.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def equalised(module: nn.Module, images: Tensor, student: Student | None = None):
    student = student or Student(module)
    return equalise(
        student,
        ((part,) for part in images.split(32)),
        example=(images[:2],),
        dynamic_shapes=SHAPES,
    )


def answers(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)


def folded(norm: nn.BatchNorm2d, weight: Tensor) -> Tensor:
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * factor.reshape(-1, 1, 1, 1)


def test_ranges_are_equal_where_channels_are_made_and_read(images):
    net = made(Chain())
    before = answers(net, images)
    _, record = equalised(net, images)
    assert torch.allclose(answers(net, images), before, rtol=1e-4, atol=1e-4 * before.abs().max())
    ranges = {
        "stem": folded(net.norm, net.stem.weight).abs().flatten(1).amax(1),
        "deep": net.deep.weight.abs().flatten(1).amax(1),
        "wide": net.wide.weight.abs().reshape(2, 4, 3).amax(1).flatten(),
        "wide_made": net.wide.weight.abs().flatten(1).amax(1),
        "hidden": net.hidden.weight.abs().reshape(12, 8, 16).amax((0, 2)),
        "hidden_made": net.hidden.weight.abs().amax(1),
        "head": net.head.weight.abs().amax(0),
    }
    for one, other in (
        ("stem", "deep"),
        ("deep", "wide"),
        ("wide_made", "hidden"),
        ("hidden_made", "head"),
    ):
        assert torch.allclose(ranges[one], ranges[other], rtol=0.02), (one, other)
    assert record["pairs"] == 4 and not record["undone"]
    assert record["largest"] > 2


def test_one_pair_is_scaled_by_equation_9(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()).eval()
    was = copy.deepcopy(net).requires_grad_(False)
    equalised(net, images)
    for i in range(4):
        r1 = float(was[0].weight[i].abs().max())
        r2 = float(was[2].weight[:, i].abs().max())
        s = (r1 * r2) ** 0.5 / r2
        assert torch.allclose(net[0].weight[i], was[0].weight[i] / s, rtol=1e-5)
        assert torch.allclose(net[0].bias[i], was[0].bias[i] / s, rtol=1e-5)
        assert torch.allclose(net[2].weight[:, i], was[2].weight[:, i] * s, rtol=1e-5)
    assert torch.equal(net[2].bias, was[2].bias)


def test_int8_loses_less_where_ranges_differ(images):
    net = made(Chain(), spread=4)
    expected = answers(net, images)

    def error(module: nn.Module) -> float:
        student = quantize(
            Student(module),
            Scheme(weight_bits=8, observer="minmax"),
            [(images,)],
            example=(images[:2],),
            dynamic_shapes=SHAPES,
        )
        graph = quantized_reference(student.edits, module, (images[:2],), SHAPES)
        assert graph is not None
        return float((answers(graph, images) - expected).square().mean())

    plain = error(net)
    equalised(net, images)
    assert error(net) < 0.7 * plain


def test_a_relu6_is_passed_only_by_channels_that_it_leaves_alone(images):
    net = made(Chain(F.relu6))
    with torch.no_grad():
        net.norm.weight[:3] *= 20  # far into the clip
        height = net.norm(net.stem(images)).amax((0, 2, 3))
    was = copy.deepcopy(net)
    before = answers(net, images)
    _, record = equalised(net, images)
    assert torch.allclose(answers(net, images), before, rtol=1e-4, atol=1e-4 * before.abs().max())
    assert not record["undone"]
    clipped = height >= 6
    assert clipped.any() and not clipped.all()
    assert torch.equal(net.norm.weight[clipped], was.norm.weight[clipped])
    with torch.no_grad():
        now = net.norm(net.stem(images)).amax((0, 2, 3))
    assert (now[~clipped] < 6).all()
    assert not torch.equal(net.norm.weight, was.norm.weight)


def test_zeros_stay_zero_and_codebooks_stay_as_they_are(images):
    net = made(Chain())
    mask = torch.rand(net.deep.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    net.deep.weight.data *= mask
    masked = Student(net).edited(Masked({"deep.weight": mask}))
    equalised(net, images, masked)
    masked.check()
    net = made(Chain())
    edit, _ = share_weights(net, 3, ["stem", "deep", "wide"])
    shared = Student(net).edited(edit)
    paths = {p: net.get_parameter(p).clone() for p in edit.assignments}
    assert paths
    equalised(net, images, shared)
    shared.check()
    assert all(torch.equal(net.get_parameter(p), w) for p, w in paths.items())


def test_weights_read_twice_are_left_alone(images):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(F.relu(self.conv(F.relu(self.stem(x)))))).flatten(1)

    net = made(Tied())
    was = copy.deepcopy(net)
    _, record = equalised(net, images)
    assert record["pairs"] == 0
    for one, other in zip(net.parameters(), was.parameters(), strict=True):
        assert torch.equal(one, other)


class Frozen(Edit):
    """Promises that a parameter stays what it is."""

    kind = "frozen-in-tests"

    def __init__(self, path: str, value: Tensor) -> None:
        self.path, self.value = path, value.clone()

    def to_json(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Frozen:
        return cls(record["path"], tensors["value"])

    def check(self, module: nn.Module) -> list[str]:
        same = torch.equal(module.get_parameter(self.path), self.value)
        return [] if same else [f"{self.path} changed"]


def test_a_pair_that_breaks_a_promise_is_undone_alone(images):
    net = made(Chain())
    before = answers(net, images)
    student = Student(net).edited(Frozen("hidden.weight", net.hidden.weight.detach()))
    _, record = equalised(net, images, student)
    student.check()
    assert record["undone"] == ["wide", "hidden"] and record["pairs"] == 2
    assert torch.allclose(answers(net, images), before, rtol=1e-4, atol=1e-4 * before.abs().max())


def test_a_pair_at_which_answers_change_is_undone_alone(images, monkeypatch):
    def wrong(module: nn.Module, link: scaling.Link, factors: Tensor) -> None:
        right(module, link, factors)
        if link.name == "deep":
            module.wide.weight.data *= 1.1

    net = made(Chain())
    before = answers(net, images)
    right = scaling.scale
    monkeypatch.setattr(scaling, "scale", wrong)
    _, record = equalised(net, images)
    assert record["undone"] == ["deep"] and record["pairs"] == 3
    assert torch.allclose(answers(net, images), before, rtol=1e-4, atol=1e-4 * before.abs().max())


def test_a_transformer_answers_as_before(images):
    torch.manual_seed(0)
    net = made(Encoder(), spread=1)
    before = answers(net, images)
    equalised(net, images)
    assert torch.allclose(answers(net, images), before, rtol=1e-3, atol=1e-3 * before.abs().max())


def test_the_mode_stays_and_wrong_calls_are_refused(images):
    net = made(Chain())
    net.train()
    net.norm.eval()
    equalised(net, images)
    assert net.training and not net.norm.training
    net.eval()
    with pytest.raises(DataError, match="there are none"):
        equalise(Student(net), [], example=(images[:2],), dynamic_shapes=SHAPES)
    small = quantize(
        Student(net), Scheme(), [(images,)], example=(images[:2],), dynamic_shapes=SHAPES
    )
    with pytest.raises(UsageError, match="before the student is quantized"):
        equalised(net, images, small)


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 3), out=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers())
def test_input_peaks_are_those_of_a_convolution_without_groups(groups, out, width, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    weight = torch.randn(groups * out, width, 3, 3, generator=generator)
    dense = torch.zeros(groups * out, groups * width, 3, 3)
    for g in range(groups):
        rows = slice(g * out, (g + 1) * out)
        dense[rows, g * width : (g + 1) * width] = weight[rows]
    assert torch.equal(input_peaks(weight, groups, 1), dense.abs().amax((0, 2, 3)))
