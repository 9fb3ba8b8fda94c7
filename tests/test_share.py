import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError, CheckpointError, ConstraintBroken, UsageError
from attar.share import Shared, cluster, share_weights
from attar.student import Student, load_student, save_student
from attar.student.edits import edit_from


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def train_a_little(module: nn.Module, edit: Shared, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(20):
        loss = nn.functional.cross_entropy(module(torch.randn(32, 12)), torch.randint(4, (32,)))
        optimizer.zero_grad()
        loss.backward()
        edit.before_step(module)
        optimizer.step()
        edit.after_step(module)


def test_exact_zeros_stay_zero_and_count_as_one_of_the_values():
    weight = torch.randn(32, 32)
    weight[torch.rand(32, 32) < 0.7] = 0
    codebook = cluster(weight, 8)
    rebuilt = codebook.values[codebook.indices.long()]
    assert len(codebook.values) == 8
    assert torch.equal(rebuilt == 0, weight == 0)


def test_fewer_distinct_weights_than_values_are_kept_as_they_are():
    weight = torch.tensor([[1.0, -2.0, 1.0], [0.5, 0.5, -2.0]])
    codebook = cluster(weight, 256)
    assert torch.equal(codebook.values[codebook.indices.long()], weight)
    assert len(codebook.values) == 3
    assert codebook.distortion == 0


@pytest.mark.parametrize("constant", [0.0, 0.25, -1e30])
def test_a_constant_tensor_becomes_one_value(constant):
    codebook = cluster(torch.full((3, 3), constant), 16)
    assert codebook.values.tolist() == pytest.approx([constant])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(bad):
    module = network()
    with torch.no_grad():
        module[3].weight[0, 0] = bad
    with pytest.raises(AttarError, match=r"3\.weight has NaN or infinite"):
        share_weights(module, 4)


def test_only_weights_are_shared_and_excluded_ones_are_not():
    edit, done = share_weights(network(), 4)
    assert edit.per_tensor_weights() == {"0.weight", "3.weight"} == set(done)
    edit, _ = share_weights(network(), 4, exclude=["3"])
    assert edit.per_tensor_weights() == {"0.weight"}
    with pytest.raises(UsageError, match="'head\\.\\*' fits no weight"):
        share_weights(network(), 4, exclude=["head.*"])


def test_an_empty_layer_is_passed_over():
    with pytest.warns(UserWarning):  # torch says that it can't initialise it
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    assert share_weights(module, 2)[0].per_tensor_weights() == {"0.weight"}


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.sampled_from(["sgd", "adamw"]))
def test_training_keeps_what_is_equal_equal_and_zeros_zero(bits, sparse, optimizer):
    module = network()
    if sparse:
        with torch.no_grad():
            module[0].weight[torch.rand(16, 12) < 0.5] = 0
    zeros = module[0].weight == 0
    edit, _ = share_weights(module, bits)
    before = edit.codebook(module, "3.weight").clone()
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }
    train_a_little(module, edit, kinds[optimizer](module.parameters()))
    assert edit.check(module) == []
    assert module[0].weight.unique().numel() <= 2**bits
    assert (module[0].weight[zeros] == 0).all()
    assert not torch.equal(before, edit.codebook(module, "3.weight")), "the values are trained"


def test_a_shared_step_is_the_mean_of_the_steps_its_weights_would_take():
    module = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 1.0, 4.0]]))
    edit, _ = share_weights(module, 1)
    module.weight.grad = torch.tensor([[1.0, 3.0, 5.0]])
    edit.before_step(module)
    assert module.weight.grad.tolist() == [[2.0, 2.0, 5.0]]


def test_a_codebook_that_spread_is_found():
    module = network()
    edit, _ = share_weights(module, 2)
    student = Student(module, None, [edit])
    student.check()
    with torch.no_grad():
        module[0].weight[0, 0] += 0.01
    with pytest.raises(ConstraintBroken, match=r"0\.weight has \d+ weights that left"):
        student.check()


def test_zeros_that_grew_together_are_found():
    module = network()
    with torch.no_grad():
        module[0].weight[:8] = 0.0
    edit, _ = share_weights(module, 3)
    with torch.no_grad():
        module[0].weight[:8] = 0.5
    assert edit.check(module) == ["0.weight's zeros are 0.5 now"]


def test_sharing_again_with_fewer_values_keeps_both_promises():
    module = network()
    first, _ = share_weights(module, 5)
    second, _ = share_weights(module, 2)
    student = Student(module, None, [first, second])
    before, after = student.hooks()
    module(torch.randn(8, 12)).square().sum().backward()
    before(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad
    after(module)
    student.check()
    assert module[0].weight.unique().numel() <= 4


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_shared_student_comes_back_from_disk(tmp_path, bits):
    module = network().eval()
    edit, _ = share_weights(module, bits)
    save_student(Student(module, None, [edit]), tmp_path)
    back = load_student(tmp_path, build=lambda spec: network(), module=network())
    assert torch.equal(back.module[0].weight, module[0].weight)
    assert torch.equal(
        back.edits[0].assignments["0.weight"].indices, edit.assignments["0.weight"].indices
    )
    train_a_little(
        back.module.train(), back.edits[0], torch.optim.SGD(back.module.parameters(), 0.1)
    )
    back.check()


def test_an_index_takes_no_more_than_its_bits():
    edit, _ = share_weights(nn.Linear(64, 64), 3)
    assert edit.tensors()["weight"].numel() == 64 * 64 * 3 // 8


def test_damaged_indices_are_refused():
    edit, _ = share_weights(network(), 4)
    record = {"kind": "shared", **edit.to_json()}
    with pytest.raises(CheckpointError, match=r"0\.weight is damaged"):
        edit_from(record, {**edit.tensors(), "0.weight": torch.zeros(1, dtype=torch.uint8)})
    record["tensors"]["0.weight"]["size"] = 9  # still four bits, but indices reach 15
    with pytest.raises(CheckpointError, match=r"0\.weight is damaged"):
        edit_from(record, edit.tensors())
