"""Single weights set to zero, and kept there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import CheckpointError, ConstraintBroken, UsageError
from attar.prune import Masked, criteria, prune_weights
from attar.student import Student, load_student, save_student


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10), nn.LayerNorm(10),
    )  # fmt: skip


def prune(student: Student, **options) -> Student:
    criterion = criteria.get(options.pop("criterion", "magnitude"))()
    return prune_weights(student, criterion=criterion, **options)


def test_the_smallest_weights_of_each_layer_become_zero():
    module = network()
    student = prune(Student(module), ratio=0.6)
    for i in (0, 4):
        before, after = module[i].weight, student.module[i].weight
        assert int((after == 0).sum()) == int(0.6 * before.numel())
        kept = after != 0
        assert torch.equal(after[kept], before[kept])
        assert before[kept].abs().min() >= before[~kept].abs().max()
    assert torch.equal(student.module[1].weight, module[1].weight)
    assert torch.equal(student.module[4].bias, module[4].bias)
    assert (module[0].weight != 0).all()


def test_globally_the_share_is_of_all_weights():
    module = network()
    with torch.no_grad():
        module[4].weight[:, 6:] *= 0.001
    student = prune(Student(module), ratio=0.6, scope="global")
    zero = {i: float((student.module[i].weight == 0).float().mean()) for i in (0, 4)}
    assert zero[0] < 0.6 < zero[4]
    total = sum(int((student.module[i].weight == 0).sum()) for i in (0, 4))
    assert total == pytest.approx(0.6 * (72 + 1280), abs=2)


def test_a_threshold_takes_what_is_smaller():
    module = network()
    student = prune(Student(module), criterion="threshold", threshold=0.05)
    for i in (0, 4):
        expected = torch.where(module[i].weight.abs() < 0.05, 0.0, module[i].weight)
        assert torch.equal(student.module[i].weight, expected)


def test_a_tensor_keeps_its_floor():
    student = prune(Student(network()), criterion="threshold", threshold=1e9, floor=5)
    assert int((student.module[4].weight != 0).sum()) == 5


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
)
def test_zeros_stay_zero_through_training_and_momentum_from_before(optimizer):
    student = Student(network())
    steps = optimizer(student.module.parameters())
    train(student, steps)
    masked = prune(student, ratio=0.5)
    steps.param_groups[0]["params"] = []
    fresh = optimizer(masked.module.parameters())
    zeros = masked.module[4].weight == 0
    moved = masked.module[4].weight.clone()
    for _ in range(3):
        train(masked, fresh)
        assert (masked.module[4].weight[zeros] == 0).all()
        masked.check()
    assert (masked.module[4].weight != moved)[~zeros].any()


def train(student: Student, optimizer: torch.optim.Optimizer) -> None:
    before, after = student.hooks()
    optimizer.zero_grad()
    student.module(torch.randn(8, 1, 4, 4)).square().sum().backward()
    before(student.module)
    optimizer.step()
    after(student.module)


def test_a_mask_that_grew_back_is_noticed():
    student = prune(Student(network()), ratio=0.5)
    with torch.no_grad():
        student.module[4].weight += 1e-3
    with pytest.raises(ConstraintBroken, match=r"640 masked weights of 4\.weight are no longer"):
        student.check()


def test_pruning_again_counts_what_is_gone_and_leaves_one_mask():
    student = prune(Student(network()), ratio=0.3)
    again = prune(student, ratio=0.7)
    assert [e.kind for e in again.edits] == ["masked"]
    assert int((again.module[4].weight == 0).sum()) == int(0.7 * 1280)
    gone = student.module[4].weight == 0
    assert (again.module[4].weight[gone] == 0).all()


def test_a_saved_student_keeps_its_masks(tmp_path):
    student = prune(Student(network()), ratio=0.55)
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=lambda spec: network(), module=network())
    assert torch.equal(loaded.module[4].weight, student.module[4].weight)
    assert loaded.edits[0].masks.keys() == {"0.weight", "4.weight"}
    assert (tmp_path / "edits.safetensors").stat().st_size < (72 + 1280) / 8 + 400


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_masks_survive_storage(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    edit = Masked({"w": mask})
    assert torch.equal(Masked.from_json(edit.to_json(), edit.tensors()).masks["w"], mask)


@pytest.mark.parametrize("record", [{}, {"shapes": {"w": [3, 3]}}, {"shapes": {"w": ["x"]}}])
def test_a_damaged_record_is_refused(record):
    with pytest.raises(CheckpointError, match="damaged"):
        Masked.from_json(record, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "exclude": ["3"]}, "no layer matches '3'"),
        ({"ratio": 0.5, "exclude": ["*"]}, "nothing is left to prune"),
        ({"ratio": 0.5, "criterion": "activation"}, "use granularity: channel"),
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 0.5, "threshold": 0.1}, "exactly one"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        prune(Student(network()), **options)


def test_excluded_layers_stay():
    student = prune(Student(network()), ratio=0.5, exclude=["4"])
    assert (student.module[4].weight != 0).all()
    assert int((student.module[0].weight == 0).sum()) == 36
