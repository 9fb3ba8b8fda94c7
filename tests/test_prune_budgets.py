"""Pruning to a budget: kept, at the least loss; the plan read, edited and replayed."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attar.errors import UsageError
from attar.measure.cost import macs, parameters
from attar.models.cifar_resnet import CifarResNet
from attar.planning.layers import shapes_of
from attar.planning.solver import cost_of
from attar.prune import Widths, channel_graph, criteria
from attar.prune.budgets import Budget, prune_to_budget
from attar.prune.costs import costs, layers, tensors
from attar.prune.plan import Part, Plan, prune_by_plan, readable
from attar.prune.removal import removal_of
from attar.student import Student

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((1, 1, 1), 3, 5).eval()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 32), nn.Linear(32, 5)
        self.block = nn.TransformerEncoderLayer(32, 4, 96, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


class Joined(nn.Module):
    """Layers that read what several others make."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, n, 3, padding=1) for n in (16, 24, 32))
        self.join, self.deep = nn.Conv2d(72, 48, 1), nn.Conv2d(48, 48, 3, groups=48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(torch.cat([self.a(x), self.b(x), self.c(x)], 1).relu()).relu()
        return self.head(self.deep(x).mean((2, 3)))


def joined() -> nn.Module:
    torch.manual_seed(0)
    return Joined().eval()


NETS = {"resnet": (resnet, IMAGES), "encoder": (encoder, WORDS), "joined": (joined, IMAGES)}


def budget(unit: str, limit: float, x: Tensor) -> Budget:
    if unit == "macs":
        return Budget(
            "macs", limit, lambda s: macs(s.module, (x,)), lambda all_: {s: s.macs for s in all_}
        )
    return Budget("parameters", limit, lambda s: parameters(s.module))


def whole(unit: str, net: nn.Module, x: Tensor) -> float:
    return budget(unit, 1, x).measure(Student(net))


def pruned(net: nn.Module, x: Tensor, unit: str, limit: float, **options):
    criterion = criteria.get("magnitude")()
    return prune_to_budget(
        Student(net), (x,), criterion=criterion, budget=budget(unit, limit, x), **options
    )


@pytest.mark.parametrize("unit", ["macs", "parameters"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_the_budget_is_kept_and_used(unit, name, share):
    make, x = NETS[name]
    net = make()
    before = whole(unit, net, x)
    student, _, plan = pruned(net, x, unit, share * before)
    after = whole(unit, student.module, x)
    assert 0.8 * share * before < after <= share * before
    assert (plan.before, plan.after, plan.limit) == (before, after, share * before)
    assert plan.parts and all(part.lost >= 0 and part.saves > 0 for part in plan.parts)


@pytest.mark.parametrize("name", NETS)
def test_the_model_of_costs_is_exact_where_a_layer_hangs_on_two_parts(name):
    make, x = NETS[name]
    net = make()
    graph = channel_graph(net, (x[:1],))
    shapes = shapes_of(net, (x[:1],))
    rng = np.random.default_rng(0)
    families = graph.families()
    parts = [
        [np.empty(0, np.int64), *(np.sort(rng.permutation(f)[: len(f) * n // 4]) for n in (1, 2))]
        for f in families
    ]
    for pieces, price, measure in [
        (layers(graph, shapes), lambda all_: {s: s.macs for s in all_},
         lambda m: sum(s.macs for s in shapes_of(m, (x[:1],)).values())),
        (tensors(graph, net), lambda all_: {n: n for n in all_}, parameters),
    ]:  # fmt: skip
        terms, fixed = costs(pieces, parts, price)
        for chosen in ([0] * len(parts), [1] * len(parts), rng.integers(0, 3, len(parts))):
            gone = np.concatenate([options[i] for options, i in zip(parts, chosen, strict=True)])
            narrow = make()
            removal_of(graph, gone).replay(narrow)
            wanted, said = measure(narrow), fixed + cost_of(list(chosen), terms)
            assert said == pytest.approx(wanted, rel=0.1 if name == "joined" else 1e-9)


def test_what_loses_much_stays_and_what_costs_little_to_keep_stays():
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()
    x = torch.randn(2, 64)

    def lost(narrow: nn.Module) -> float:
        return 100.0 * (64 - narrow[0].out_features) + 0.1 * (64 - narrow[2].out_features)

    _, said, plan = pruned(net, x, "parameters", 0.7 * parameters(net), lost=lost)
    assert said.widths["0"] == (64, 64) and said.widths["2"][1] < 32
    assert [part.layers for part in plan.parts] == [["2"]]
    assert plan.parts[0].lost == pytest.approx(0.1 * (64 - said.widths["2"][1]), rel=0.1)


def test_the_channels_that_matter_least_go():
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        net[0].weight[::2] *= 0.01
        net[2].weight[:, ::2] *= 0.01
    student, _, plan = pruned(net, torch.randn(2, 8), "parameters", 0.6 * parameters(net))
    (part,) = plan.parts
    assert all(i % 2 == 0 for i in part.removed["0"])
    kept = [i for i in range(32) if i not in part.removed["0"]]
    assert torch.equal(student.module[0].weight, net[0].weight[kept])


def test_a_budget_below_every_plan_says_how_far_one_gets():
    net = resnet()
    with pytest.raises(UsageError, match=r"below what any plan reaches: .* found takes \d+"):
        pruned(net, IMAGES, "parameters", 100, widths=Widths(8, 1))


def test_a_budget_that_measurements_miss_is_not_called_out_of_reach():
    net = resnet()
    least = whole("macs", net, IMAGES) * 0.7

    def measure(student: Student) -> float:  # always a little more than what is allowed
        return max(whole("macs", student.module, IMAGES), 1.001 * least)

    missed = Budget("latency_ms", least, measure, lambda all_: {s: s.macs for s in all_})
    with pytest.raises(UsageError, match="was not met in 6 plans, of which the last took"):
        prune_to_budget(
            Student(net), (IMAGES,), criterion=criteria.get("magnitude")(), budget=missed
        )


def test_a_budget_that_is_kept_already_is_refused():
    with pytest.raises(UsageError, match="asks for no pruning: the network takes"):
        pruned(resnet(), IMAGES, "macs", 1e12)


def test_excluded_layers_stay():
    net = joined()
    _, said, plan = pruned(net, IMAGES, "macs", 0.7 * whole("macs", net, IMAGES), exclude=["c"])
    assert said.widths["c"] == (32, 32) and "c" not in {k for p in plan.parts for k in p.removed}
    assert "excluded" in plan.kept["c"]


# --- the plan


@pytest.fixture
def planned(tmp_path):
    net = joined()
    student, _, plan = pruned(net, IMAGES, "macs", 0.5 * whole("macs", net, IMAGES))
    path = tmp_path / "plan.json"
    path.write_text(readable(plan.to_json()))
    return student, plan, path


def test_a_plan_replays(planned):
    student, plan, path = planned
    assert Plan.read(path) == plan
    again, said = prune_by_plan(Student(joined()), (IMAGES,), Plan.read(path))
    assert torch.equal(again.module(IMAGES), student.module(IMAGES))
    assert {k: v for k, v in said.widths.items() if v[0] != v[1]} == {
        k: v for part in plan.parts for k, v in part.widths.items()
    }


def test_a_plan_is_readable(planned):
    _, plan, path = planned
    text = path.read_text()
    channels = next(iter(plan.parts[0].removed.values()))
    assert str(channels) in text  # in one line
    assert json.loads(text) == json.loads(json.dumps(plan.to_json()))


def test_an_edited_plan_does_what_it_says(planned):
    _, _, path = planned
    record = json.loads(path.read_text())
    record["parts"] = [{**record["parts"][0], "layers": ["a"], "removed": {"a": [3, 5]}}]
    path.write_text(json.dumps(record))
    student, said = prune_by_plan(Student(joined()), (IMAGES,), Plan.read(path))
    assert said.widths["a"] == (16, 14) and student.module.join.in_channels == 70


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ({"z": [1]}, "channels of z, which the network lacks"),
        ({"a": [16]}, "channel 16 of a, which has 16, numbered from 0"),
        ({"head": [1]}, "channels of head that must stay: its channels are the network's output"),
        ({"a": list(range(16))}, "no channel of a"),
    ],
)
def test_a_plan_of_another_network_is_refused(planned, removed, said):
    _, plan, _ = planned
    part = Part(["a"], {}, removed, 0.0, 0.0)
    with pytest.raises(UsageError, match=said):
        prune_by_plan(Student(joined()), (IMAGES,), replace(plan, parts=[part]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "parts": [1]}'])
def test_what_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is no plan of channels"):
        Plan.read(path)
    with pytest.raises(UsageError, match="can't be read"):
        Plan.read(tmp_path / "none.json")


@pytest.mark.parametrize("unit", ["macs", "parameters"])
def test_a_plan_says_what_each_layer_costs(unit):
    net = resnet()
    whole_cost = whole(unit, net, IMAGES)
    student, _, plan = pruned(net, IMAGES, unit, 0.5 * whole_cost)
    before, after = (sum(cost[i] for cost in plan.costs.values()) for i in (0, 1))
    assert before == whole_cost
    assert after == pytest.approx(whole(unit, student.module, IMAGES), rel=1e-9)
    assert Plan.from_json(plan.to_json()).costs == plan.costs


class Wide(nn.Module):
    """A layer that the code wants as wide as it was written, which no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if len(self.b.weight) != 32:
            raise ValueError("b is no longer 32 wide")
        return self.head(self.b(y).relu())


def test_a_part_that_the_network_does_not_run_without_stays():
    torch.manual_seed(0)
    net, x = Wide().eval(), torch.randn(4, 12)
    for lost in (None, lambda m: m(x).square().mean().item()):
        student, said, plan = pruned(net, x, "parameters", 0.8 * parameters(net), lost=lost)
        assert student.module.b.out_features == 32 and student.module.a.out_features < 32
        assert "b is no longer 32 wide" in said.undone["b"] and "b" in plan.kept
        assert [part.layers for part in plan.parts] == [["a"]]


def test_losses_that_are_no_numbers_keep_a_part_whole():
    net = resnet()

    def lost(narrow: nn.Module) -> float:
        return math.nan if narrow.layer1[0].conv1.out_channels < 16 else 0.0

    _, said, plan = pruned(net, IMAGES, "macs", 0.8 * whole("macs", net, IMAGES), lost=lost)
    assert said.widths["layer1.0.conv1"] == (16, 16) and plan.parts
    assert "gives no numbers" in plan.kept["layer1.0.conv1"]
