"""Pruning and training together: penalties before the cut, zeros that move, tickets, recovery."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from attar.errors import UsageError
from attar.models import build, resolve
from attar.models.cifar_resnet import CifarResNet
from attar.prune import BlocksRemoved, Masked, channel_graph, criteria, prune_channels
from attar.prune.penalty import GroupLasso, Growing, going, redone
from attar.prune.regrowth import Regrowing
from attar.prune.weights import prune_weights
from attar.stages.base import Context
from attar.stages.prune import Prune
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import Objective, TaskObjective
from network_fixture import Encoder
from run_fixture import stops_after

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
ROWS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return build(resolve("digits-small", channels=1, classes=10, shape=(1, 8, 8)))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((2, 2, 1), 3, 10).eval()


NETS = {"encoder": (encoder, ROWS), "resnet": (resnet, IMAGES)}


class Nothing(Objective):
    """A loss that asks for nothing."""

    def forward(self, model: nn.Module, batch: object) -> dict[str, Tensor]:
        return {"task": torch.zeros(())}


def narrow(net: nn.Module, x: Tensor) -> Student:
    magnitude = criteria.get("magnitude")()
    return prune_channels(Student(net), (x,), criterion=magnitude, ratio=0.5)[0]


# --- before the cut


@pytest.mark.parametrize("name", NETS)
def test_the_growing_penalty_is_half_its_strength_times_the_squares_of_what_goes(name):
    make, x = NETS[name]
    net = make()
    chosen = narrow(net, x)
    goes = going(net, chosen.edits)
    (removed,) = (e.removed for e in chosen.edits if e.kind == "channels-removed")
    squares = 0.0
    for path, weight in net.named_parameters():
        kept = weight.detach().double().clone()
        for d, indices in removed.get(path, {}).items():
            kept.index_fill_(d, torch.tensor(indices), 0.0)
        squares += float((weight.detach().double() ** 2 - kept**2).sum())
    objective = Growing(Nothing(), goes, strength=0.3, steps=10)
    for epoch in range(2):
        objective.start_epoch(epoch, 2)
        for step in range(10):
            (penalty,) = (v for k, v in objective(net, None).items() if k == "penalty")
            share = (10 * epoch + step + 1) / 20
            assert penalty.item() == pytest.approx(0.15 * share * squares, rel=1e-5)
    penalty.backward()
    for path, weight in net.named_parameters():
        if path in goes:
            wanted = 0.3 * weight.detach() * goes[path]
            torch.testing.assert_close(weight.grad, wanted)
        else:
            assert weight.grad is None


def test_blocks_and_weights_that_go_are_penalised_too():
    net = resnet()
    masked = prune_weights(Student(net), criterion=criteria.get("magnitude")(), ratio=0.25)
    goes = going(net, [BlocksRemoved({"layer1.0": False}), *masked.edits])
    assert all(goes[f"layer1.0.{p}"].all() for p, _ in net.layer1[0].named_parameters())
    mask = masked.edits[0].masks["layer2.0.conv1.weight"]
    assert torch.equal(goes["layer2.0.conv1.weight"], ~mask)


@pytest.mark.parametrize("name", NETS)
def test_the_group_lasso_is_the_norms_of_what_would_go_together(name):
    make, x = NETS[name]
    net = make()
    graph = channel_graph(net, (x[:1],))
    weights = dict(net.named_parameters())
    wanted = 0.0
    for atom in graph.prunable():
        parts = [
            weights[p.path].detach().double().movedim(p.at, 0)[torch.from_numpy(p.atoms == atom)]
            for p in graph.places
            if isinstance(p.at, int) and p.path in weights
        ]
        wanted += math.sqrt(sum(float(part.square().sum()) for part in parts))
    objective = GroupLasso(Nothing(), graph, strength=0.2)
    penalty = objective(net, None)["penalty"]
    assert penalty.item() == pytest.approx(0.2 * wanted, rel=1e-4)
    penalty.backward()


@pytest.mark.parametrize("name", NETS)
def test_what_was_done_to_one_network_is_done_to_another(name):
    make, x = NETS[name]
    net = make()
    chosen = narrow(net, x)
    with torch.no_grad():
        again = redone(Student(net), chosen)
        assert torch.equal(again.module(x), chosen.module(x))
        other = copy.deepcopy(net)
        for parameter in other.parameters():
            parameter += 0.1
        moved = redone(Student(other), chosen)
    widths = {n: p.shape for n, p in chosen.module.named_parameters()}
    assert {n: p.shape for n, p in moved.module.named_parameters()} == widths
    assert [e.kind for e in moved.edits] == [e.kind for e in chosen.edits]


# --- zeros that move


def sparse(net: nn.Module) -> Masked:
    (masked,) = prune_weights(Student(net), criterion=criteria.get("magnitude")(), ratio=0.6).edits
    return masked


@pytest.mark.parametrize("name", NETS)
def test_the_smallest_go_and_the_steepest_grow(name):
    make, _ = NETS[name]
    net = make()
    masked = sparse(net)
    masked.after_step(net)
    moving = Regrowing(masked, share=0.4, every=1, until=1.0, steps=4, epochs=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = {p: (net.get_parameter(p).detach().clone(), m) for p, m in masked.masks.items()}
    slopes = {p: net.get_parameter(p).grad.clone() for p in before}
    moving.before_step(net)
    share = 0.5 * 0.4 * (1 + math.cos(math.pi / 4))
    for path, (weight, mask) in before.items():
        now, left = moving.masks[path], int(mask.sum())
        count = min(int(share * left), mask.numel() - left)
        assert int(now.sum()) == left and int((mask & ~now).sum()) == count
        gone = weight[mask & ~now].abs()
        assert not count or gone.max() <= weight[mask & now].abs().min()
        grown, still = ~mask & now, ~mask & ~now
        if count and still.any():
            assert slopes[path].abs()[grown].min() >= slopes[path].abs()[still].max()
        assert not net.get_parameter(path).detach()[grown | ~now].any()
        assert not net.get_parameter(path).grad[~now].any(), "what is masked is not trained"
        assert net.get_parameter(path).grad[grown].all()


def test_nothing_moves_between_changes_or_after_the_last():
    net = encoder()
    masked = sparse(net)
    moving = Regrowing(masked, share=0.4, every=3, until=0.5, steps=12, epochs=1)
    generator, seen = torch.Generator().manual_seed(1), []
    for _ in range(12):
        before = {p: m.clone() for p, m in moving.masks.items()}
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        moving.before_step(net)
        seen.append(any(not torch.equal(before[p], m) for p, m in moving.masks.items()))
    assert seen == [i in (3,) for i in range(1, 13)]


@pytest.fixture
def run(digits, tmp_path) -> Context:
    return Context(task=TASK, data=digits, teacher=None, seed=1, work=tmp_path)


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    net = small()
    training = Training(epochs=4, **FAST)
    train(net, data=digits, task=TASK, training=training, objective=TaskObjective(TASK))
    return net


REGROW = {
    "granularity": "weight", "ratio": 0.8, "schedule": {"regrow": 0.3, "every": 4},
    "recover": {"epochs": 4, **FAST},
}  # fmt: skip


def test_zeros_move_in_a_stage_and_are_kept_afterwards(run, trained):
    still = Prune(**{**REGROW, "schedule": "one-shot"}).apply(
        Student(copy.deepcopy(trained)), run.at("still")
    )
    moved = Prune(**REGROW).apply(Student(copy.deepcopy(trained)), run.at("moved"))
    moved.check()
    (before,), (after,) = (s.find("masked") for s in (still, moved))
    assert type(after) is Masked
    for path, mask in after.masks.items():
        assert 0.95 * int(before.masks[path].sum()) <= int(mask.sum())
        assert int(mask.sum()) <= int(before.masks[path].sum())
    assert any(not torch.equal(before.masks[p], m) for p, m in after.masks.items())
    assert run.evaluate(moved.module) > 0.5


def test_a_training_too_short_for_zeros_to_move_is_refused(run, trained):
    with pytest.raises(UsageError, match=r"nothing would move: .* give a smaller every"):
        Prune(**{**REGROW, "schedule": {"regrow": 0.3}}).apply(Student(trained), run)


def weights_of(student: Student) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in student.module.state_dict().items()}


@pytest.mark.parametrize(
    "fields",
    [
        REGROW,
        {"granularity": "weight", "ratio": 0.8, "schedule": {"rewind": 2},
         "recover": {"epochs": 2, **FAST}},
        {"ratio": 0.5, "floor": 2, "round_to": 1, "regularise": {"epochs": 2},
         "recover": {"epochs": 1, **FAST}},
    ],
    ids=["regrow", "rewind", "regularise"],
)  # fmt: skip
def test_an_interrupted_stage_ends_as_an_undisturbed_one(run, trained, fields):
    stage = Prune(**fields)
    whole = weights_of(stage.apply(Student(copy.deepcopy(trained)), run.at("whole")))
    torch.manual_seed(99)
    disturbed = run.at("disturbed")
    label = "train 2 of 3" if "rewind" in str(fields) else None
    for epoch in (1, 2) if label is None else (1,):
        with pytest.raises(KeyboardInterrupt):
            listener = stops_after(epoch, label)
            stage.apply(Student(copy.deepcopy(trained)), replace(disturbed, tell=listener))
    again = weights_of(stage.apply(Student(copy.deepcopy(trained)), disturbed))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


# --- tickets


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_ticket_starts_from_early_weights(run, granularity, monkeypatch):
    """Of three trainings, the later two begin with what the first one had after one epoch."""
    seen: list[tuple[str, int, dict[str, Tensor]]] = []
    original = Context.train

    def watched(self, student, training, objective=None, *, on_epoch=None, label, **rest):
        def note(module: nn.Module, epoch: int) -> None:
            seen.append((label, epoch, {k: v.clone() for k, v in module.state_dict().items()}))
            if on_epoch is not None:
                on_epoch(module, epoch)

        hears = on_epoch if objective is None else note  # what has none calls itself with one
        return original(self, student, training, objective, label=label, on_epoch=hears, **rest)

    monkeypatch.setattr(Context, "train", watched)
    student = Student(small())
    stage = Prune(
        granularity=granularity, ratio=0.75, floor=2, round_to=1,
        schedule={"rewind": 2, "to": 1}, recover={"epochs": 2, **FAST},
    )  # fmt: skip
    pruned = stage.apply(student, run)
    assert [(label, epoch) for label, epoch, _ in seen] == [
        (f"train {n} of 3", epoch) for n in (1, 2, 3) for epoch in (0, 1)
    ]
    early = seen[1][2]
    for place, left in ((2, 0.5), (4, 0.25)):
        start = seen[place][2]
        for path in ("conv2.weight", "linear1.weight"):
            if granularity == "weight":
                mask = start[path] != 0
                assert torch.equal(start[path], early[path] * mask)
                assert float(mask.float().mean()) == pytest.approx(left, abs=0.01)
        if granularity == "channel":
            rows = early["conv1.weight"].flatten(1).tolist()
            assert all(row in rows for row in start["conv1.weight"].flatten(1).tolist())
            assert len(start["conv1.weight"]) == round(left * len(rows))
    pruned.check()
    assert run.found["ratio"] == 0.75


# --- recovery by what the recipe says


def test_a_removal_can_be_recovered_from_by_features(run, trained):
    """Of the unpruned network, which is wider: adapters are paired by themselves."""
    run = replace(run, teacher=copy.deepcopy(trained).eval())
    features = ["kd", {"feature": {"layers": "auto"}}]
    stage = Prune(
        ratio=0.5, floor=2, round_to=1, recover={"epochs": 2, "criteria": features, **FAST}
    )
    heard: list = []
    pruned = stage.apply(Student(copy.deepcopy(trained)), replace(run, tell=heard.append))
    epochs = [e for e in heard if e["event"] == "epoch"]
    assert [e["label"] for e in epochs] == ["recover"] * 2
    assert {"kd", "feature", "task"} <= set(epochs[0]["terms"])
    assert run.evaluate(pruned.module) > 0.7
    assert run.found["pairs"]


@pytest.mark.parametrize("kind", ["growing", "group-lasso"])
def test_a_penalty_makes_small_what_goes(run, trained, kind):
    stage = Prune(
        ratio=0.5, floor=2, round_to=1, recover={"epochs": 1, **FAST},
        regularise={"kind": kind, "epochs": 3, "strength": 1.0 if kind == "growing" else 0.02},
    )  # fmt: skip
    heard: list = []
    pruned = stage.apply(Student(copy.deepcopy(trained)), replace(run, tell=heard.append))
    labels = [e["label"] for e in heard if e["event"] == "epoch"]
    assert labels == ["regularise"] * 3 + ["recover"]
    penalties = [e["terms"]["penalty"] for e in heard if "penalty" in e.get("terms", {})]
    assert len(penalties) == 3
    plain = Prune(ratio=0.5, floor=2, round_to=1).apply(
        Student(copy.deepcopy(trained)), run.at("plain")
    )
    assert pruned.module.conv1.weight.shape == plain.module.conv1.weight.shape
    assert run.evaluate(pruned.module) > run.evaluate(plain.module)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": {"regrow": 0.3}, "recover": {}}, "regrow is for granularity: weight"),
        ({"schedule": {"regrow": 0.3}, "granularity": "weight"}, "needs recover"),
        ({"schedule": {"regrow": 1.3}, "granularity": "weight", "recover": {}}, "less than 1"),
        ({"schedule": {"regrow": 0.3}, "granularity": "weight", "recover": {}, "block": [4, 1]},
         "leave block out"),
        ({"schedule": {"rewind": 2}}, "needs a ratio, and recover"),
        ({"schedule": {"rewind": 2, "to": 5}, "recover": {"epochs": 5}}, "to: 5 is no epoch"),
        ({"schedule": {"iterative": 2}}, "needs a ratio, and recover"),
        ({"schedule": {"sometimes": 2}}, "one-shot, {iterative: steps}"),
        ({"schedule": "twice"}, "one-shot, {iterative: steps}"),
        ({"regularise": {"epochs": 2}}, "give recover, no schedule"),
        ({"regularise": {"epochs": 2}, "recover": {}, "schedule": {"cubic": 2}}, "no schedule"),
        ({"regularise": {"epochs": 2, "kind": "group-lasso"}, "recover": {},
          "granularity": "weight"}, "use kind: growing"),
        ({"recover": {"criteria": ["kdd"]}}, "kdd"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Prune(ratio=0.5, **fields)
