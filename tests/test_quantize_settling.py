"""int8 students' weights on their grids: the same graph, and integers in the packed file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import UsageError
from attar.prune import Masked, criteria, prune_weights
from attar.quantize import (
    Scheme,
    quantize,
    quantize_dynamically,
    quantized_reference,
    settle_weights,
)
from attar.quantize.bias_correction import correct_biases
from attar.runtimes.aten import constant
from attar.share import share_weights
from attar.student import Student, load_student, save_student
from attar.student.packed import pack_student, packed, packed_size, unpack_student
from network_fixture import Encoder
from runtime_fixture import same_class
from test_quantize import Excited, Network, Pooled, Twice
from test_quantize import student_of as with_norms

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRACED: dict[str, Any] = {"example": (IMAGES[:2],), "dynamic_shapes": SHAPES}


class Tied(nn.Module):
    """Words' vectors that the last layer has for weights, too, and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.words((x.abs() * 9).long().flatten(1)).mean(1))))


class Borrowing(nn.Module):
    """A layer whose weight is made from another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        return self.head(F.relu(F.linear(x, self.first.weight * 2)))


NETWORKS = [Network, Pooled, Excited, Twice, Encoder, Tied, Borrowing]
LINEAR = [network for network in NETWORKS if network is not Twice]


def student_of(network: type[nn.Module]) -> Student:
    """With batch norms that have learned something, one channel of them nothing."""
    student = with_norms(network)
    for norm in student.module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.num_features > 1:
            nn.init.zeros_(norm.weight[:1])
    return student


def static(student: Student, bits: int = 8, **scheme: Any) -> Student:
    return quantize(student, Scheme(weight_bits=bits, **scheme), [(IMAGES,)], **TRACED)


def dynamic(student: Student, bits: int = 8) -> Student:
    return quantize_dynamically(student, weight_bits=bits, **TRACED)


def answers(student: Student) -> Tensor:
    graph = quantized_reference(student.edits, student.module, (IMAGES[:2],), SHAPES)
    assert graph is not None
    with torch.no_grad():
        found: Tensor = graph(IMAGES)
    return found


def constants(student: Student) -> dict[str, Tensor]:
    graph = quantized_reference(student.edits, student.module, (IMAGES[:2],), SHAPES)
    assert graph is not None
    return {str(n.target): constant(graph, n) for n in graph.graph.nodes if n.op == "get_attr"}


def layers(student: Student) -> dict[str, int]:
    """The weights of convolutions and linear layers, and how many numbers are in each."""
    parameters = student.module.named_parameters()
    return {path: each.numel() for path, each in parameters if each.dim() > 1}


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(
    ("network", "way"), [*((n, static) for n in NETWORKS), *((n, dynamic) for n in LINEAR)]
)
def test_the_graph_stays_the_same(network, way, bits):
    quantized = way(student_of(network), bits)
    before = {k: v.clone() for k, v in quantized.module.state_dict().items()}
    settled = settle_weights(quantized, **TRACED)
    assert torch.equal(answers(settled), answers(quantized))
    one, other = constants(settled), constants(quantized)
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    settled.check()
    now = quantized.module.state_dict()
    assert all(torch.equal(before[k], now[k]) for k in before)
    assert list(settled.module.state_dict()) == list(before)


@pytest.mark.parametrize(
    ("network", "way", "left"),
    [
        (Network, static, set()),
        (Network, dynamic, {"stem.weight", "deep.weight", "wide.weight"}),
        (Pooled, static, set()),
        (Excited, static, set()),
        (Twice, static, {"conv.weight"}),
        (Encoder, static, set()),
        (Encoder, dynamic, set()),
        (Borrowing, static, {"first.weight"}),
        (Borrowing, dynamic, {"first.weight"}),
        (Tied, static, {"words.weight"}),
        (Tied, dynamic, {"words.weight"}),
    ],
)
def test_each_weight_of_its_own_is_packed_as_integers(network, way, left):
    settled = settle_weights(way(student_of(network)), **TRACED)
    stored = packed(settled).tensors
    floats = {p for p in layers(settled) if stored[p].form not in ("rows", "sparse")}
    assert floats == left
    for path, count in layers(settled).items():
        if path not in floats:
            rows = len(settled.module.get_parameter(path))
            assert stored[path].bits < 16 * count + 32 * rows


@pytest.mark.parametrize("way", [static, dynamic])
@pytest.mark.parametrize("network", [Network, Encoder])
def test_it_comes_back_from_a_folder_and_from_a_file(network, way, tmp_path):
    settled = settle_weights(way(student_of(network)), **TRACED)
    save_student(settled, tmp_path)
    loaded = load_student(tmp_path, build=same_class, module=network())
    unpacked = unpack_student(pack_student(loaded), build=same_class, module=network())
    for back in (loaded, unpacked):
        back.check()
        assert torch.equal(answers(back), answers(settled))
        assert pack_student(back) == pack_student(settled)


def test_settled_students_settle_to_themselves():
    settled = settle_weights(static(student_of(Network)), **TRACED)
    assert pack_student(settle_weights(settled, **TRACED)) == pack_student(settled)


def test_a_file_takes_a_third_of_what_it_took():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip
    quantized = static(Student(net.eval()))
    assert 3 * packed_size(settle_weights(quantized, **TRACED)) < packed_size(quantized)


def test_pruned_weights_stay_zero():
    magnitude = criteria.get("magnitude")()
    student = prune_weights(student_of(Network), criterion=magnitude, ratio=0.6)
    settled = settle_weights(static(student), **TRACED)
    assert settled.find(Masked)
    settled.check()
    assert torch.equal(answers(settled), answers(static(student)))


def test_shared_weights_stay_as_they_are():
    student = student_of(Network)
    edit, _ = share_weights(student.module, values=8)
    student = student.edited(edit)
    quantized = static(student)
    settled = settle_weights(quantized, **TRACED)
    shared = edit.per_tensor_weights()
    assert shared
    for path in shared:
        assert torch.equal(settled.module.get_parameter(path), quantized.module.get_parameter(path))
    settled.check()


def test_corrected_biases_and_float_layers_are_kept():
    quantized = static(student_of(Network), float_layers=("wide",))
    quantized, _ = correct_biases(quantized, [(IMAGES,)], **TRACED)
    settled = settle_weights(quantized, **TRACED)
    assert settled.edits[-1].biases.keys() == quantized.edits[-1].biases.keys()
    assert torch.equal(answers(settled), answers(quantized))
    assert packed(settled).tensors["wide.weight"].form == "rows"


def test_a_float_student_has_no_grids():
    with pytest.raises(UsageError, match="only an int8 student's weights"):
        settle_weights(student_of(Network), **TRACED)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_weights_of_any_size_are_rounded_to_the_same_integers(seed, size, norm):
    draw = torch.Generator().manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)] if norm else [nn.Conv2d(1, 3, 3)]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for each in net.parameters():
            each.copy_(torch.randn(each.shape, generator=draw))
        net[0].weight *= size
    quantized = static(Student(net))
    settled = settle_weights(quantized, **TRACED)
    assert list(settled.edits[-1].steps) == ["0.weight"]
    assert torch.equal(answers(settled), answers(quantized))
