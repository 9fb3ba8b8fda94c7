"""Batch norms folded into convolutions: the same answers, fewer numbers, an edit that replays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attar.errors import UsageError
from attar.models.base import models
from attar.share import fold_norms
from attar.student import Student, load_student, save_student
from attar.student.packed import pack_student, packed_size, unpack_student


def lived_in(network: nn.Module, *shape: int) -> nn.Module:
    """Its batch norms have seen something, and are in eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.normal_(1, 0.2)
                part.bias.normal_(0, 0.2)
        for _ in range(3):
            network.train()(torch.randn(8, *shape))
    return network.eval()


@pytest.mark.parametrize("name", ["cifar-resnet8", "cifar-tiny"])
def test_the_network_answers_as_before_and_has_no_norms(name):
    network = lived_in(models.get(name)(3, 10), 3, 16, 16)
    x = torch.randn(4, 3, 16, 16)
    before = network(x)
    norms = [path for path, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)]
    edit = fold_norms(network)
    assert sorted(edit.norms) == sorted(norms)
    assert torch.allclose(network(x), before, atol=1e-4)
    assert not any("running" in name for name in network.state_dict())


def test_a_folded_student_is_saved_packed_and_rebuilt(tiny_net, tmp_path):
    network = lived_in(tiny_net(4), 1, 8, 8)
    plain = packed_size(Student(copy.deepcopy(network)))
    student = Student(network, None, [fold_norms(network)])
    student.check()
    save_student(student, tmp_path / "s")
    loaded = load_student(tmp_path / "s", build=None, module=tiny_net(4))
    packed = pack_student(student)
    unpacked = unpack_student(packed, build=None, module=tiny_net(4))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.module(x), network(x))
    assert torch.equal(unpacked.module(x), network(x))
    assert len(packed) < plain


def test_norms_that_others_read_with_are_left_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
            self.alone = nn.BatchNorm2d(1)

        def forward(self, x):
            y = self.conv(self.alone(x))
            return y + self.norm(y)

    network = lived_in(Twice(), 1, 4, 4)
    assert fold_norms(network).norms == {}


def test_a_broken_promise_is_told(tiny_net):
    network = lived_in(tiny_net(4), 1, 8, 8)
    edit = fold_norms(network)
    network[1] = nn.BatchNorm2d(4)
    assert edit.check(network) == ["1 was folded into 0 and is a batch norm again"]


def test_what_cannot_be_traced_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match=r"torch\.fx can't trace Branching"):
        fold_norms(Branching())
