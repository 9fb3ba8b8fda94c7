"""Hashed layers: the hash, their gradients, and how they are saved, deployed and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.errors import CheckpointError, ConstraintBroken, UsageError
from attar.prune import criteria, prune_channels, prune_weights
from attar.quantize import Scheme, quantize, quantize_weights, quantized_reference
from attar.quantize.aware import quantize_aware
from attar.quantize.graph import capture, folds, tensors_of
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.share import share_weights
from attar.share.hashed import (
    Hashed,
    HashedConv2d,
    HashedLinear,
    hash_student,
    hash_weights,
    hashed_places,
    with_plain_layers,
)
from attar.stages.base import Context
from attar.student import Student, load_student, save_student
from attar.student.edits import edit_from
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from network_fixture import Encoder

TASK = ImageClassification()
SHAPES = ({0: torch.export.Dim("batch", min=1)},)
NAMES = (["input"], ["logits"])


@pytest.fixture(params=["cnn", "transformer"])
def network(request, tiny_net) -> nn.Module:
    torch.manual_seed(0)
    return (tiny_net(6) if request.param == "cnn" else Encoder()).eval()


@pytest.fixture(scope="module")
def images(digits) -> Tensor:
    return next(digits.train.batches(64)).inputs


def reference_place(i: int, buckets: int, key: int) -> int:
    """The documented arithmetic in Python's own integers."""
    every = 2**64 - 1
    x = (key + (i + 1) * 0x9E3779B97F4A7C15) & every
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & every
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & every
    z = x ^ x >> 31
    return ((z >> 32) * buckets >> 32) + buckets * (z & 1)


@given(st.integers(0, 2**64 - 1), st.integers(1, 5000))
@settings(max_examples=40, deadline=None)
def test_the_hash_is_the_documented_one(key, buckets):
    expected = [reference_place(i, buckets, key) for i in range(30)]
    assert hashed_places(30, buckets, key).tolist() == expected


def test_the_hash_is_splitmix64s_known_output_and_even():
    # the generator's published first output for the seed 1234567
    assert reference_place(0, 2**32, 1234567) % 2**32 == 6457827717110365317 >> 32
    places = hashed_places(160_000, 16, key=7)
    counts = np.bincount(places, minlength=32)
    assert abs(counts - 5000).max() < 5 * 5000**0.5


def test_values_begin_at_the_least_squares(network):
    path = "8" if isinstance(network, nn.Sequential) else "up"
    weight = network.get_parameter(f"{path}.weight").detach().double()
    hash_weights(network, {path: 12}, seed=3)
    layer = network.get_submodule(path)
    places = layer.places.long()
    design = torch.zeros(weight.numel(), 12, dtype=torch.float64)
    rows = torch.arange(weight.numel())
    design[rows, places % 12] = torch.where(places < 12, 1.0, -1.0).double()
    best = torch.linalg.lstsq(design, weight.flatten()[:, None]).solution.flatten()
    torch.testing.assert_close(layer.buckets.detach().double(), best, rtol=1e-4, atol=1e-6)


def test_drawn_values_spread_as_the_weights_did():
    layer = nn.Sequential(nn.Linear(256, 256))
    spread = float(layer[0].weight.detach().std())
    hash_weights(layer, 1 / 16, start="drawn")
    assert float(layer[0].weight.detach().std()) == pytest.approx(spread, rel=0.05)


def test_a_values_gradient_is_the_signed_sum_over_its_weights(images):
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, padding=1), nn.Flatten(), nn.Linear(64, 10))
    hash_weights(network, 1 / 4)
    dense = with_plain_layers(network)
    for net in (network, dense):
        net(images).square().sum().backward()
    for i in (0, 2):
        places = network[i].places.long()
        count = len(network[i].buckets)
        signs = torch.where(places < count, 1.0, -1.0)
        summed = torch.zeros(count)
        summed.index_add_(0, places % count, signs * dense[i].weight.grad.flatten())
        torch.testing.assert_close(network[i].buckets.grad, summed, rtol=1e-4, atol=1e-3)


def test_only_values_and_biases_are_kept(network, images, tmp_path: Path):
    plain = copy.deepcopy(network)
    student, done = hash_student(Student(network), 1 / 8)
    assert student.module is network
    for path, hashing in done.items():
        state = network.get_submodule(path).state_dict()
        assert set(state) <= {"buckets", "bias"}
        assert hashing.values == len(state["buckets"]) == max(1, round(hashing.weights / 8))
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=lambda spec: plain, module=plain)
    with torch.no_grad():
        assert torch.equal(loaded.module(images), network(images))
    assert (tmp_path / "edits.safetensors").exists() is False


def test_seeds_and_layers_have_patterns_of_their_own():
    def places(seed: int) -> list[Tensor]:
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        hash_weights(network, 1 / 4, seed=seed)
        return [layer.places for layer in network]

    first, second = places(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, places(0)[0])
    assert not torch.equal(first, places(1)[0])


def test_a_student_is_trained_and_promises_hold(network, digits, tmp_path: Path):
    student, _ = hash_student(Student(network), 1 / 4, start="drawn")
    run = Context(task=TASK, data=digits, teacher=None, seed=1, work=tmp_path)
    training = Training.model_validate(
        {"epochs": 12, "batch_size": 50, "optimizer": {"lr": 0.02}, "precision": "float32"}
    )
    before = run.evaluate(student.module)
    trained = run.train(student, training)
    assert run.evaluate(trained.module) > before + 0.3
    trained.check()


def exported(student: Student, images: Tensor, folder: Path) -> tuple[Tensor, onnx.ModelProto]:
    OnnxRuntime().export(student, folder, example=(images[:2],), dynamic_shapes=SHAPES, names=NAMES)
    (answer,) = OnnxRuntime().session(folder)(images.numpy())
    return torch.from_numpy(answer), onnx.load(folder / "model.onnx")


def test_the_exported_file_holds_weights_not_their_places(network, images, tmp_path: Path):
    _, dense = exported(Student(copy.deepcopy(network)), images, tmp_path / "dense")
    student, _ = hash_student(Student(network), 1 / 8)
    answer, proto = exported(student, images, tmp_path / "hashed")
    with torch.no_grad():
        torch.testing.assert_close(answer, network(images), rtol=1e-4, atol=1e-5)
    places = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT64]
    assert all(np.prod(i.dims) < 9 for i in places)
    assert proto.ByteSize() <= dense.ByteSize() + 100
    assert any(isinstance(m, HashedLinear) for m in network.modules())


def test_it_is_quantized_to_int8(network, images, tmp_path: Path):
    student, _ = hash_student(Student(network), 1 / 8, start="drawn")
    small = quantize(student, Scheme(), [(images,)], example=(images[:2],), dynamic_shapes=SHAPES)
    answer, proto = exported(small, images, tmp_path)
    reference = quantized_reference(small.edits, network, (images[:2],), SHAPES)
    with torch.no_grad():
        torch.testing.assert_close(answer, reference(images), rtol=0, atol=0.05)
    dense = {tuple(m.weight.shape) for m in network.modules() if isinstance(m, HashedLinear)}
    dense |= {tuple(m.weight.shape) for m in network.modules() if isinstance(m, HashedConv2d)}
    bytes_ = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT8]
    stored = {tuple(i.dims) for i in bytes_} | {tuple(reversed(i.dims)) for i in bytes_}
    assert dense <= stored


def test_the_quantized_graph_follows_the_values(images):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    hash_weights(network.eval(), 1 / 4)
    graph = capture(network, (images[:2],), SHAPES)
    tensors = {k: v.detach().double() for k, v in tensors_of(network).items() if k[2:] != "places"}
    tensors["0.buckets"].requires_grad_()
    weight = folds(graph)["0.weight"]({**tensors, "0.places": network[0].places})
    factor = (1 / (1 + network[1].eps)) ** 0.5
    torch.testing.assert_close(weight.float(), network[0].weight * factor)
    weight.sum().backward()
    assert tensors["0.buckets"].grad.abs().sum() > 0


def test_quantization_aware_training_moves_the_values(images, digits, tmp_path: Path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    student, _ = hash_student(Student(network), 1 / 4, start="drawn")
    before = copy.deepcopy(network.state_dict())
    run = Context(task=TASK, data=digits, teacher=None, seed=1, work=tmp_path)
    training = Training.model_validate(
        {"epochs": 2, "batch_size": 50, "optimizer": {"lr": 0.01}, "precision": "float32"}
    )
    small = quantize_aware(
        student, Scheme(weight_bits=7, observer="minmax"),
        lambda wrap: run.train(student, training, wrap=wrap), lambda: [(images,)],
        example=(images[:2],), dynamic_shapes=SHAPES,
    )  # fmt: skip
    after = small.module.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    answer, _ = exported(small, images, tmp_path)
    reference = quantized_reference(small.edits, small.module, (images[:2],), SHAPES)
    with torch.no_grad():
        torch.testing.assert_close(answer, reference(images), rtol=0, atol=0.05)
    small.check()


def test_computed_weights_of_other_networks_are_quantized_too(images, tmp_path: Path):
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(144, 10)
    ).eval()
    graph = capture(network, (images[:2],), SHAPES)
    with torch.no_grad():
        torch.testing.assert_close(graph(images), network(images))
    assert "0.weight" in folds(graph)


def test_pruning_leaves_hashed_layers_alone(images):
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    student, _ = hash_student(Student(network), 1 / 4, exclude=["5", "7"])
    magnitude = criteria.get("magnitude")()
    masked = prune_weights(student, criterion=magnitude, ratio=0.5)
    assert set(masked.edits[-1].masks) == {"5.weight", "7.weight"}
    masked.check()
    everything, _ = hash_student(Student(with_plain_layers(network)), 1 / 4)
    with pytest.raises(UsageError, match="nothing is left to prune"):
        prune_weights(everything, criterion=magnitude, ratio=0.5)


def test_sharing_takes_what_is_not_hashed():
    network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    hash_weights(network, 1 / 8, exclude=["2"])
    edit, _ = share_weights(network, 2)
    assert set(edit.assignments) == {"2.weight"}


def test_weights_alone_have_nothing_to_store_smaller(images):
    student, _ = hash_student(Student(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), 1 / 4)
    with pytest.raises(UsageError, match="no weight is left to store as int4"):
        quantize_weights(student, "int4", example=(images[:2],), dynamic_shapes=SHAPES)


@pytest.mark.parametrize("earlier", ["masked", "shared", "quantized"])
def test_it_refuses_to_break_an_earlier_promise(network, images, earlier):
    student = Student(network)
    if earlier == "masked":
        student = prune_weights(student, criterion=criteria.get("magnitude")(), ratio=0.5)
    elif earlier == "shared":
        student = student.edited(share_weights(network, 3)[0])
    else:
        student = quantize(
            student, Scheme(), [(images,)], example=(images[:2],), dynamic_shapes=SHAPES
        )
    before = list(student.module.state_dict())
    with pytest.raises(UsageError, match=f"after the edit '{earlier}'"):
        hash_student(student, 1 / 4)
    assert list(student.module.state_dict()) == before


class Twice(nn.Module):
    """A layer under two paths, a tied weight, attention of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.tied(self.again(self.first(x))))
        return self.attend(x, x, x)[0]


def test_layers_that_share_are_hashed_once_or_left_alone():
    network = Twice()
    edit, done = hash_weights(network, 1 / 4)
    assert list(done) == ["first"]
    assert network.again is network.first
    assert isinstance(network.first, HashedLinear)
    network(torch.randn(2, 3, 8)).sum().backward()
    assert edit.check(network) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1"),
        ({"ratio": {"9": 4}}, "weights of '9' can't be hashed"),
        ({"ratio": {"1": 4}}, "weights of '1' can't be hashed"),
        ({"ratio": {"0": 65}}, "0 can't have 65 values"),
        ({"exclude": ["0", "2"]}, "nothing is left to hash"),
        ({"exclude": ["absent"]}, "'absent' fits no weight"),
        ({"start": "anyhow"}, "start is 'anyhow'"),
    ],
)
def test_wrong_settings_are_named(given, message):
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UsageError, match=message):
        hash_weights(network, **given)
    assert isinstance(network[0], nn.Linear)


@pytest.mark.parametrize(
    "record",
    [
        {"layers": {"0": 0}, "seed": 0},
        {"layers": {"0": 4}},
        {"layers": ["0"], "seed": 0},
        {"seed": 0},
    ],
)
def test_damaged_records_are_named(record: dict[str, Any]):
    with pytest.raises(CheckpointError, match="'hashed' is damaged"):
        edit_from({"kind": "hashed", **record}, {})


def test_a_network_that_does_not_fit_is_named():
    edit = Hashed({"0": 4}, seed=0)
    with pytest.raises(CheckpointError, match="weights were hashed in 0, which the network"):
        edit.replay(nn.Sequential())
    with pytest.raises(CheckpointError, match="is a ReLU"):
        edit.replay(nn.Sequential(nn.ReLU()))
    with pytest.raises(ConstraintBroken, match="0 has hashed weights but is no hashed layer"):
        Student(nn.Sequential(nn.Linear(4, 4)), edits=[edit]).check()
    other = nn.Sequential(nn.Linear(4, 4))
    hash_weights(other, {"0": 4}, seed=1)
    with pytest.raises(ConstraintBroken, match="other settings"):
        Student(other, edits=[edit]).check()


def test_channels_of_hashed_layers_stay(images):
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1),
        nn.Flatten(), nn.Linear(128, 10),
    ).eval()  # fmt: skip
    student, _ = hash_student(Student(network), {"2": 100})
    pruned, _ = prune_channels(
        student, (images[:2],), criterion=criteria.get("magnitude")(), ratio=0.5
    )
    assert pruned.module.get_submodule("2").shape == (8, 8, 3, 3)
    pruned.check()
