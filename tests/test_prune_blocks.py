"""Whole residual blocks: found where they are, gone for good, and a part of budgets' plans."""

import copy

import pytest
import torch
from torch import Tensor, nn

from attar.errors import CheckpointError, UsageError
from attar.measure.cost import macs
from attar.models.cifar_resnet import CifarResNet
from attar.prune import (
    BlocksRemoved,
    Budget,
    Plan,
    Widths,
    criteria,
    prune_blocks,
    prune_by_plan,
    prune_to_budget,
    prune_weights,
    residual_blocks,
    without_blocks,
)
from attar.prune.exporting import export
from attar.student import Student, load_student, save_student
from attar.student.edits import edit_from
from network_fixture import Encoder

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((3, 2, 2), 3, 10).eval()


class Layer(nn.Module):
    """A transformer's layer, as some libraries write it: a tuple comes back, and the code around it
    asks what kind it is."""

    kind = "full"

    def __init__(self) -> None:
        super().__init__()
        self.attention_type = "full"
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attend = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, mask: object = None, hidden: Tensor | None = None) -> tuple[Tensor]:
        y = self.norm1(hidden)
        hidden = hidden + self.attend(y, y, y, need_weights=False)[0]
        return (hidden + self.mlp(self.norm2(hidden)),)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert layer.attention_type == "full"
            (x,) = layer(None, hidden=x)
        return self.head(x.mean(1))


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


NETS = {"resnet": (resnet, IMAGES), "words": (words, WORDS)}


def never(_: object) -> nn.Module:
    raise AssertionError("the module is handed in")


def blocks_of(net: nn.Module, x: Tensor) -> dict[str, bool]:
    return residual_blocks(net, (x,), export(net, (x[:1],)))


def test_blocks_are_those_that_add_to_their_input():
    assert blocks_of(resnet(), IMAGES) == dict.fromkeys(
        ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer3.1"], False
    )
    assert blocks_of(words(), WORDS) == {f"layers.{i}": True for i in range(4)}


class Others(nn.Module):
    """Modules whose result has their input's shape, and which add nothing to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.plain = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.twice = Twice()
        self.joined = Joined()

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(self.gate(x))
        return self.joined(self.twice(self.twice(y)), x)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.f(x).sigmoid()


class Twice(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Joined(Gate):
    """Adds what it computes to another input than its first."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.f(x) + residual


def test_what_adds_nothing_to_its_input_or_runs_twice_is_no_block():
    assert blocks_of(Others(), WORDS) == {}


def test_of_blocks_within_blocks_those_of_a_list_count_else_the_outermost():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Twice(), Twice()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    net = nn.Sequential(nn.Sequential(Two(), Two()), nn.Linear(12, 3))
    assert list(blocks_of(net, WORDS)) == ["0.0", "0.1"]


@pytest.mark.parametrize("name", NETS)
def test_without_a_block_its_input_goes_on(name, tmp_path):
    make, x = NETS[name]
    net = make()
    blocks = blocks_of(net, x)
    gone = list(blocks)[1]
    student = without_blocks(Student(net), {gone: blocks[gone]})
    wanted = copy.deepcopy(net)
    wrapped = blocks[gone]
    wanted.get_submodule(gone).forward = lambda *a, hidden=None: (hidden,) if wrapped else a[0]
    with torch.no_grad():
        assert torch.equal(student.module(x), wanted(x))
        assert not torch.equal(student.module(x), net(x))
    assert not [n for n, _ in student.module.named_parameters() if n.startswith(f"{gone}.")]
    save_student(student, tmp_path)
    with torch.no_grad():
        assert torch.equal(
            load_student(tmp_path, build=never, module=make()).module(x), student.module(x)
        )


def test_masks_within_a_block_go_with_it():
    sparse = prune_weights(Student(resnet()), criterion=criteria.get("magnitude")(), ratio=0.5)
    student = without_blocks(sparse, {"layer1.1": False})
    (masked,) = student.find("masked")
    assert "layer1.0.conv1.weight" in masked.masks
    assert not [path for path in masked.masks if path.startswith("layer1.1.")]
    student.check()


def answers_moved(net: nn.Module, x: Tensor):
    with torch.no_grad():
        whole = net(x)

    def lost(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(x) - whole).square().mean())

    return lost


@pytest.mark.parametrize("name", NETS)
def test_the_block_that_matters_least_goes_first(name):
    make, x = NETS[name]
    net = make()
    with torch.no_grad():  # one block that does next to nothing
        idle = list(blocks_of(net, x))[2]
        for path, parameter in net.get_submodule(idle).named_parameters():
            if path.startswith(("bn2", "attend.out_proj", "mlp.2")):
                parameter *= 1e-3
    student, gone = prune_blocks(Student(net), (x,), ratio=0.45, lost=answers_moved(net, x))
    assert gone[0] == idle and len(gone) == 2
    assert [e.kind for e in student.edits] == ["blocks-removed"] * 2
    again, more = prune_blocks(student, (x,), ratio=0.7, lost=answers_moved(net, x), before=2)
    assert len(gone) + len(more) == round(0.7 * len(blocks_of(net, x)))
    assert len(blocks_of(again.module, x)) >= 1


def test_excluded_blocks_stay():
    net = resnet()
    _, gone = prune_blocks(
        Student(net), (IMAGES,), ratio=0.9, lost=lambda m: 0.0, exclude=["layer1", "layer2.1.conv1"]
    )
    assert gone == []  # one stays
    with pytest.raises(UsageError, match="exclude: no layer matches 'layr1'"):
        prune_blocks(Student(net), (IMAGES,), ratio=0.5, lost=lambda m: 0.0, exclude=["layr1"])


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UsageError, match="no residual block that could go"):
        prune_blocks(Student(Encoder()), (torch.randn(2, 1, 8, 8),), ratio=0.5, lost=lambda m: 0.0)
    with pytest.raises(UsageError, match="lies between 0 and 1"):
        prune_blocks(Student(resnet()), (IMAGES,), ratio=1.0, lost=lambda m: 0.0)


# --- in a budget's plan


def to_budget(net: nn.Module, x: Tensor, share: float, lost, **options):
    def cost(student: Student) -> float:
        return macs(student.module, (x,))

    budget = Budget("macs", share * macs(net, (x,)), cost, lambda all_: {s: s.macs for s in all_})
    return prune_to_budget(
        Student(net),
        (x,),
        criterion=criteria.get("magnitude")(),
        budget=budget,
        lost=lost,
        widths=Widths(2, 1),
        **options,
    )


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.75, 0.4])
def test_blocks_that_do_nothing_go_before_channels(name, share, tmp_path):
    make, x = NETS[name]
    net = make()
    idle = list(blocks_of(net, x))[1:3]
    with torch.no_grad():
        for block in idle:
            for path, parameter in net.get_submodule(block).named_parameters():
                if path.startswith(("bn2", "attend.out_proj", "mlp.2")):
                    parameter *= 1e-4
    student, said, plan = to_budget(net, x, share, answers_moved(net, x))
    assert macs(student.module, (x,)) <= share * macs(net, (x,))
    assert set(idle) & {block.path for block in plan.blocks}
    assert said.blocks == [block.path for block in plan.blocks]
    assert all(b.saves > 0 and b.lost >= 0 for b in plan.blocks)
    named = [layer for part in plan.parts for layer in part.layers]
    assert not [n for n in named if n.startswith(tuple(f"{b.path}." for b in plan.blocks))]
    again, _ = prune_by_plan(Student(net), (x,), Plan.from_json(plan.to_json()))
    with torch.no_grad():
        assert torch.equal(again.module(x), student.module(x))
    save_student(student, tmp_path)
    with torch.no_grad():
        assert torch.equal(
            load_student(tmp_path, build=never, module=make()).module(x), student.module(x)
        )


def test_the_model_of_costs_is_exact_without_blocks():
    """What a plan says it saves adds up to what the smaller network costs."""
    net = resnet()
    student, _, plan = to_budget(net, IMAGES, 0.75, answers_moved(net, IMAGES))
    if not plan.parts:
        saved = sum(block.saves for block in plan.blocks)
        left = macs(student.module, (IMAGES,)) / macs(net, (IMAGES,))
        assert 1 - saved == pytest.approx(left, abs=1e-6)
    only = [{"path": "layer2.1", "lost": 0.0, "saves": 0.0}]
    edited = Plan.from_json({**plan.to_json(), "parts": [], "blocks": only})
    shallow, _ = prune_by_plan(Student(net), (IMAGES,), edited)
    assert list(blocks_of(shallow.module, IMAGES)) == [
        "layer1.0",
        "layer1.1",
        "layer1.2",
        "layer3.1",
    ]


def test_depth_can_be_left_alone():
    net = resnet()
    for options in ({"depth": False, "lost": answers_moved(net, IMAGES)}, {"lost": None}):
        lost = options.pop("lost")
        _, said, plan = to_budget(net, IMAGES, 0.6, lost, **options)
        assert plan.blocks == [] and said.blocks == []


def test_excluded_layers_keep_their_block():
    net = resnet()
    _, _, plan = to_budget(net, IMAGES, 0.6, lambda m: 0.0, exclude=["layer1"])
    assert not [b for b in plan.blocks if b.path.startswith("layer1")]


def test_a_plan_of_another_networks_blocks_is_refused():
    net = resnet()
    *_, plan = to_budget(net, IMAGES, 0.6, answers_moved(net, IMAGES))
    wrong = Plan.from_json(
        {**plan.to_json(), "blocks": [{"path": "layer2.0", "lost": 0.0, "saves": 0.0}]}
    )
    with pytest.raises(UsageError, match=r"takes out layer2.0, which is no residual block"):
        prune_by_plan(Student(net), (IMAGES,), wrong)


def test_damaged_records_are_refused():
    for record in ({}, {"blocks": ["layer1.0"]}):
        with pytest.raises(CheckpointError, match="removed blocks is damaged"):
            edit_from({"kind": "blocks-removed", **record}, {})
    with pytest.raises(CheckpointError, match="taken out at layer9"):
        BlocksRemoved({"layer9": False}).replay(resnet())
