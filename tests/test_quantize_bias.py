"""Bias correction: means as in float, told by records that survive, on graphs of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import CheckpointError, DataError, UsageError
from attar.quantize import Quantized, Scheme, quantize, quantized_reference
from attar.quantize.bias_correction import correct_biases
from attar.quantize.clipping import clipped, fit, remarks
from attar.quantize.side_by_side import SideBySide
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.student import Student, load_student, save_student
from attar.student.edits import edit_from
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)


class Network(nn.Module):
    """A convolution with a batch norm, one without a bias that is used twice, linear layers with
    and without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.again = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.hidden, self.head = nn.Linear(8 * 16, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.again(F.relu(self.again(x))))
        return self.head(F.relu(self.hidden(F.max_pool2d(x, 2).flatten(1))))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def traced(images: Tensor) -> dict[str, Any]:
    return {"example": (images[:2],), "dynamic_shapes": SHAPES}


def quantized(network: type[nn.Module], images: Tensor, **scheme: Any) -> Student:
    torch.manual_seed(0)
    given = {"weight_bits": 7, "observer": "minmax", **scheme}
    examples = ((part,) for part in images.split(16))
    return quantize(Student(network().eval()), Scheme(**given), examples, **traced(images))


def reference(student: Student, images: Tensor) -> Tensor:
    graph = quantized_reference(student.edits, student.module, (images[:2],), SHAPES)
    assert graph is not None
    with torch.no_grad():
        return graph(images)


def edit_of(student: Student) -> Quantized:
    (edit,) = student.find(Quantized)
    assert isinstance(edit, Quantized)
    return edit


@pytest.mark.parametrize("network", [Network, Encoder])
@pytest.mark.parametrize("float_layers", [(), ("*",)])
def test_mean_answers_are_those_of_the_float_network(images, network, float_layers):
    small = quantized(network, images, float_layers=float_layers)
    better, record = correct_biases(small, [(images,)], **traced(images))
    with torch.no_grad():
        expected = small.module(images).mean(0)
    before = (reference(small, images).mean(0) - expected).abs().max()
    after = (reference(better, images).mean(0) - expected).abs().max()
    assert after < 0.25 * before
    assert record["layers"] == len(edit_of(better).biases) >= 5
    assert 0 < record["largest"] < 1 and record["where"] in edit_of(better).biases
    assert not edit_of(small).biases, "the student that was handed in changed"
    again, _ = correct_biases(better, [(images,)], **traced(images))
    for key, bias in edit_of(again).biases.items():
        assert torch.equal(bias, edit_of(better).biases[key]), "corrected twice over"


def means(edit: Quantized, student: Student, images: Tensor, side: str) -> dict[str, Tensor]:
    """The mean of each layer's answers by channel, on one side."""
    found = {}

    def note(layer: Any) -> Tensor:
        answers = getattr(layer.answers, side)
        found[layer.key] = answers.transpose(0, 1).flatten(1).mean(1)
        return layer.answers.quantized

    with torch.no_grad():
        SideBySide(edit.prepared(student.module, (images[:2],), SHAPES), note).run(images)
    return found


def test_each_layer_is_corrected_for_itself_in_order(images):
    """Against a loop that quantizes the first layers, measures one, and goes on: one batch, so
    nothing is averaged."""
    small = quantized(Network, images)
    better, _ = correct_biases(small, [(images,)], **traced(images))
    edit = edit_of(small)
    biases: dict[str, Tensor] = {}
    wanted = means(edit, small, images, "in_float")
    for key in edit_of(better).biases:
        so_far = Quantized(edit.scheme, edit.grids, edit.weights_sha256, biases)
        biases[key] = wanted[key] - means(so_far, small, images, "quantized")[key]
    for key, bias in edit_of(better).biases.items():
        assert torch.allclose(bias, biases[key], atol=0.02 * float(bias.abs().max())), key


def test_batches_add_up_by_their_size(images):
    small = quantized(Network, images)
    halves = [(images[:16],), (images[16:],)]
    both, _ = correct_biases(small, halves, **traced(images))
    each = [correct_biases(small, [half], **traced(images))[0] for half in halves]
    for key, bias in edit_of(both).biases.items():
        first, second = (edit_of(s).biases[key] for s in each)
        assert torch.allclose(bias, (first + 3 * second) / 4, atol=1e-6)


def test_both_sides_answer_as_the_network_and_its_quantized_graph(images):
    small = quantized(Network, images)
    prepared = edit_of(small).prepared(small.module, (images[:2],), SHAPES)
    with torch.no_grad():
        both = SideBySide(prepared).run(images)
        assert torch.allclose(both.in_float, small.module(images), atol=1e-5)
    step = reference(small, images).abs().max() / 127
    assert (both.quantized - reference(small, images)).abs().max() < 2 * step


def test_a_corrected_student_is_saved_exported_and_read_as_before(images, tmp_path):
    small = quantized(Network, images)
    better, _ = correct_biases(small, [(images,)], **traced(images))
    save_student(better, tmp_path / "student")
    again = load_student(tmp_path / "student", build=None, module=Network())
    expected = reference(better, images)
    assert torch.equal(reference(again, images), expected)
    assert not torch.equal(reference(small, images), expected)
    runtime = OnnxRuntime()
    runtime.export(better, tmp_path / "file", **traced(images), names=(["input"], ["logits"]))
    answers = torch.from_numpy(runtime.session(tmp_path / "file")(images.numpy())[0])
    assert (answers - expected).abs().max() < 0.02 * expected.abs().max()


def test_records_from_before_and_damaged_ones(images):
    edit = edit_of(correct_biases(quantized(Network, images), [(images,)], **traced(images))[0])
    record, tensors = {**edit.to_json(), "kind": "quantized"}, edit.tensors()
    old = {k: v for k, v in record.items() if k != "biases"}
    assert edit_from(old, {k: v for k, v in tensors.items() if k[:5] != "bias/"}).biases == {}
    with pytest.raises(CheckpointError, match="lacks"):
        edit_from(record, {k: v for k, v in tensors.items() if k[:5] != "bias/"})
    module = quantized(Network, images).module
    other = Quantized(edit.scheme, edit.grids, edit.weights_sha256, {"gone:conv2d": torch.ones(8)})
    with pytest.raises(CheckpointError, match="gone:conv2d"):
        other.graph(module, (images[:2],), SHAPES)
    other = Quantized(edit.scheme, edit.grids, edit.weights_sha256, {"stem:conv2d": torch.ones(3)})
    with pytest.raises(CheckpointError, match="8 channels"):
        other.graph(module, (images[:2],), SHAPES)


def test_wrong_calls_are_refused(images):
    small = quantized(Network, images)
    with pytest.raises(DataError, match="there are none"):
        correct_biases(small, [], **traced(images))
    with pytest.raises(UsageError, match="not quantized"):
        correct_biases(Student(small.module), [(images,)], **traced(images))
    with pytest.raises(DataError, match="there are none"):
        fit(small, [], **traced(images))


def test_examples_unlike_those_of_the_calibration_are_told(images):
    small = quantized(Network, images)
    own = fit(small, [(images,)], **traced(images))
    assert max(own.clipped.values()) == 0 and remarks(own, own) == []  # minmax clips nothing
    brighter = images * 2
    shares = clipped(small, ((part,) for part in brighter.split(16)), **traced(images))
    grid = edit_of(small).grids[":placeholder"]
    highest = float(grid[0] * (255 - grid[1] + 0.5))
    assert shares[":placeholder"] == pytest.approx(float((brighter > highest).float().mean()))
    said = remarks(fit(small, [(brighter,)], **traced(images)), own)
    share = f"{100 * shares[':placeholder']:.0f} % of values are clipped (0.0 % there)"
    assert any(f"at :placeholder: {share}" in s for s in said), said


def test_dead_channels_and_constant_activations_are_counted_and_harmless(images):
    small = quantized(Network, images)
    module = small.module
    with torch.no_grad():
        module.again.weight.zero_()
        module.stem.weight[2] = 0
    dead = quantize(Student(module), Scheme(weight_bits=7), [(images,)], **traced(images))
    found = fit(dead, [(images,)], **traced(images))
    assert found.dead["stem:conv2d/weight"] == 1 and found.dead["again:conv2d/weight"] == 8
    assert found.constant and all(
        float(scale.min()) > 0 for scale, _ in edit_of(dead).grids.values()
    )
    assert any("1 of the output channels of stem:conv2d have" in s for s in remarks(found))
    with torch.no_grad():
        expected = module(images)
    assert torch.allclose(reference(dead, images), expected, atol=1e-3)
