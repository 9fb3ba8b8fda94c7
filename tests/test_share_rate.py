"""Training for accuracy and few bits at once: the law, its gradient, sizes that are kept to."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError, UsageError
from attar.prune import criteria, prune_weights
from attar.share import RateDistortion, codable, round_norms
from attar.share.rate import LARGEST, charged, first_step
from attar.student import Student, load_student, save_student
from attar.student.packed import coded_size, pack_student, packed_size, unpack_student
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


def rated(network: nn.Module, **given: Any) -> RateDistortion:
    return RateDistortion(TaskObjective(TASK), network, **given)


def trained(network: nn.Module, objective: Any, digits, epochs: int = 3, **given: Any) -> list[Any]:
    asked = {"epochs": epochs, "batch_size": 50, "optimizer": {"lr": 0.01, "weight_decay": 0}}
    training = Training.model_validate({**asked, "keep": "last"})
    return train(
        network, data=digits, task=TASK, training=training, objective=objective, seed=1, **given
    )


def bits_by_law(integers: list[int], q: float, r: float) -> float:
    """What integers cost by `p(0) = 1 - q`, `p(k) = q/2 · (1 - r) · r^(|k| - 1)`, one by one."""

    def probability(k: int) -> float:
        return 1 - q if k == 0 else q / 2 * (1 - r) * r ** (abs(k) - 1)

    return sum(-math.log2(probability(k)) for k in integers)


def entropy(integers: list[int]) -> float:
    counts, n = Counter(integers), len(integers)
    return sum(-c * math.log2(c / n) for c in counts.values())


@given(st.lists(st.integers(-9, 9), min_size=40, max_size=200))
def test_the_bits_are_those_of_the_law_that_fits_best(integers):
    bits = float(charged(torch.tensor(integers, dtype=torch.float32), torch.tensor(1.0)))
    n, alive = len(integers), [abs(k) for k in integers if k]
    if not alive or len(alive) == n or sum(alive) == len(alive):
        return  # the law's borders, where the halves that are added decide
    best = bits_by_law(integers, len(alive) / n, 1 - len(alive) / sum(alive))
    assert entropy(integers) <= best + 1e-6
    assert best - 0.1 <= bits <= best + 6


def test_weights_that_a_geometric_law_drew_cost_their_entropy():
    torch.manual_seed(0)
    sizes = torch.distributions.Geometric(0.4).sample((50_000,)) + 1
    weights = sizes * torch.randn(50_000).sign() * (torch.rand(50_000) < 0.3)
    exact = entropy(weights.int().tolist())
    assert float(charged(weights, torch.tensor(1.0))) == pytest.approx(exact, rel=0.002)


def test_a_weight_is_drawn_by_the_difference_of_its_neighbours_bits():
    weight = torch.tensor([0.2, -0.2, 1.6, -2.4] + [0.0] * 60 + [2.0] * 8, requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    charged(weight, step).backward()
    integers = [0, 0, 3, -5] + [0] * 60 + [4] * 8
    alive = [abs(k) for k in integers if k]
    n, m, total = len(integers), len(alive), sum(alive)
    further = math.log2((total + 1) / (total - m + 0.5))
    first = (
        1
        + math.log2((n + 1) / (m + 0.5))
        + math.log2((total + 1) / (m + 0.5))
        - math.log2((n + 1) / (n - m + 0.5))
    )
    wanted = [first / 0.5, -first / 0.5, further / 0.5, -further / 0.5]
    assert weight.grad[:4].tolist() == pytest.approx(wanted)
    of_step = -float((weight.grad * weight.detach()).sum()) / 0.5
    assert float(step.grad) == pytest.approx(of_step, rel=1e-5)


def test_the_cost_alone_draws_weights_to_zero_wherever_they_begin():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4000) * 0.03)
    step = first_step(weight.detach(), 4.0)
    optimizer = torch.optim.AdamW([weight], lr=0.002, weight_decay=0)
    begun = float(charged(weight.detach(), step))
    for _ in range(150):
        charged(weight, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(charged(weight.detach(), step)) < begun / 100
    assert (weight.abs() < step / 2).float().mean() > 0.99


@settings(max_examples=50)
@given(st.floats(2, 6), st.floats(1e-4, 1e3), st.integers(0, 9))
def test_the_first_step_gives_normal_weights_about_the_bits_asked_for(bits, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20_000, generator=generator) * scale
    step = first_step(weight, bits)
    assert weight.abs().max() / step <= LARGEST
    counts = Counter((weight / step).round().int().tolist())
    assert entropy(list(counts.elements())) / 20_000 == pytest.approx(bits, abs=0.15)


def test_a_tensor_of_zeros_has_a_step_too():
    assert first_step(torch.zeros(5), 4.0) > 0
    assert first_step(torch.full((5,), -2.0), 4.0) > 0


def test_what_is_judged_is_what_is_shared_and_what_is_packed(network, digits):
    objective = rated(network, rate=0.05)
    history = trained(network, objective, digits)
    judged = statistics_of(objective.judged(network), digits.validation, TASK)
    edit, done = objective.share(network)
    assert (statistics_of(network, digits.validation, TASK) == judged).all()
    assert TASK.value(judged) == history[-1]["metric"]["value"]
    student = Student(network.eval(), None, [edit])
    student.check()
    loaded = unpack_student(pack_student(student), build=None, module=copy.deepcopy(network))
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], tensor)
    assert set(done) == set(codable(network))
    assert all(layer.values <= 2 * LARGEST + 1 for layer in done.values())


def test_weights_lie_on_multiples_of_a_step_of_eight_leading_bits(network, digits):
    objective = rated(network, rate=0.05)
    trained(network, objective, digits, epochs=1)
    objective.share(network)
    for path in codable(network):
        weight = network.get_parameter(path).detach()
        step = objective.log_steps[path.replace(".", "/")].detach().exp().bfloat16().float()
        assert torch.equal((weight / step).round() * step, weight)


def test_a_higher_rate_gives_a_smaller_file(tiny_net, digits):
    sizes = []
    for rate in (0.001, 0.1, 3.0):
        network = tiny_net(8)
        objective = rated(network, rate=rate)
        trained(network, objective, digits, epochs=6)
        edit, _ = objective.share(network)
        sizes.append(packed_size(Student(network, None, [edit])))
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_file_gets_the_size_that_was_asked_for(network, digits):
    wanted = rated(network, rate=1).kilobytes(network) / 3
    objective = rated(network, kilobytes=wanted)
    trained(network, objective, digits, epochs=40)
    took = objective.kilobytes(network)
    assert 0.88 * wanted < took < 1.08 * wanted
    alone = packed_size(Student(copy.deepcopy(network)))
    edit, _ = objective.share(network)
    assert packed_size(Student(network, None, [edit])) < alone
    codable_weights = {path: network.get_parameter(path) for path in codable(network)}
    assert took == pytest.approx(coded_size(codable_weights) / 1000, rel=1e-6)


def test_a_killed_training_ends_with_the_same_weights(tiny_net, digits, tmp_path):
    whole, halves = tiny_net(4), tiny_net(4)
    objective = rated(whole, kilobytes=0.3)
    trained(whole, objective, digits, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trained(
            halves, rated(halves, kilobytes=0.3), digits, epochs=3,
            checkpoint=tmp_path / "c.pt", tell=stops_after(2),
        )  # fmt: skip
    fresh = tiny_net(4)
    again = rated(fresh, kilobytes=0.3)
    trained(fresh, again, digits, epochs=3, checkpoint=tmp_path / "c.pt")
    again.share(fresh)
    objective.share(whole)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_shared_weights_stay_equal_in_whatever_trains_them_next(network, digits, tmp_path):
    objective = rated(network, rate=0.1)
    trained(network, objective, digits, epochs=2)
    edit, _ = objective.share(network)
    shared = Student(network, None, [edit])
    before, after = shared.hooks()
    trained(network, TaskObjective(TASK), digits, epochs=1, before_step=before, after_step=after)
    shared.check()
    save_student(shared, tmp_path / "s")
    load_student(tmp_path / "s", build=None, module=copy.deepcopy(network)).check()


def test_pruned_weights_stay_zero(network, digits):
    student = prune_weights(Student(network), ratio=0.5, criterion=criteria.get("magnitude")())
    network = student.module
    before, after = student.hooks()
    objective = rated(network, rate=0.001)
    trained(network, objective, digits, epochs=2, before_step=before, after_step=after)
    edit, _ = objective.share(network)
    student.edited(edit).check()


def test_batch_norms_and_excluded_layers_are_left_alone(tiny_net):
    network = tiny_net(4)
    paths = codable(network, ["8.weight", "4"])
    assert set(paths) == {"0.weight", "0.bias", "8.bias"}


def test_tied_parameters_are_charged_once_and_rounded_under_both_names():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    network = nn.Sequential(first, second)
    assert codable(network) == ["0.weight", "0.bias", "1.bias"]
    weights = rated(network, rate=1).weights(network)
    assert torch.equal(weights["0.weight"], weights["1.weight"])


def test_wrong_settings_and_broken_weights_are_refused(tiny_net):
    network = tiny_net(4)
    with pytest.raises(UsageError, match="rate or kilobytes"):
        rated(network)
    with pytest.raises(UsageError, match="'conv' fits no weight"):
        rated(network, rate=1, exclude=["conv"])
    with pytest.raises(UsageError, match="no weight is left to share"):
        rated(network, rate=1, exclude=["*"])
    objective = rated(network, rate=1)
    with torch.no_grad():
        network[0].weight[0] = math.nan
    with pytest.raises(AttarError, match=r"0\.weight has NaN"):
        objective.share(network)


# --- batch norms


def norms_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten())
    for _ in range(20):
        network(torch.randn(16, 3, 8, 8) * 3 + 1)
    with torch.no_grad():
        network[1].weight.normal_(1, 0.3)
        network[1].bias.normal_(0, 0.5)
    return network.eval()


@pytest.mark.parametrize(("bits", "within"), [(6, 0.06), (8, 0.015), (12, 0.001)])
def test_rounded_norms_answer_as_they_did(bits, within):
    network = norms_network()
    x = torch.randn(16, 3, 8, 8) * 3 + 1
    before = network(x)
    assert round_norms(network, bits) == ["1"]
    assert (network(x) - before).square().mean().sqrt() < within * before.square().mean().sqrt()


def test_rounded_norms_take_few_bytes_and_train_on_as_they_were():
    network = norms_network()
    plain = packed_size(Student(copy.deepcopy(network)))
    original = copy.deepcopy(network).train()
    round_norms(network)
    assert plain - packed_size(Student(network)) > 32 * 4 * 4 / 2
    x = torch.randn(64, 3, 8, 8) * 3 + 1
    wanted, found = original(x), network.train()(x)
    assert (found - wanted).square().mean().sqrt() < 0.12 * wanted.square().mean().sqrt()


def test_norms_without_weights_or_with_dead_channels_are_kept_whole():
    network = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4))
    with torch.no_grad():
        network[1].running_var[0] = 0
    before = network.eval()(torch.zeros(2, 4))
    assert round_norms(network) == ["1"]
    assert network[1].running_var[0] == 0
    assert torch.allclose(network(torch.zeros(2, 4)), before, atol=0.02)
