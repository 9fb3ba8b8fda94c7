"""AdaRound: integers that serve the layer's answers, baked into weights that quantize to them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import DataError, UsageError
from attar.prune import Masked
from attar.quantize import Scheme, quantize
from attar.quantize.graph import layer_keys
from attar.quantize.rounding import (
    Effort,
    Sample,
    _patches,
    adaround,
    round_adaptively,
    round_weights,
)
from attar.runtimes.aten import constant
from attar.share import share_weights
from attar.student import Student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
QUICK = Effort(examples=48, positions=256, iterations=150)


class Network(nn.Module):
    """Convolutions with batch norms (one of a negative factor), a depthwise one, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.hidden, self.head = nn.Linear(6 * 16, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(F.relu(self.deep(x)), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def student_of(network: type[nn.Module]) -> Student:
    torch.manual_seed(0)
    module = network().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return Student(module)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def traced(images: Tensor) -> dict[str, Any]:
    return {"example": (images[:2],), "dynamic_shapes": SHAPES}


def answers(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)


def layer(relu: bool, groups: int = 1) -> dict[str, Any]:
    """A small layer whose inputs go together, so that roundings can mend one another's errors."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(200, groups, 1, generator=generator) + 0.1 * torch.rand(
        200, groups, 5, generator=generator
    )
    weight = torch.randn(groups, 2, 5, generator=generator)
    weight[:, :, 3] = 0
    bias = 1 + torch.rand(groups, 2, generator=generator)
    targets = torch.einsum("pgi,goi->pgo", inputs, weight) + bias
    targets = targets.relu() if relu else targets
    sample = Sample(inputs, targets, bias, relu)
    return {"weight": weight, "inputs": inputs, "targets": targets, "bias": bias, "relu": relu} | {
        "sample": sample
    }


def error(given: dict[str, Any], integers: Tensor, scale: float) -> float:
    found = torch.einsum("pgi,goi->pgo", given["inputs"], integers * scale) + given["bias"]
    found = found.relu() if given["relu"] else found
    return float((found - given["targets"]).square().mean())


@pytest.mark.parametrize("relu", [False, True])
def test_roundings_are_near_the_best_of_all(relu):
    """Against every way to round a channel, by hand."""
    given, scale = layer(relu), 0.5
    found = adaround(given["weight"], torch.tensor(scale), (-7, 7), given["sample"], iterations=600)
    assert (found - given["weight"] / scale).abs().max() < 1, "no neighbour of the weight"
    assert torch.equal(found, found.round()) and not found[:, :, 3].any()
    nearest = (given["weight"] / scale).round()
    floor = (given["weight"] / scale).floor()
    some = [0, 1, 2, 4]
    best = nearest.clone()
    for channel in range(2):
        tried = []
        for ups in itertools.product((0.0, 1.0), repeat=4):
            integers = best.clone()
            integers[0, channel, some] = floor[0, channel, some] + torch.tensor(ups)
            tried.append((error(given, integers, scale), integers))
        best = min(tried, key=lambda pair: pair[0])[1]
    usual, least = error(given, nearest, scale), error(given, best, scale)
    assert error(given, found, scale) <= least + 0.1 * (usual - least)
    assert least < 0.7 * usual


def test_nothing_leaves_the_grid_and_the_nearest_is_never_beaten_by_worse():
    given = layer(True, groups=3)
    found = adaround(given["weight"], torch.tensor(0.25), (-3, 3), given["sample"], iterations=60)
    assert found.abs().max() == 3
    nearest = (given["weight"] / 0.25).round().clamp(-3, 3)
    assert error(given, found, 0.25) <= error(given, nearest, 0.25)
    again = adaround(given["weight"], torch.tensor(0.25), (-3, 3), given["sample"], iterations=60)
    assert torch.equal(found, again)


@pytest.mark.parametrize("network", [Network, Encoder])
def test_quantizing_afterwards_gives_the_integers_found(images, network):
    student = student_of(network)
    scheme = Scheme(weight_bits=7, observer="minmax")
    rounded, record = round_adaptively(
        student, scheme, ((p,) for p in images.split(16)), **traced(images), effort=QUICK
    )
    assert rounded is student and record["layers"] >= 4
    assert 0 < record["moved"] < 0.5 and record["error"] < 1
    small = quantize(student, scheme, ((p,) for p in images.split(16)), **traced(images))
    (edit,) = small.edits
    prepared = edit.prepared(student.module, (images[:2],), SHAPES)
    checked = 0
    for node, key in layer_keys(prepared).items():
        observer = prepared.get_submodule(str(node.args[1].target))
        weight = constant(prepared, node.args[1].args[0])
        steps = weight / observer.scale.reshape(-1, *[1] * (weight.dim() - 1))
        assert (steps - steps.round()).abs().max() < 1e-3, key
        assert float(steps.abs().max()) == pytest.approx(64, abs=1e-3)
        checked += 1
    assert checked == record["layers"]


def test_four_bit_weights_alone_lose_less_than_by_nearest(images):
    student = student_of(Network)
    was = copy.deepcopy(student.module)
    grids = {}
    for path in ("stem.weight", "deep.weight", "hidden.weight", "head.weight"):
        weight = was.get_parameter(path).detach()
        step = weight.abs().flatten(1).amax(1) / 7
        grids[path] = (step.reshape(-1, *[1] * (weight.dim() - 1)), (-7, 7))
    _, record = round_weights(student, grids, [(images,)], **traced(images), effort=QUICK)
    assert record["layers"] == 4 and record["left"] == 0
    nearest = copy.deepcopy(was)
    for path, (step, (_, limit)) in grids.items():
        weight = student.module.get_parameter(path).detach()
        integers = weight / step
        assert (integers - integers.round()).abs().max() < 1e-3
        assert integers.abs().max() < limit + 1e-3
        assert (weight - was.get_parameter(path)).abs().max() < step.max() * 1.001
        own = nearest.get_parameter(path)
        own.data.copy_((own / step).round() * step)
    expected = answers(was, images)
    off = (answers(student.module, images) - expected).square().mean()
    assert off < 0.8 * (answers(nearest, images) - expected).square().mean()


def test_zeros_stay_zero_and_codebooks_stay_as_they_are(images):
    student = student_of(Network)
    mask = torch.rand(student.module.hidden.weight.shape) > 0.5
    student.module.hidden.weight.data *= mask
    masked = student.edited(Masked({"hidden.weight": mask}))
    edit, _ = share_weights(student.module, 2, ["stem", "hidden", "head"])
    shared = masked.edited(edit)
    assert set(edit.assignments) == {"deep.weight"}
    before = student.module.deep.weight.clone()
    _, record = round_adaptively(
        shared, Scheme(weight_bits=7), [(images,)], **traced(images), effort=QUICK
    )
    shared.check()
    assert torch.equal(student.module.deep.weight, before)
    assert record["left"] == 1 and record["layers"] == 3


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_are_what_a_convolution_reads(dims, padding):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    stride = 1 if padding == "same" else 2
    conv = kind(3, 4, 4, stride=stride, padding=padding, dilation=2, bias=False).eval()
    x = torch.randn(2, 3, *[9] * dims)
    graph = torch.export.export(conv, (x,)).module()
    (node,) = [n for n in graph.graph.nodes if "conv" in str(n.target)]
    patches = _patches(x, conv.weight.shape[2:], node)
    axes = [1, *range(2 + dims, 2 + 2 * dims)]
    found = torch.tensordot(patches, conv.weight, dims=(axes, list(range(1, 2 + dims))))
    with torch.no_grad():
        assert torch.allclose(found.movedim(-1, 1), conv(x), atol=1e-4)


def test_wrong_calls_are_refused(images):
    student = student_of(Network)
    with pytest.raises(DataError, match="there are none"):
        round_adaptively(student, Scheme(), [], **traced(images))
    with pytest.raises(DataError, match="there are none"):
        round_weights(student, {}, [], **traced(images))
    small = quantize(student, Scheme(), [(images,)], **traced(images))
    with pytest.raises(UsageError, match="before the student is quantized"):
        round_adaptively(small, Scheme(), [(images,)], **traced(images))
