import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from attar.errors import AttarError, CheckpointError, ConstraintBroken, UsageError
from attar.share import Assignment, Shared, Vectors, cluster, share_weights
from attar.student import Student, load_student, save_student
from attar.student.edits import edit_from
from network_fixture import Encoder


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


SCOPES = {
    "tensor": {"bits": 3},
    "values": {"values": 11},
    "network": {"bits": 4, "scope": "network"},
    "channels": {"bits": 2, "channels": 3},
    "vectors": {"bits": 3, "vectors": Vectors(length=2, values=8)},
    "vectors and network": {"values": 5, "scope": "network", "vectors": Vectors(4, 4)},
}


@pytest.fixture(params=["cnn", "transformer"])
def whole(request, tiny_net) -> nn.Module:
    """A network some of whose weights are zero, in whole runs."""
    torch.manual_seed(0)
    module = tiny_net() if request.param == "cnn" else Encoder()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1 and parameter.numel() > 100:
                parameter.view(-1, 4)[torch.rand(parameter.numel() // 4) < 0.2] = 0
    return module


def trained(module: nn.Module, edit: Shared, digits, steps: int = 12) -> list[float]:
    """The losses of a training on digits that keeps the edit's promise."""
    batch = next(iter(digits.train.batches(64)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(module(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        edit.before_step(module)
        optimizer.step()
        edit.after_step(module)
        losses.append(float(loss.detach()))
    return losses


def saved_and_loaded(module: nn.Module, edit: Shared, folder) -> Student:
    save_student(Student(module, None, [edit]), folder)
    return load_student(folder, build=lambda spec: module, module=copy.deepcopy(module))


def clusters(edit: Shared) -> dict[tuple[str, int], list[tuple[str, int]]]:
    """Who is to be equal: places of weights (path, flat place), by the codebook and the place in
    it that the edit's fields say they take, place by place of a vector."""
    found: dict = {}
    for path, own in edit.assignments.items():
        flat = own.indices.flatten().tolist()
        row = len(flat) // own.indices.shape[0] * (own.channels or own.indices.shape[0])
        for run, place in enumerate(flat):
            for i in range(own.length):
                key = (own.book or f"{path} {run // row if own.channels else 0}", place, i)
                found.setdefault(key, []).append((path, run * own.length + i))
    return found


@pytest.mark.parametrize("scope", SCOPES)
def test_a_training_under_each_scope_keeps_its_promise(whole, digits, tmp_path, scope):
    zeros = {path: p == 0 for path, p in whole.named_parameters()}
    edit, done = share_weights(whole, **SCOPES[scope])
    losses = trained(whole.train(), edit, digits)
    assert losses[-1] < losses[0]
    assert edit.check(whole) == []
    weights = {path: p.detach().flatten() for path, p in whole.named_parameters()}
    for members in clusters(edit).values():
        assert len({float(weights[path][place]) for path, place in members}) == 1
    for path, own in done.items():
        assert torch.equal(whole.get_parameter(path) == 0, zeros[path]), "zeros, and no others"
        assert own.values <= (SCOPES[scope].get("values") or 2 ** SCOPES[scope]["bits"])
    back = saved_and_loaded(whole.eval(), edit, tmp_path)
    assert back.edits[0].to_json() == edit.to_json()
    assert clusters(back.edits[0]) == clusters(edit)
    trained(back.module.train(), back.edits[0], digits, steps=2)
    back.check()


def codeword_gradients(module: nn.Module, edit: Shared, image: Tensor) -> dict[str, Tensor]:
    """By autograd itself: the loss of a network whose weights are looked up in the codebooks, by
    each value of these."""
    members = clusters(edit)
    values = {key: torch.zeros((), requires_grad=True) for key in members}
    weights = {path: p.detach().flatten() for path, p in module.named_parameters()}
    moved = {path: torch.zeros_like(flat) for path, flat in weights.items()}
    for key, places in members.items():
        for path in {path for path, _ in places}:
            own = torch.tensor([place for other, place in places if other == path])
            moved[path] = moved[path].index_add(0, own, values[key].expand(len(own)))
    shaped = {p: (weights[p] + moved[p]).view(w.shape) for p, w in module.named_parameters()}
    functional_call(module, shaped, (image,)).square().mean().backward()
    found = {path: torch.zeros_like(flat) for path, flat in weights.items()}
    for key, places in members.items():
        for path, place in places:
            found[path][place] = values[key].grad
    return found


@pytest.mark.parametrize("scope", SCOPES)
def test_the_sum_is_the_gradient_by_the_shared_value_and_the_mean_is_its_share(whole, scope):
    whole.eval()
    edit, _ = share_weights(whole, **SCOPES[scope], gradient="sum")
    image = torch.randn(3, 1, 8, 8)
    expected = codeword_gradients(whole, edit, image)
    sizes = {member: len(m) for m in clusters(edit).values() for member in m}
    for how in ("sum", "mean"):
        whole.zero_grad()
        whole(image).square().mean().backward()
        Shared(edit.assignments, how).before_step(whole)
        for path, own in edit.assignments.items():
            weight = whole.get_parameter(path)
            share = torch.tensor([sizes[path, i] for i in range(weight.numel())])
            wanted = expected[path] / (share if how == "mean" else 1)
            wanted[weight.detach().flatten() == 0] = 0
            assert torch.allclose(weight.grad.flatten(), wanted, rtol=1e-3, atol=1e-6)
            assert own.zero is not None or weight.all()


def test_how_gradients_are_tied_is_kept_on_disk(tmp_path):
    module = network()
    edit, _ = share_weights(module, 2, gradient="sum")
    assert saved_and_loaded(module.eval(), edit, tmp_path).edits[0].gradient == "sum"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_settled_edit_follows_from_the_weights(whole, digits, scope):
    edit, _ = share_weights(whole, **SCOPES[scope])
    trained(whole, edit, digits, steps=3)  # after which values stand in another order
    before = copy.deepcopy(whole.state_dict())
    settled = edit.settled(whole)
    assert all(torch.equal(before[name], now) for name, now in whole.state_dict().items())
    assert settled.check(whole) == []
    stored = settled.tensors()
    implied = Shared.implied(json.loads(json.dumps(settled.to_json())), whole.state_dict())
    assert implied.keys() == stored.keys()
    assert all(torch.equal(implied[path], stored[path]) for path in stored)
    for path, own in settled.assignments.items():
        assert own.size <= edit.assignments[path].size
        assert (own.zero is None) == (edit.assignments[path].zero is None)
        values = settled.codebook(whole, path)
        if own.channels is None:
            assert values.tolist() == sorted(values.tolist()), "lists compare as vectors should"
            assert len(values.unique(dim=0)) == len(values)
    trained(whole, settled, digits, steps=2)
    assert settled.check(whole) == []


@pytest.mark.parametrize("further", [{}, {"channels": 4}, {"scope": "network"}])
def test_values_that_met_are_one_once_settled(further):
    module = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(8).view(4, 8))
    edit, _ = share_weights(module, 2, **further)
    with torch.no_grad():
        module.weight[module.weight == 1] = 2.0
        module.weight[module.weight == -1] = 0.0
    settled = edit.settled(module).assignments["weight"]
    assert settled.size == 2 and settled.bits == 1 and settled.zero == 0
    assert torch.equal(settled.indices == 1, module.weight == 2)


def test_a_record_of_the_first_form_still_loads():
    record = {"kind": "shared", "tensors": {"weight": {"size": 3, "shape": [2, 3], "zero": 1}}}
    packed = torch.tensor([0b00_01_10_10, 0b01_00_00_00], dtype=torch.uint8)
    edit = edit_from(record, {"weight": packed})
    assert edit.assignments["weight"].indices.tolist() == [[0, 1, 2], [2, 1, 0]]
    module = nn.Linear(3, 2, bias=False)
    edit.after_step(module)
    assert edit.check(module) == []
    assert (module.weight[[0, 1], [1, 1]] == 0).all() and module.weight[0, 0] == module.weight[1, 2]
    assert edit.to_json() == {"tensors": record["tensors"]}
    assert torch.equal(edit.tensors()["weight"], packed)


def test_layers_of_one_codebook_share_its_values(whole):
    edit, done = share_weights(whole, 3, scope="network")
    weights = torch.cat([whole.get_parameter(path).flatten() for path in done])
    assert len(weights.unique()) == 8
    assert {own.codebooks for own in done.values()} == {0}
    one, other = list(done)[:2]
    assert torch.equal(edit.codebook(whole, one), edit.codebook(whole, other))
    assert "from common codebooks" in edit.summary()
    with torch.no_grad():
        whole.get_parameter(other).add_(whole.get_parameter(other).ne(0) * 0.01)
    assert any("left their shared value" in broken for broken in edit.check(whole))


def test_channels_have_values_of_their_own():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 10, 3)
    edit, done = share_weights(module, 2, channels=4)
    assert [len(part.unique()) for part in module.weight.split(4)] == [4, 4, 4]
    assert len(module.weight.unique()) == 12
    assert done["weight"].codebooks == 3 and edit.codebook(module, "weight").shape == (3, 4)
    alone = copy.deepcopy(module)
    _, whole = share_weights(alone, 2)
    _, single = share_weights(nn.Conv2d(4, 10, 3), 2, channels=1)
    assert single["weight"].distortion < done["weight"].distortion + whole["weight"].distortion


def test_zeros_of_one_channel_take_a_value_in_all_of_them():
    torch.manual_seed(0)
    module = nn.Linear(64, 4, bias=False)
    with torch.no_grad():
        module.weight[1, ::2] = 0
    edit, done = share_weights(module, 2, channels=1)
    assert done["weight"].values == 4 and edit.assignments["weight"].zero == 0
    assert [len(row.unique()) for row in module.weight] == [3, 4, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["tensor", "network", "channels", "vectors"])
def test_every_precision_keeps_its_promise(dtype, scope):
    torch.manual_seed(0)
    module = nn.Linear(64, 33, bias=False).to(dtype)
    with torch.no_grad():
        module.weight[:, 0] = module.weight[:, 1] = torch.finfo(torch.float16).max
    edit, _ = share_weights(module, **SCOPES[scope])
    for _ in range(3):
        module.weight.grad = torch.randn_like(module.weight) * 1e-3
        edit.before_step(module)
        with torch.no_grad():
            module.weight -= module.weight.grad
        edit.after_step(module)
    assert module.weight.isfinite().all()
    assert edit.check(module) == []


def test_tied_weights_are_shared_once_and_stay_tied():
    torch.manual_seed(0)
    table, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    head.weight = table.weight
    module = nn.Sequential(table, head)
    edit, done = share_weights(module, 2)
    assert list(done) == ["0.weight"]
    assert module[0].weight is module[1].weight
    assert edit.check(module) == []


@pytest.mark.parametrize("further", [{}, {"channels": 2}, {"scope": "network"}])
def test_a_network_of_zeros_stays_one(further):
    module = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(module.weight)
    edit, done = share_weights(module, 4, **further)
    assert done["weight"].values == 1 and done["weight"].distortion == 0
    module.weight.grad = torch.ones_like(module.weight)
    edit.before_step(module)
    assert not module.weight.grad.any()
    assert edit.check(module) == [] and edit.settled(module).check(module) == []


def test_a_network_is_left_as_it_was_where_a_tensor_can_not_be_shared():
    module = network()
    before = module[0].weight.clone()
    with torch.no_grad():
        module[3].weight[0, 0] = float("nan")
    with pytest.raises(AttarError, match=r"3\.weight has NaN"):
        share_weights(module, 1, scope="network")
    with pytest.raises(AttarError, match=r"3\.weight has NaN"):
        share_weights(module, 1)
    assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either bits or values"),
        ({"bits": 2, "values": 4}, "either bits or values"),
        ({"bits": 9}, "1 to 8 bits, not 9"),
        ({"values": 1}, "2 to 256 values, not 1"),
        ({"values": 257}, "2 to 256 values, not 257"),
        ({"bits": 2, "channels": 0}, "at least 1"),
        ({"bits": 2, "channels": 1, "scope": "network"}, "doesn't go with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        share_weights(network(), **arguments)


@pytest.mark.parametrize(
    "change",
    [{"zero": 16}, {"length": 5}, {"channels": -1}, {"size": 1 << 17}, {"book": ["a"]}],
)
def test_records_that_can_not_be_are_refused(change):
    edit, _ = share_weights(network(), 4)
    record = {"kind": "shared", **edit.to_json()}
    record["tensors"]["0.weight"] |= change
    with pytest.raises(CheckpointError, match="damaged"):
        edit_from(record, edit.tensors())


def test_tensors_of_one_codebook_must_have_it_in_the_same_form():
    record = {"kind": "shared", **share_weights(network(), 4)[0].to_json()}
    tensors = share_weights(network(), 4)[0].tensors()
    for entry in record["tensors"].values():
        entry["book"] = "one"
    assert edit_from(record, tensors)
    record["tensors"]["3.weight"]["zero"] = 3
    with pytest.raises(CheckpointError, match="can't share a codebook"):
        edit_from(record, tensors)


def test_large_codebooks_of_a_grid_are_kept(tmp_path):
    """Rate-penalised training leaves weights on a grid of any number of steps, biases too."""
    module = nn.Linear(100, 30)
    with torch.no_grad():
        module.weight.copy_((torch.arange(3000) - 1000).view(30, 100) * 0.125)
    assignment = Assignment(3000, torch.arange(3000).view(30, 100), 1000)
    edit = Shared({"weight": assignment})
    assert edit.check(module) == []
    back = saved_and_loaded(module, edit, tmp_path)
    assert torch.equal(back.edits[0].assignments["weight"].indices.long(), assignment.indices)
    assert back.edits[0].settled(module).tensors()["weight"].numel() == 3000 * 12 // 8


def test_tensors_of_another_dtype_have_a_codebook_of_their_own():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16).half(), nn.Linear(16, 16))
    edit, _ = share_weights(module, 2, scope="network")
    assert {path: own.book for path, own in edit.assignments.items()} == {
        "0.weight": "network.float32",
        "1.weight": "network.float16",
        "2.weight": "network.float32",
    }
    edit.after_step(module)
    assert edit.check(module) == []
