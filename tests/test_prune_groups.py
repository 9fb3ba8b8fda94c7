"""What must be pruned together: the network without channels answers as the masked one does."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import ExportError
from attar.models.cifar_resnet import CifarResNet
from attar.prune import ChannelGraph, RemovalFailed, channel_graph
from attar.prune.heads import heads_to_free
from attar.prune.labels import NOTHING, Ties, tidy, varying
from attar.prune.removal import removal_of, remove_verified


def lively(module: nn.Module) -> nn.Module:
    """Batch norms as after training, so that a wrong channel shows."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module.eval()


def halve(module: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, ChannelGraph]:
    """The network without a random half of each layer's channels, verified."""
    module = copy.deepcopy(module)
    heads_to_free(module).replay(module)
    graph = channel_graph(module, tuple(x[:1] for x in example))
    free, gone = set(graph.prunable().tolist()), []
    rng = np.random.default_rng(0)
    for place in sorted(graph.producers, key=lambda p: len(p.atoms)):
        mine = sorted(free.intersection(place.atoms.tolist()))
        gone += rng.permutation(mine)[: len(mine) // 2].tolist()
        free.difference_update(mine)
    return remove_verified(module, removal_of(graph, gone), example, graph=graph), graph


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def prunable_layers(graph: ChannelGraph) -> set[str]:
    return {p.layer for p in graph.producers} - graph.kept_whole().keys()


class Flattened(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.PReLU(12), nn.Flatten(), nn.Linear(12 * 16, 16),
            nn.BatchNorm1d(16), nn.Sigmoid(), nn.Linear(16, 5),
        )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.spatial = nn.Conv2d(16, 1, 1)
        self.scale = nn.Parameter(torch.rand(16, 1, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        x = x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * self.spatial(x).sigmoid() * self.scale).amax((2, 3)))


class Branches(nn.Module):
    """Concatenation, chunks, depthwise and grouped convolutions, a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.side = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 64, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.cat([self.stem(x), self.side(x)], 1).relu())
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = self.depthwise(x).chunk(2, 1)
        return self.head(self.up(self.point(a * b.sigmoid()).relu())).mean((2, 3))


class Mixer(nn.Module):
    """A transformer's layer with hidden units, embeddings, positions and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 65, 24))
        self.embed = nn.Conv2d(3, 16, 1)
        self.widen = nn.Linear(16, 24)
        self.block = nn.TransformerEncoderLayer(24, 4, 40, activation="gelu", batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.widen(torch.cat([self.token.expand(len(x), -1, -1), x], 1)) + self.position
        return self.head(self.block(x)[:, 0])


class Recurring(nn.Module):
    """One layer used twice, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(192, 16)
        self.again = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.again.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        return self.head(self.tied(self.again(self.again(x).relu()).relu()))


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (Flattened, {"10"}),
        (SqueezeExcite, {"spatial", "head"}),
        (Branches, {"head"}),
        (Mixer, {"head"}),
        (Recurring, {"head"}),
        (lambda: CifarResNet((2, 2, 2), 3, 5), {"linear"}),
    ],
)  # fmt: skip
def test_the_narrow_network_answers_as_the_masked_one(make, kept):
    torch.manual_seed(0)
    module = lively(make())
    narrow, graph = halve(module, (torch.randn(3, 3, 8, 8),))
    assert set(graph.kept_whole()) == kept
    assert size(narrow) < 0.85 * size(module)
    assert all(
        m.weight.shape[0] == m.out_channels and m.weight.shape[1] == m.in_channels // m.groups
        for m in narrow.modules()
        if isinstance(m, nn.Conv2d)
    )


QUICK = ["resnet18", "squeezenet1_1"]
MORE = [
    "alexnet", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "googlenet",
    "shufflenet_v2_x0_5", "resnext50_32x4d", "regnet_y_400mf", "mnasnet0_5", "inception_v3",
    "vgg11_bn",
]  # fmt: skip
TRANSFORMERS = ["vit_b_16", "swin_t", "convnext_tiny", "maxvit_t"]


@pytest.mark.parametrize(
    "name",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in MORE + TRANSFORMERS)],
)
def test_torchvision(name):
    torch.manual_seed(0)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    module = lively(torchvision.models.get_model(name, weights=None, **extra))
    pixels = {"inception_v3": 299}.get(name, 224 if name in TRANSFORMERS + MORE else 64)
    narrow, graph = halve(module, (torch.randn(2, 3, pixels, pixels),))
    assert size(narrow) < (0.8 if name in TRANSFORMERS else 0.7) * size(module)
    if name not in TRANSFORMERS:
        assert set(graph.kept_whole().values()) == {"its channels are the network's output"}


class Auxiliary(nn.Module):
    """A classifier that only training runs, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.more, self.side = nn.Conv2d(16, 24, 3), nn.Conv2d(16, 12, 3)
        self.drop, self.head, self.aux = nn.Dropout(0.5), nn.Linear(24, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x)
        answer = self.head(self.drop(self.more(x).relu().mean((2, 3))))
        if not self.training:
            return answer
        return answer, self.aux(self.side(x).relu().mean((2, 3)))


def test_a_branch_that_only_training_runs_goes_with_the_rest():
    torch.manual_seed(0)
    module, x = lively(Auxiliary()), torch.randn(4, 3, 8, 8)
    narrow, graph = halve(module, (x,))
    assert set(graph.kept_whole()) == {"head", "aux"}
    assert narrow.side.weight.shape[:2] == (6, 8) and not narrow.training
    answer, aux = narrow.train()(x)
    assert answer.shape == aux.shape == (4, 5)
    with pytest.raises(RemovalFailed):
        aside = removal_of(graph, graph.prunable())
        del aside.removed["side.weight"]
        remove_verified(module, aside, (x,), graph=graph)


def test_removing_a_padded_channel_lowers_the_pad():
    module = lively(CifarResNet((1, 1, 1), 3, 5))
    graph = channel_graph(module, (torch.zeros(1, 3, 8, 8),))
    wide = next(p for p in graph.producers if p.path == "layer2.0.conv2.weight")
    removal = removal_of(graph, wide.atoms[[0, 1, 7, 8, 31]])
    narrow = remove_verified(module, removal, (torch.randn(2, 3, 8, 8),))
    shortcut = narrow.layer2[0].shortcut
    assert (shortcut.before, shortcut.after) == (8 - 3, 8 - 1)
    assert narrow.conv1.out_channels == 16 - 1
    assert narrow.layer2[0].conv2.out_channels == 32 - 5
    assert (module.layer2[0].shortcut.before, module.conv1.out_channels) == (8, 16)


def test_a_wrong_offset_is_noticed():
    module = lively(CifarResNet((1, 1, 1), 3, 5))
    graph = channel_graph(module, (torch.zeros(1, 3, 8, 8),))
    wide = next(p for p in graph.producers if p.path == "layer2.0.conv2.weight")
    removal = removal_of(graph, wide.atoms[[0, 1]])
    counts = removal.attributes["layer2.0.shortcut"]
    counts["after"] = counts.pop("before")  # right shapes, shifted channels
    with pytest.raises(RemovalFailed, match="doesn't answer as the masked one"):
        remove_verified(module, removal, (torch.randn(2, 3, 8, 8),))


def test_what_cannot_be_followed_stays_and_says_why():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
            self.d, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).softmax(-1)
            x = self.b(x)[:, [3, 1, 2] * 5 + [0]]
            x = torch.linalg.matrix_exp(self.c(x).unsqueeze(1) * torch.eye(16))[:, 0]
            return self.head(self.d(x).relu())

    graph = channel_graph(Odd(), (torch.zeros(1, 16),))
    assert prunable_layers(graph) == {"d"}
    why = graph.kept_whole()
    assert "softmax" in why["a"] and "test_prune_groups.py" in why["a"]
    assert "index" in why["b"]
    assert why["c"].startswith("mul ") or "matrix_exp" in why["c"]


def test_counts_are_of_channels():
    graph = channel_graph(lively(CifarResNet((1, 1, 1), 3, 5)), (torch.zeros(1, 3, 8, 8),))
    assert graph.counts() == (16 * 3 + 32 * 2 + 64 * 2, 16 * 3 + 32 * 2 + 64 * 2 + 5)


def test_a_network_that_cannot_be_exported_is_refused_with_its_line():
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"test_prune_groups.py:\d+: return x \+ 1 if"):
        channel_graph(Branching(), (torch.zeros(1, 4),))


def test_tracing_leaves_modes_alone():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    module[1].eval()
    channel_graph(module, (torch.zeros(1, 4),))
    assert [m.training for m in module] == [True, False, True]


pairs = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30)


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_atoms_are_the_finest_partition_that_keeps_ties(pairs):
    ties = Ties()
    ties.slots(20)
    for a, b in pairs:
        ties.tie(torch.tensor([a, NOTHING]), torch.tensor([b, 3]))
    classes = {i: {i} for i in range(20)}
    for a, b in pairs:
        merged = classes[a] | classes[b]
        for i in merged:
            classes[i] = merged
    atoms = ties.atoms()
    assert all((atoms[i] == atoms[j]) == (j in classes[i]) for i in range(20) for j in range(20))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
@settings(max_examples=50, deadline=None)
def test_tidy_labels_are_the_same_labels(shape, data):
    dims = data.draw(st.sets(st.integers(0, len(shape) - 1)))
    small = [n if d in dims else 1 for d, n in enumerate(shape)]
    labels = torch.randint(0, 4, small).expand(shape).clone()
    assert torch.equal(tidy(labels), labels)
    assert set(varying(tidy(labels))) <= dims


@given(st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_any_choice_of_atoms_can_be_removed(seed):
    module, graph = _branches()
    gone = [a for a in graph.prunable() if (seed >> (int(a) % 31)) & 1]
    if any(np.isin(p.atoms, gone).all() for p in graph.producers):
        return  # floors keep layers from vanishing
    remove_verified(module, removal_of(graph, gone), (torch.randn(2, 3, 8, 8),))


@cache
def _branches() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    module = lively(Branches())
    return module, channel_graph(module, (torch.zeros(1, 3, 8, 8),))
