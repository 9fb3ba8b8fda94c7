"""Weights that share values, as an exported file has them: a few values and small indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from attar.prune import Masked
from attar.quantize import Scheme, quantize, quantize_weights
from attar.runtimes import Runtime, onnx_codebooks, runtimes
from attar.runtimes.few_values import few_values
from attar.runtimes.onnx_codebooks import use_codebooks
from attar.runtimes.onnx_file import embed, save
from attar.runtimes.onnx_lookup import (
    complete,
    function_name,
    lookup,
    multiple,
    pack,
    tabled,
    tables,
)
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.runtimes.onnxruntime_profile import operators
from attar.runtimes.onnxruntime_session import OnnxSession
from attar.share import share_weights
from attar.student import Student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
NAMES = (["input"], ["logits"])
IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 50, (16, 6), generator=torch.Generator().manual_seed(0))
OPSET = 20


class ConvNet(nn.Module):
    """Batch norms that are folded into a convolution, a transposed one and a linear layer, some of
    their factors negative; 16 · 9, 24 · 16 · 9, 24 · 7 · 4 and 10 · 7 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.back, self.head = nn.ConvTranspose2d(24, 7, 2, stride=2), nn.Linear(7, 10)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(16), nn.BatchNorm2d(24), nn.BatchNorm2d(7), nn.BatchNorm1d(10)]
        )
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        x = F.relu(self.norms[1](self.wide(x)))
        x = F.relu(self.norms[2](self.back(F.max_pool2d(x, 2))))
        return self.norms[3](self.head(x.mean((2, 3))))


class Plain(nn.Module):
    """Convolutions without batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.wide(F.relu(self.stem(x)))).flatten(1))


class Words(nn.Module):
    """An embedding, read by attention, whose weight is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head((x + self.attend(x, x, x, need_weights=False)[0]).mean(1))


def shared(network: type[nn.Module], bits: int, module: nn.Module | None = None) -> Student:
    torch.manual_seed(0)
    module = network().eval() if module is None else module
    edit, _ = share_weights(module, bits)
    return Student(module).edited(edit)


def inputs(network: type[nn.Module]) -> Tensor:
    return TOKENS if network is Words else IMAGES


class Exports:
    """A student's file, and the file with all weights as they are."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch

    def __call__(
        self, student: Student, x: Tensor, runtime: Runtime | None = None, **options: Any
    ) -> tuple[Path, Path]:
        runtime = runtime or OnnxRuntime()
        small, dense = (self._folder / name for name in ("small", "dense"))
        export = {"example": (x[:2],), "dynamic_shapes": SHAPES, "names": NAMES, **options}
        runtime.export(student, small, **export)
        with self._patch.context() as patch:
            patch.setattr(onnx_codebooks, "share_constants", lambda *_, **__: None)
            runtime.export(student, dense, **export)
        return small, dense


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exports:
    return Exports(tmp_path, monkeypatch)


def size(folder: Path) -> int:
    return (folder / "model.onnx").stat().st_size


def answer(folder: Path, x: Tensor, runtime: Runtime | None = None, **options: Any) -> np.ndarray:
    return (runtime or OnnxRuntime()).session(folder, **options)(x.numpy())[0]


def kinds(folder: Path) -> dict[tuple[str, str], int]:
    return {(row["domain"], row["op"]): row["count"] for row in operators(folder)}


def functions(folder: Path) -> set[str]:
    return {f.name for f in onnx.load(str(folder / "model.onnx")).functions}


# -- indices ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 15), st.integers(1, 50), st.integers(1, 3), st.data())
def test_what_is_packed_is_looked_up_by_onnx_itself(bits, count, length, data):
    known = data.draw(st.integers(2 ** (bits - 1), 2**bits) if bits > 1 else st.integers(1, 2))
    numbers = np.random.default_rng(0)
    indices = numbers.integers(0, known, count)
    values = numbers.standard_normal((known, length)).astype(np.float32)
    values = values[:, 0] if length == 1 else values
    nodes, names = tables(tabled(bits), "t")
    cut = count % multiple(bits) > 0
    stored = pack(indices, bits)
    assert stored.nbytes == (count + -count % multiple(bits)) * bits / 8
    function = lookup(bits, cut=cut, opset=OPSET)
    name = function_name(bits, cut=cut)
    call = helper.make_node(name, ["s", "v", "n", *names], ["y"], domain="attar")
    graph = helper.make_graph(
        [*nodes, call],
        "graph",
        [],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(array, name)
            for name, array in (
                ("s", stored),
                ("v", complete(values, bits)),
                ("n", np.array([count, length])),
            )
        ],
    )
    sets = [helper.make_opsetid("", OPSET), helper.make_opsetid("attar", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=sets)
    (found,) = ReferenceEvaluator(model).run(None, {})
    np.testing.assert_array_equal(found, values[indices].reshape(count, length))


# -- values -------------------------------------------------------------------------------------


def test_values_that_only_compare_as_equal_stay_apart():
    array = np.array([[0.0, -0.0, np.nan, 1.0]], np.float32)
    found = few_values(array, {})
    assert found is not None
    assert found.values[found.indices].tobytes() == array.tobytes()
    assert len(found.values) == 4


@pytest.mark.parametrize("axis", [0, 1])
def test_factors_of_rows_are_found_to_the_last_bit(axis):
    numbers = np.random.default_rng(0)
    own = numbers.standard_normal(4).astype(np.float32)[numbers.integers(0, 4, (32, 24, 3, 3))]
    own[3] = 0
    size = [-1 if i == axis else 1 for i in range(4)]
    factor = numbers.standard_normal(own.shape[axis]).astype(np.float32).reshape(size)
    factor.flat[5] = 0
    found = few_values(own * factor, {"other": own + 1, "own": own})
    assert found is not None and found.factor is not None
    rebuilt = found.values[found.indices].reshape(found.shape) * found.factor
    np.testing.assert_array_equal(rebuilt, own * factor)
    assert len(found.values) <= 5


def test_another_weight_of_the_same_shape_is_not_taken_for_it():
    numbers = np.random.default_rng(0)
    array, own = numbers.standard_normal((2, 16, 16)).astype(np.float32)
    found = few_values(array, {"own": own.round()})
    assert found is not None
    np.testing.assert_array_equal(found.values[found.indices].reshape(16, 16), array)


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "bits", "optimise"),
    [(ConvNet, 2, True), (Plain, 5, False), (Encoder, 5, True), (Words, 2, True)],
)
def test_the_file_is_small_and_answers_bit_for_bit(network, bits, optimise, exports):
    student, x = shared(network, bits), inputs(network)
    small, dense = exports(student, x, optimise=optimise)
    weights = sum(p.numel() for p in student.module.parameters() if p.dim() > 1)
    saved = weights * (32 - bits) / 8
    assert 0.6 * saved < size(dense) - size(small) < saved
    np.testing.assert_array_equal(answer(small, x), answer(dense, x))
    np.testing.assert_allclose(answer(small, x, passes="none"), answer(dense, x), atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(answer(small, x), student.module(x).numpy(), atol=1e-5)


def product(weight: np.ndarray) -> onnx.ModelProto:
    """x times a constant, which a cast makes a float."""
    width = weight.shape[0]
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["floats"], to=onnx.TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "floats"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    sets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def products(proto: onnx.ModelProto, folder: Path) -> np.ndarray:
    path = folder / "product.onnx"
    save(proto, path)
    width = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    x = np.random.default_rng(1).standard_normal((3, width)).astype(np.float32)
    return OnnxSession(path)(x)[0]


@pytest.mark.parametrize("kind", [np.float32, np.float16, bfloat16, np.int8, np.uint8])
@pytest.mark.parametrize("shape", [(64, 64), (63, 65)])  # the second leaves bytes half full
@pytest.mark.parametrize("inline", [False, True])
def test_every_number_of_bits_takes_its_room(kind, shape, inline, tmp_path):
    numbers = np.random.default_rng(0)
    room = 8 * np.dtype(kind).itemsize
    for bits in range(1, 9):
        values = (numbers.permutation(2**bits) - 2 ** (bits - 1)).astype(kind)
        dense = product(values[numbers.integers(0, 2**bits, shape)])
        small = use_codebooks(dense, {}, inline=inline)
        if bits < 0.6 * room:
            taken = shape[0] * shape[1] * bits / 8 + 2**bits * room / 8
            assert small.ByteSize() == pytest.approx(taken + 850, abs=650)
        assert small.ByteSize() <= dense.ByteSize()
        np.testing.assert_array_equal(products(small, tmp_path), products(dense, tmp_path))


def test_nothing_is_looked_up_once_the_file_is_loaded(exports):
    small, dense = exports(shared(ConvNet, 3), IMAGES, optimise=True)
    assert functions(small)
    assert kinds(small) == kinds(dense)


def test_weights_that_were_pruned_and_shared_stay_zero(exports):
    torch.manual_seed(0)
    module = Plain().eval()
    mask = torch.rand(10, 512) > 0.7
    with torch.no_grad():
        module.head.weight.mul_(mask)
    student = shared(Plain, 2, module).edited(Masked({"head.weight": mask}))
    small, dense = exports(student, IMAGES)
    assert size(small) < size(dense) / 4
    np.testing.assert_array_equal(answer(small, IMAGES), answer(dense, IMAGES))


def test_a_file_without_shared_weights_is_as_it_was(exports):
    torch.manual_seed(0)
    small, dense = exports(Student(ConvNet().eval()), IMAGES)
    assert (small / "model.onnx").read_bytes() == (dense / "model.onnx").read_bytes()


def test_what_would_not_be_smaller_is_left(exports):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    small, dense = exports(shared(nn.Sequential, 8, network), IMAGES)
    assert (small / "model.onnx").read_bytes() == (dense / "model.onnx").read_bytes()


def test_the_file_can_be_told_what_its_input_wants(exports):
    small, dense = exports(shared(Plain, 2), IMAGES)
    embed(small / "model.onnx", {"schema": 1})
    np.testing.assert_array_equal(answer(small, IMAGES), answer(dense, IMAGES))


# -- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_runs_of_weights_are_entries_of_a_codebook(turned, tmp_path):
    numbers = np.random.default_rng(0)
    codebook = numbers.standard_normal((16, 4)).astype(np.float32)
    weight = codebook[numbers.integers(0, 16, 64 * 12)].reshape(64, 48)
    # As an exported product of matrices has a linear layer's weight: runs lie across its rows.
    dense = product(weight.T if turned else weight)
    small = use_codebooks(dense, {}, {4})
    assert small.ByteSize() < 64 * 12 / 2 + codebook.nbytes + 1200
    assert small.ByteSize() < use_codebooks(dense, {}).ByteSize()
    np.testing.assert_array_equal(products(small, tmp_path), products(dense, tmp_path))


def test_the_lengths_of_runs_are_the_edits(exports):
    class Runs(Masked):
        def runs(self) -> dict[str, int]:
            return {"1.weight": 8}

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(4, 8)[torch.randint(0, 4, (320,))].reshape(40, 64))
    small, dense = exports(Student(network).edited(Runs({})), IMAGES)
    assert size(dense) - size(small) > 0.8 * 40 * 64 * 4
    np.testing.assert_array_equal(answer(small, IMAGES), answer(dense, IMAGES))


# -- quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "optimise"), [(ConvNet, True), (Encoder, False)])
def test_int8_weights_that_share_take_fewer_bits_and_the_same_kernels(network, optimise, exports):
    student = shared(network, 3)
    traced = {"example": (IMAGES[:2],), "dynamic_shapes": SHAPES}
    student = quantize(student, Scheme(), [(IMAGES,)], **traced)
    small, dense = exports(student, IMAGES, optimise=optimise)
    assert size(small) <= size(dense)
    if network is ConvNet:  # the other's matrices are too small for a quarter to be saved
        assert functions(small)
        assert size(small) < size(dense)
    assert kinds(small) == kinds(dense)
    np.testing.assert_array_equal(answer(small, IMAGES), answer(dense, IMAGES))
    bare = [answer(folder, IMAGES, passes="none") for folder in (small, dense)]
    np.testing.assert_allclose(*bare, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int8", {}),
        ("int4", {"group": 16}),
        ("int4", {"group": 32, "kernel": "matmulnbits"}),
        ("float16", {}),
        ("bfloat16", {}),
    ],
)
@pytest.mark.parametrize("network", [ConvNet, pytest.param(Encoder, marks=pytest.mark.long)])
def test_weights_in_few_bits_that_share_take_no_more(network, precision, options, exports):
    traced = {"example": (IMAGES[:2],), "dynamic_shapes": SHAPES}
    student = quantize_weights(shared(network, 2), precision, **traced, **options)
    small, dense = exports(student, IMAGES, optimise=True)
    assert size(small) <= size(dense)
    if network is ConvNet:
        assert size(small) < size(dense)
    assert kinds(small) == kinds(dense)
    np.testing.assert_array_equal(answer(small, IMAGES), answer(dense, IMAGES))


# -- other runtimes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "bits"), [(ConvNet, 2), (Encoder, 5)])
def test_openvino_reads_it_and_looks_nothing_up_in_a_call(network, bits, exports):
    openvino = runtimes.get("openvino")()
    if not openvino.available()[0]:
        pytest.skip("the extra `openvino` is not installed")
    x = inputs(network)
    small, dense = exports(shared(network, bits), x, openvino)
    assert not functions(small)
    assert size(small) < size(dense)
    np.testing.assert_array_equal(answer(small, x, openvino), answer(dense, x, openvino))
    seen = [[o.op for o in openvino.inside(f, (x.numpy(),), runs=1)] for f in (small, dense)]
    assert seen[0] == seen[1]


def test_openvino_keeps_its_int8_kernels(exports):
    openvino = runtimes.get("openvino")()
    if not openvino.available()[0]:
        pytest.skip("the extra `openvino` is not installed")
    traced = {"example": (IMAGES[:2],), "dynamic_shapes": SHAPES}
    student = quantize(shared(ConvNet, 3), Scheme(runtime="openvino"), [(IMAGES,)], **traced)
    small, dense = exports(student, IMAGES, openvino)
    assert size(small) < size(dense)
    np.testing.assert_array_equal(answer(small, IMAGES, openvino), answer(dense, IMAGES, openvino))
    told = [openvino.inside(f, (IMAGES.numpy(),), runs=1) for f in (small, dense)]
    assert [(o.op, o.precision) for o in told[0]] == [(o.op, o.precision) for o in told[1]]
