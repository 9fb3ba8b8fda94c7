"""Quantization: graphs that fuse completely, answer like PyTorch, and come out the same again."""

from __future__ import annotations

import collections
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import ConstraintBroken, DataError, ExportError
from attar.measure.intervals import Interval
from attar.prune import Masked
from attar.quantize import Scheme, quantize, quantized_reference, ranges, safe_on, weight_bits
from attar.quantize.fallback import decide
from attar.quantize.ranges import Histogram
from attar.quantize.ranges.entropy import divergence
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.runtimes.onnxruntime_graph import optimise_file
from attar.runtimes.onnxruntime_profile import operators
from attar.share import share_weights
from attar.student import Student, save_student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
NAMES = (["input"], ["logits"])
FLOAT_COMPUTE = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Mul", "Relu", "Clip"}
FLOAT_COMPUTE |= {"ReduceMean", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Sigmoid"}


class Network(nn.Module):
    """A padded shortcut, a depthwise convolution, a batch norm that follows no convolution, pooling
    before a ReLU, dropout, in-place operators, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.norm = nn.BatchNorm2d(8)
        self.deep, self.deep_norm = nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.hidden, self.drop, self.head = nn.Linear(192, 16), nn.Dropout(), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.stem_norm(self.stem(x)), 2), inplace=True)
        inner = F.relu6(self.deep_norm(self.deep(F.relu(self.norm(x)))))
        wide = self.wide(inner)
        wide += F.pad(x, (0, 0, 0, 0, 2, 2))
        x = F.relu(wide).flatten(1)
        return self.head(self.drop(F.relu(self.hidden(x))))


class Pooled(nn.Module):
    """Concatenation, slicing, a gate, global average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 6, 5, padding=2)
        self.gate, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 16, 3, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        x = x * torch.sigmoid(self.gate(x))
        x = F.avg_pool2d(F.leaky_relu(self.last(x)[:, :, :2, :2]), 2)
        return self.head(x.mean((2, 3)))


class Excited(nn.Module):
    """SiLUs, and a gate a channel: squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = F.silu(self.last(x * torch.sigmoid(gate)), inplace=True)
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    """One convolution used twice, each time with a batch norm of its own; its first answer is read
    by two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = (
            nn.Conv2d(1, 1, 3, padding=1),
            nn.BatchNorm2d(1),
            nn.BatchNorm2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        once = self.conv(x)
        x = F.relu(self.first(once)) + once
        return F.relu(self.second(self.conv(x))).flatten(1)


def student_of(network: type[nn.Module], seed: int = 0) -> Student:
    torch.manual_seed(seed)
    module = network().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return Student(module)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(student: Student, images: Tensor, **scheme: Any) -> Student:
    scheme = {"weight_bits": 7, "observer": "minmax", **scheme}
    return quantize(
        student,
        Scheme(**scheme),
        ((part,) for part in images.split(32)),
        example=(images[:2],),
        dynamic_shapes=SHAPES,
    )


def reference(student: Student, images: Tensor) -> Tensor:
    graph = quantized_reference(student.edits, student.module, (images[:2],), SHAPES)
    assert graph is not None
    with torch.no_grad():
        return graph(images)


def exported(student: Student, folder: Path, images: Tensor) -> np.ndarray:
    runtime = OnnxRuntime()
    runtime.export(student, folder, example=(images[:2],), dynamic_shapes=SHAPES, names=NAMES)
    return runtime.session(folder)(images.numpy())[0]


def counted(folder: Path) -> collections.Counter[str]:
    return collections.Counter({row["op"]: row["count"] for row in operators(folder)})


@pytest.mark.parametrize("network", [Network, Pooled, Excited])
def test_everything_inside_runs_in_int8_and_answers_as_pytorch(network, images, tmp_path):
    student = student_of(network)
    small = quantized(student, images)
    answers = exported(small, tmp_path, images)
    found = counted(tmp_path)
    assert not FLOAT_COMPUTE & found.keys(), found
    assert found["QLinearConv"] == 4 and found["QuantizeLinear"] == 1
    assert found["DequantizeLinear"] == 0, "a conversion is left between int8 kernels"
    expected = reference(small, images).numpy()
    assert np.abs(answers - expected).max() < 0.02 * np.abs(expected).max()
    with torch.no_grad():
        before = student.module(images).numpy()
    noise = np.square(expected - before).sum() / np.square(before).sum()
    assert noise < 0.01


def test_a_transformer_keeps_its_norms_and_attention_in_float(images, tmp_path):
    student = student_of(Encoder)
    small = quantized(student, images)
    answers = exported(small, tmp_path, images)
    found = counted(tmp_path)
    integer = sum(n for op, n in found.items() if op in ("QGemm", "MatMulIntegerToFloat"))
    assert integer >= 4, found
    assert found["LayerNormalization"] == 1 and found["Softmax"] == 1
    expected = reference(small, images).numpy()
    assert np.abs(answers - expected).max() < 0.02 * np.abs(expected).max()


def test_shared_convolutions_and_shared_answers_stay_right(images):
    student = student_of(Twice)
    answers = reference(quantized(student, images), images)
    with torch.no_grad():
        expected = student.module(images)
    assert (answers - expected).abs().max() < 0.05 * expected.abs().max()


def test_named_layers_stay_float(images, tmp_path):
    small = quantized(student_of(Network), images, float_layers=("deep", "head"))
    answers, expected = exported(small, tmp_path, images), reference(small, images).numpy()
    assert np.abs(answers - expected).max() < 0.02 * np.abs(expected).max()
    found = counted(tmp_path)
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1, found
    assert sum(found[op] for op in ("Conv", "FusedConv")) == 1
    assert sum(found[op] for op in ("Gemm", "FusedGemm")) == 1


@pytest.mark.parametrize(("high", "layers"), [(0.99, ()), (1.01, ("*",))])
def test_int8_that_is_not_surely_as_fast_as_float_is_not_kept(high, layers):
    class Bench:
        def ratio(self, float_layers: tuple[str, ...]) -> Interval:
            return Interval(high - 0.03, high - 0.06, high, "faked")

        def times(self, float_layers: tuple[str, ...]) -> dict[str, tuple[float, float]]:
            return {}

    assert decide(Bench()).float_layers == layers


def test_a_network_all_in_float_keeps_its_weights_in_bytes(images, tmp_path):
    student = student_of(Network)
    exported(student, tmp_path / "before", images)
    small = quantized(student, images, float_layers=("*",))
    answers = exported(small, tmp_path / "after", images)
    undone = {"Cast", "Mul", "DequantizeLinear"} & counted(tmp_path / "after").keys()
    assert not undone, "bytes are expanded in every call, not once when loading"
    assert np.allclose(answers, reference(small, images).numpy(), atol=1e-4)
    before, after = ((tmp_path / f / "model.onnx").stat().st_size for f in ("before", "after"))
    assert optimise_file(tmp_path / "after" / "model.onnx", [images.numpy()])
    assert (tmp_path / "after" / "model.onnx").stat().st_size < 1.1 * after
    assert after < before - 0.6 * sum(
        p.numel() * 4 for p in student.module.parameters() if p.dim() > 1
    )


def test_a_fresh_process_makes_the_same_graph(images, tmp_path, tiny_net):
    student = Student(tiny_net().eval())
    small = quantized(student, images)
    np.save(tmp_path / "images.npy", images.numpy())
    np.save(tmp_path / "answers.npy", reference(small, images).numpy())
    save_student(small, tmp_path / "student")
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest, numpy, pathlib, torch, attar.quantize
from attar.student import load_student
folder = pathlib.Path({str(tmp_path)!r})
module = conftest.tiny_net.__wrapped__()()
student = load_student(folder / "student", build=None, module=module)
images = torch.from_numpy(numpy.load(folder / "images.npy"))
shapes = ({{0: torch.export.Dim("batch", min=1)}},)
graph = attar.quantize.quantized_reference(student.edits, module, (images[:2],), shapes)
with torch.no_grad():
    assert numpy.array_equal(graph(images).numpy(), numpy.load(folder / "answers.npy"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def weights_of(student: Student, images: Tensor) -> list[Tensor]:
    """The integer weights of a quantized student's graph."""
    graph = quantized_reference(student.edits, student.module, (images[:2],), SHAPES)
    assert graph is not None
    return [t for t in graph.state_dict().values() if t.dtype == torch.int8 and t.dim() > 1]


def test_masked_weights_stay_zero(images):
    student = student_of(Network)
    masks = {}
    for name in ("stem.weight", "wide.weight", "hidden.weight"):
        weight = student.module.get_parameter(name)
        masks[name] = torch.rand_like(weight) > 0.6
        weight.data *= masks[name]
    small = quantized(student.edited(Masked(masks)), images)
    integers = {tuple(w.shape): w for w in weights_of(small, images)}
    for mask in masks.values():
        assert not integers[tuple(mask.shape)][~mask].any()


def test_a_codebook_does_not_grow(images):
    student = student_of(Network)
    for norm in student.module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.abs_()
    edit, _ = share_weights(student.module, 3, [])
    small = quantized(student.edited(edit), images)
    shared = {tuple(student.module.get_parameter(p).shape) for p in edit.assignments}
    sizes = [len(w.unique()) for w in weights_of(small, images) if tuple(w.shape) in shared]
    assert len(sizes) == len(shared) and max(sizes) <= 8


def test_changed_weights_break_the_promise(images):
    small = quantized(student_of(Network), images)
    small.check()
    small.module.wide.weight.data[0, 0, 0, 0] += 1e-6
    with pytest.raises(ConstraintBroken, match="changed after quantization"):
        small.check()


def test_seven_bit_weights_cannot_overflow_sixteen(images):
    for bits, limit in ((7, 64), (8, 127)):
        small = quantized(student_of(Network), images, weight_bits=bits)
        assert max(int(w.abs().max()) for w in weights_of(small, images)) == limit
    assert 255 * 64 * 2 < 2**15


def test_where_weights_are_safe_is_said():
    assert weight_bits(8) == 8 and weight_bits(7) == 7
    assert safe_on(7) != safe_on(8)


def test_a_channel_of_tiny_weights_keeps_its_bias(images):
    student = student_of(Network)
    student.module.head.weight.data[3] = 1e-12
    student.module.head.bias.data[3] = 5.0
    answers = reference(quantized(student, images), images)
    assert torch.allclose(answers[:, 3], torch.tensor(5.0), atol=0.01)


def test_calibration_refuses_what_is_not_finite(images):
    spoilt = images.clone()
    spoilt[40, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        quantized(student_of(Network), spoilt)
    with pytest.raises(DataError, match="needs examples"):
        quantize(student_of(Network), Scheme(), [], example=(images[:2],), dynamic_shapes=SHAPES)


def test_a_network_that_cannot_be_traced_is_named(images):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    said = r"Branching, at test_quantize.py line \d+ \(return x if x.sum\(\) > 0.*torch.where"
    with pytest.raises(ExportError, match=said):
        quantized(Student(Branching().eval()), images)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), min_size=1, max_size=5
    )
)
def test_a_histogram_counts_every_value_but_zero_whatever_comes_when(parts):
    seen = Histogram()
    for part in parts:
        seen.add(torch.tensor(part))
    values = torch.tensor([v for part in parts for v in part])
    assert float(seen.counts.sum()) == int((values != 0).sum())
    assert (seen.low, seen.high) == (min(0.0, float(values.min())), max(0.0, float(values.max())))
    for name in ranges.names():
        low, high = ranges.get(name)(seen)
        assert seen.low <= low <= 0 <= high <= seen.high


@pytest.mark.parametrize("ends", [(-4.0, 4.0), (-2.0, 3.0), (0.0, 1.5), (-0.5, 0.0)])
def test_the_entropy_of_a_range_is_that_of_its_definition(ends):
    """By a loop over bins, from the paper's description."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)).tolist()
    seen = Histogram()
    seen.add(torch.tensor(values))
    low, high = ends
    bins = {}
    for centre, count in zip(seen.centres().tolist(), seen.counts.tolist(), strict=True):
        if low <= centre <= high:
            bins[centre] = count
    outside = {"below": 0.0, "above": 0.0}
    for centre, count in zip(seen.centres().tolist(), seen.counts.tolist(), strict=True):
        if centre < low:
            outside["below"] += count
        elif centre > high:
            outside["above"] += count
    p = dict(bins)
    p[min(bins)] += outside["below"]
    p[max(bins)] += outside["above"]
    steps: dict[int, list[float]] = {}
    for centre in bins:
        steps.setdefault(min(int((centre - low) * 255 / (high - low)), 254), []).append(centre)
    q = dict.fromkeys(bins, 0.0)
    for members in steps.values():
        some = [c for c in members if bins[c]]
        for c in some:
            q[c] = sum(bins[m] for m in members) / len(some)
    total_p, total_q = sum(p.values()), sum(q.values())
    wanted = sum(
        (count / total_p) * math.log((count / total_p) / max(q[c] / total_q, 1e-9))
        for c, count in p.items()
        if count
    )
    assert divergence(seen, low, high) == pytest.approx(wanted, rel=1e-9)


def test_entropy_clips_what_hardly_comes():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    values[0] = 100.0
    seen = Histogram()
    seen.add(values)
    low, high = ranges.get("entropy")(seen)
    assert low == 0 and 2 < high < 30


def test_outliers_are_clipped_where_that_helps():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[0] = 100.0
    seen = Histogram()
    for part in values.split(1000):
        seen.add(part)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        return float(((values.clamp(low, high) / scale).round() * scale - values).square().mean())

    errors = {name: error(*ranges.get(name)(seen)) for name in ranges.names()}
    assert errors["mse"] == min(errors.values()) < 0.9 * errors["minmax"]


def test_the_moving_average_is_that_of_each_batchs_extremes():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-50.0, 4.0]), torch.tensor([1.0, 3.0])]
    low, high = -1.0, 2.0
    seen = Histogram()
    for batch in batches:
        seen.add(batch)
    for batch in batches[1:]:
        low = 0.9 * low + 0.1 * float(batch.min())
        high = 0.9 * high + 0.1 * float(batch.max())
    assert ranges.get("moving-average")(seen) == pytest.approx((low, high))
    assert ranges.get("minmax")(seen) == (-50.0, 4.0)
    positive = Histogram()
    positive.add(torch.tensor([3.0, 5.0]))
    assert ranges.get("moving-average")(positive) == (0.0, 5.0)


def test_the_histogram_observer_is_the_one_of_least_squared_error():
    assert ranges.get("histogram") is ranges.get("mse")


def test_zeros_alone_get_a_grid_of_a_sound_scale(images):
    student = student_of(Network)
    student.module.wide.weight.data.zero_()
    student.module.wide.bias.data.zero_()
    small = quantized(student, images)
    assert all(1e-6 < float(scale.min()) < 1e3 for scale, _ in small.edits[-1].grids.values())
