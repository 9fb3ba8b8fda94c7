"""Differentiable k-means: its formula, what its training reaches, and what it leaves behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.distill.capture import Capture
from attar.distill.recovery import recovery_objective
from attar.errors import AttarError, UsageError
from attar.prune import criteria, prune_weights
from attar.share import share_weights
from attar.share.dkm import DifferentiableKMeans, _attended, _nearest
from attar.student import Student, load_student, save_student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.evaluation import statistics_of
from attar.training.loop import train
from attar.training.objective import TaskObjective
from network_fixture import Encoder
from run_fixture import stops_after

TASK = ImageClassification()


@pytest.fixture(params=["cnn", "transformer"])
def network(request, tiny_net) -> nn.Module:
    torch.manual_seed(0)
    return tiny_net(6) if request.param == "cnn" else Encoder()


def clustered(network: nn.Module, bits: int = 2, **given: Any) -> DifferentiableKMeans:
    return DifferentiableKMeans(TaskObjective(TASK), network, bits=bits, **given)


def trained(network: nn.Module, objective: Any, digits, epochs: int = 2, **given: Any) -> list[Any]:
    settings = {"epochs": epochs, "batch_size": 50, "optimizer": {"lr": 0.003}}
    training = Training.model_validate({**settings, **given.pop("training", {})})
    return train(
        network, data=digits, task=TASK, training=training, objective=objective, seed=1, **given
    )


def accuracy(network: nn.Module, digits) -> float:
    return TASK.value(statistics_of(network.eval(), digits.validation, TASK))


def by_hand(weights: Tensor, centroids: Tensor, temperature: float, rounds: int) -> Tensor:
    """The paper's equations, one weight and one centroid at a time; but a centroid that nobody
    attends to stays where it is."""
    squared = sum(float(w.detach()) ** 2 for w in weights) / len(weights)
    scale = temperature * squared / len(centroids)

    def attention(w: Tensor) -> list[Tensor]:
        near = [torch.exp(-((w - c) ** 2) / scale) for c in centroids]
        return [a / sum(near) for a in near]

    for _ in range(rounds):
        rows = [attention(w) for w in weights]
        masses = [sum(row[j] for row in rows) for j in range(len(centroids))]
        centroids = torch.stack(
            [
                sum(row[j] * w for row, w in zip(rows, weights, strict=True)) / mass
                if mass > 1e-20
                else centroids[j]
                for j, mass in enumerate(masses)
            ]
        )
    return torch.stack(
        [sum(a * c for a, c in zip(attention(w), centroids, strict=True)) for w in weights]
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rounds=st.integers(1, 3), temperature=st.sampled_from([0.2, 1]))
@example(seed=52, rounds=1, temperature=0.2)  # its last centroid is far from all weights
def test_weights_and_gradients_are_those_of_the_papers_equations(seed, rounds, temperature):
    torch.manual_seed(seed)
    weights = torch.randn(7, dtype=torch.float64, requires_grad=True)
    centroids = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    soft, _ = _attended(weights, centroids, None, temperature, rounds)
    expected = by_hand(weights, centroids, temperature, rounds)
    torch.testing.assert_close(soft, expected)
    direction = torch.randn(7, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((s * direction).sum(), weights) for s in (soft, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_cold_clustering_is_the_hard_one_with_the_mean_gradient():
    layer = nn.Linear(20, 10)
    objective = clustered(layer, temperature=1e-6)
    soft = objective.weights(layer)["weight"]
    hard = copy.deepcopy(layer)
    edit, _ = share_weights(hard, 2)
    torch.testing.assert_close(soft, hard.weight)
    direction = torch.randn(10, 20)
    (soft * direction).sum().backward()
    hard.weight.grad = direction.clone()
    edit.before_step(hard)
    torch.testing.assert_close(layer.weight.grad, hard.weight.grad)


def test_what_validation_judged_is_what_is_shared(network, digits):
    objective = clustered(network)
    history = trained(network, objective, digits, epochs=4)
    images = next(digits.validation.batches(40)).inputs
    with torch.no_grad():
        judged = objective.judged(network)(images)
        edit, done = objective.share(network)
        assert torch.equal(network(images), judged)
    assert accuracy(network, digits) == max(e["metric"]["value"] for e in history)
    assert edit.check(network) == []
    assert set(done) == {n for n, p in network.named_parameters() if p.dim() > 1}
    for path, sharing in done.items():
        values = network.get_parameter(path).unique()
        assert sharing.values == len(values) <= 4
        assert sharing.bits <= 2 and 0 < sharing.distortion < 1


def test_training_reaches_what_the_first_clustering_has_lost(network, digits):
    trained(network, TaskObjective(TASK), digits, epochs=15, training={"optimizer": {"lr": 0.01}})
    hard = copy.deepcopy(network)
    first, _ = share_weights(hard, 1)
    objective = clustered(network, bits=1)
    trained(network, objective, digits, epochs=8, training={"optimizer": {"lr": 0.01}})
    edit, _ = objective.share(network)
    assert accuracy(network, digits) > accuracy(hard, digits) + 0.05
    assert any(
        (edit.assignments[path].indices != first.assignments[path].indices).any()
        for path in first.assignments
    )


def test_a_training_that_was_killed_ends_the_same(network, digits, tmp_path: Path):
    twin = copy.deepcopy(network)
    undisturbed = clustered(network)
    trained(network, undisturbed, digits, epochs=3)
    interrupted = copy.deepcopy(twin)
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(
            interrupted, clustered(interrupted), digits, 3,
            checkpoint=checkpoint, tell=stops_after(2),
        )  # fmt: skip
    resumed = clustered(twin)
    trained(twin, resumed, digits, epochs=3, checkpoint=checkpoint)
    undisturbed.share(network)
    resumed.share(twin)
    for (name, ours), theirs in zip(
        network.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_pruned_weights_stay_zero_and_count_as_one_value(network, digits, tmp_path: Path):
    student = prune_weights(Student(network), criterion=criteria.get("magnitude")(), ratio=0.5)
    network = student.module
    zeros = {n: p == 0 for n, p in network.named_parameters() if p.dim() > 1}
    objective = clustered(network)
    before, after = student.hooks()
    trained(network, objective, digits, before_step=before, after_step=after)
    edit, _ = objective.share(network)
    shared = student.edited(edit)
    shared.check()
    for path, zero in zeros.items():
        weight = network.get_parameter(path)
        assert torch.equal(weight == 0, zero)
        assert len(weight.unique()) <= 4
    save_student(shared, tmp_path)
    fresh = copy.deepcopy(network)
    loaded = load_student(tmp_path, build=lambda spec: fresh, module=fresh)
    assert [e.kind for e in loaded.edits] == ["masked", "shared"]


def test_it_trains_in_half_precision(network, digits):
    objective = clustered(network)
    history = trained(network, objective, digits, training={"precision": "bfloat16"})
    assert history[-1]["loss"] < history[0]["loss"]
    edit, _ = objective.share(network)
    assert edit.check(network) == []


def test_it_distils_and_tells_each_terms_gradient(network, digits):
    inner = recovery_objective(TASK, copy.deepcopy(network).eval(), Training())
    objective = DifferentiableKMeans(inner, network, bits=2)
    history = trained(network, objective, digits)
    norms = history[-1]["gradients"]
    assert set(norms) == {"task", "kd"}
    assert all(norm > 0 for norm in norms.values())


def test_excluded_weights_and_biases_learn_as_they_are(network, digits):
    last = [n for n, _ in network.named_parameters()][-1].rpartition(".")[0]
    objective = clustered(network, exclude=[last])
    trained(network, objective, digits)
    edit, _ = objective.share(network)
    assert f"{last}.weight" not in edit.assignments
    assert len(network.get_parameter(f"{last}.weight").unique()) > 100


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_tied_weights_are_clustered_together():
    network = Tied()
    objective = clustered(network, bits=1)
    answer = objective.judged(network)(torch.eye(6))
    objective.share(network)
    torch.testing.assert_close(network(torch.eye(6)), answer)
    assert network.down.weight is network.up.weight


def test_criteria_reach_inner_layers(tiny_net, digits):
    network = tiny_net(4)
    capture = Capture(clustered(network).judged(network), ["4"])
    with capture() as features:
        capture.module(next(digits.train.batches(3)).inputs)
    assert features["4"].shape == (3, 8, 4, 4)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 4), torch.ones(4, 4), torch.tensor([[1e-30, 1.0], [1e4, -1e4]])],
    ids=["zeros", "equal", "far-apart"],
)
def test_degenerate_weights_give_numbers(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    objective = clustered(layer, temperature=1e-6, rounds=3)
    objective.weights(layer)["weight"].sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert objective.centroids("weight").isfinite().all()
    edit, _ = objective.share(layer)
    assert edit.check(layer) == []


def test_the_softness_ends_where_validation_judges():
    layer = nn.Linear(30, 30)
    objective = clustered(layer).eval()  # its centroids rest
    gaps = []
    for epoch in range(3):
        objective.start_epoch(epoch, 3)
        soft, hard = (
            made(layer)["weight"] for made in (objective.weights, objective.judged_weights)
        )
        gaps.append(float((soft - hard).detach().square().mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    objective.start_epoch(0, 1)
    (only,) = objective.weights(layer).values()
    assert torch.equal(only, soft)


def test_a_centroid_nobody_attends_to_stays():
    weights = torch.tensor([1.0, 1.1], requires_grad=True)
    soft, moved = _attended(weights, torch.tensor([-500.0, 1.0]), None, 0.01, 2)
    assert float(moved[0].detach()) == -500
    soft.sum().backward()
    assert weights.grad.isfinite().all()


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_every_weight_goes_to_a_nearest_centroid(values, count):
    weights, centroids = torch.tensor(values), torch.randn(count)
    nearest = (weights[:, None] - centroids).abs().amin(1)
    torch.testing.assert_close((weights - _nearest(weights, centroids)).abs(), nearest)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": 9}, "bits is 9"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"cooling": 0.5}, "cooling is 0.5"),
        ({"rounds": 0}, "rounds is 0"),
        ({"exclude": ["absent"]}, "'absent' fits no weight"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        clustered(nn.Linear(4, 4), **given)


def test_weights_that_are_no_numbers_are_named():
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(AttarError, match="weight has NaN"):
        clustered(layer)
