"""SmoothQuant: equation 4, in networks that answer alike, and what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import DataError, UsageError
from attar.quantize import Scheme, quantize, quantized_reference
from attar.quantize.smoothing import smooth
from attar.share import share_weights
from attar.student import Student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)


class Block(nn.Module):
    """Attention with separate queries, keys and values, behind a layer norm; an RMS norm written
    out; a norm that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(16))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        h = self.norm(x)
        mixed = torch.softmax(self.query(h) @ self.key(h).transpose(1, 2) / 4, -1)
        x = x + mixed @ self.value(h)
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x = x + self.down(F.relu(self.up(self.gain * h)))
        x = self.last(x)
        return self.head(x).mean(1) + x.mean((1, 2), keepdim=False)[:, None]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def with_outliers(network: type[nn.Module]) -> nn.Module:
    """The network with two features of its norm eighty times larger, and read as much less: it
    answers the same."""
    torch.manual_seed(0)
    net = network().eval()
    with torch.no_grad():
        readers = [net.query, net.key, net.value] if isinstance(net, Block) else [net.up]
        for feature in (3, 11):
            net.norm.weight[feature] *= 80
            net.norm.bias[feature] *= 80
            for reader in readers:
                reader.weight[:, feature] /= 80
    return net


def smoothed(net: nn.Module, images: Tensor, student: Student | None = None, **named):
    return smooth(
        student or Student(net),
        ((part,) for part in images.split(32)),
        example=(images[:2],),
        dynamic_shapes=SHAPES,
        **named,
    )


def answers(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_a_norm_and_its_readers_are_scaled_by_equation_4(images, alpha):
    net = with_outliers(Block)
    was = copy.deepcopy(net).requires_grad_(False)
    inputs = []
    was.query.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    before = answers(was, images)
    _, record = smoothed(net, images, alpha=alpha)
    assert torch.allclose(answers(net, images), before, atol=1e-4)
    x = inputs[0].abs().amax((0, 1))
    w = torch.cat([was.query.weight, was.key.weight, was.value.weight]).abs().amax(0)
    s = x**alpha / w ** (1 - alpha)
    assert torch.allclose(net.norm.weight, was.norm.weight / s, rtol=1e-4)
    assert torch.allclose(net.norm.bias, was.norm.bias / s, rtol=1e-4, atol=1e-7)
    for one, other in ((net.query, was.query), (net.key, was.key), (net.value, was.value)):
        assert torch.allclose(one.weight, other.weight * s, rtol=1e-4)
        assert torch.equal(one.bias, other.bias)
    assert record["where"] == "norm" and record["spread"][0] > 10 > record["spread"][1]


def test_products_with_a_parameter_are_smoothed_and_what_others_read_is_not(images):
    net = with_outliers(Block)
    was = copy.deepcopy(net)
    _, record = smoothed(net, images)
    assert not torch.equal(net.gain, was.gain)  # written `gain * h`
    assert not torch.equal(net.down.weight, was.down.weight)  # a ReLU lets a factor pass
    for path in ("last.weight", "last.bias", "head.weight", "embed.weight"):
        assert torch.equal(net.get_parameter(path), was.get_parameter(path)), path
    assert record["places"] == 3 and record["undone"] == []


def noise(net: nn.Module, images: Tensor) -> float:
    student = quantize(
        Student(net),
        Scheme(weight_bits=8, observer="minmax"),
        [(images,)],
        example=(images[:2],),
        dynamic_shapes=SHAPES,
    )
    graph = quantized_reference(student.edits, net, (images[:2],), SHAPES)
    assert graph is not None
    expected = answers(net, images)
    return float((answers(graph, images) - expected).square().mean() / expected.var())


@pytest.mark.parametrize("network", [Block, Encoder])
def test_outliers_cost_int8_less_once_smoothed(images, network):
    net = with_outliers(network)
    plain = noise(net, images)
    smoothed(net, images)
    assert noise(net, images) < 0.5 * plain


def test_a_shared_weight_keeps_its_codebook(images):
    net = with_outliers(Block)
    edit, _ = share_weights(net, 3, [])
    student = Student(net).edited(edit)
    before = {path: net.get_parameter(path).clone() for path in edit.assignments}
    assert before
    smoothed(net, images, student)
    student.check()
    assert all(torch.equal(net.get_parameter(p), w) for p, w in before.items())


def test_wrong_calls_are_refused(images):
    net = with_outliers(Encoder)
    with pytest.raises(UsageError, match=r"alpha is from 0 to 1, not 1\.5"):
        smoothed(net, images, alpha=1.5)
    with pytest.raises(DataError, match="there are none"):
        smooth(Student(net), [], example=(images[:2],), dynamic_shapes=SHAPES)
    small = quantize(
        Student(net), Scheme(), [(images,)], example=(images[:2],), dynamic_shapes=SHAPES
    )
    with pytest.raises(UsageError, match="before the student is quantized"):
        smoothed(net, images, small)
