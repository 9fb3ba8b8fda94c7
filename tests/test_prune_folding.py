"""Layers that compute their weight: folded into plain ones with the same answers, then pruned."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from attar.errors import CheckpointError
from attar.prune import criteria, prune_channels, prune_weights
from attar.prune.folding import WeightsFolded, with_plain_weights
from attar.student import Student, load_student, save_student
from attar.student.edits import edit_from

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """Weight standardisation with a gain, as normaliser-free networks have it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Padded(Standardised):
    """Does more than applying a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = parametrizations.weight_norm(nn.Linear(12, 32))
        self.down = parametrizations.spectral_norm(nn.Linear(32, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Standardised(3, 16, 3, padding=1), nn.ReLU(),
        Standardised(16, 16, 3, stride=2, groups=2, bias=False), nn.ReLU(),
        Standardised(16, 32, 3, padding="same"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def tokens() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


NETS = {"convolutions": (convolutions, IMAGES), "tokens": (tokens, WORDS)}


def never(_: object) -> nn.Module:
    raise AssertionError("the module is handed in")


@pytest.mark.parametrize("name", NETS)
def test_folded_layers_answer_alike_and_are_plain(name):
    make, x = NETS[name]
    net = make()
    plain, folded = with_plain_weights(net, (x,))
    assert folded.layers == (("0", "2", "4") if name == "convolutions" else ("up", "down"))
    kinds = {type(plain.get_submodule(path)) for path in folded.layers}
    assert kinds == {nn.Conv2d if name == "convolutions" else nn.Linear}
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x))


@pytest.mark.parametrize("name", NETS)
def test_computed_weights_lose_channels(name, tmp_path):
    make, x = NETS[name]
    net = make()
    student, said = prune_channels(
        Student(net), (x,), criterion=criteria.get("magnitude")(), ratio=0.5
    )
    first = "0" if name == "convolutions" else "up"
    before, after = said.widths[first]
    assert after == before // 2
    assert [e.kind for e in student.edits] == ["weights-folded", "channels-removed"]
    save_student(student, tmp_path)
    with torch.no_grad():
        again = load_student(tmp_path, build=never, module=make())
        assert torch.equal(again.module.eval()(x), student.module(x))


def test_what_is_plain_or_does_more_stays():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Padded(8, 8, 3), nn.Flatten()).eval()
    same, folded = with_plain_weights(net, (IMAGES,))
    assert same is net and not folded


def test_a_subclass_that_applies_its_own_weight_stays():
    class Named(nn.Linear):
        pass

    net = nn.Sequential(Named(12, 8), nn.ReLU(), nn.Linear(8, 3))
    assert with_plain_weights(net, (WORDS,))[0] is net


def test_masks_of_what_a_folded_weight_was_computed_from_go():
    sparse = prune_weights(
        Student(convolutions()), criterion=criteria.get("magnitude")(), ratio=0.5
    )
    narrow, _ = prune_channels(sparse, (IMAGES,), criterion=criteria.get("magnitude")(), ratio=0.5)
    (masked,) = narrow.find("masked")
    assert list(masked.masks) == ["8.weight"]
    narrow.check()


def test_records_that_are_damaged_or_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="folded weights is damaged"):
        edit_from({"kind": "weights-folded"}, {})
    with pytest.raises(CheckpointError, match="folded in 8, which computes no weight here"):
        WeightsFolded(("8",)).replay(copy.deepcopy(convolutions()))
