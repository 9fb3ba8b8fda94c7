"""What is exported answers as PyTorch does, is small, and says so when it can't be."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from attar.errors import BundleError, ExportError, ParityError, UsageError
from attar.quantize import Scheme, quantize
from attar.runtimes import Runtime, onnxruntime_session, runtimes
from attar.runtimes.onnx_file import save, tidy
from attar.runtimes.onnxruntime_graph import optimise_file
from attar.runtimes.onnxruntime_profile import operators, profile
from attar.runtimes.onnxruntime_session import OnnxSession
from attar.runtimes.parity import QUANTIZED, check_parity
from attar.student import Student

RUNTIME = runtimes.get("onnxruntime")()


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.ReLU(), Residual(4), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)).mean(1))


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x.flatten(2))


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Mistaken(nn.Module):
    def forward(self, x):
        return x @ torch.ones(3, 4)


def settled(module):
    """Batch norms as after training, so that folding them is no empty exercise."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module


def images(count):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))


def tokens(count):
    return torch.randint(0, 50, (count, 7), generator=torch.Generator().manual_seed(count))


def export(module, example, folder, **options):
    batch = torch.export.Dim("batch", min=1)
    (path,) = RUNTIME.export(
        Student(module),
        folder,
        example=(example,),
        dynamic_shapes=({0: batch},),
        names=(["input"], ["logits"]),
        **options,
    )
    return path


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return settled(ConvNet())


@pytest.fixture(scope="module")
def exported(network, tmp_path_factory):
    return export(network.train(), images(2), tmp_path_factory.mktemp("conv")).parent


@pytest.mark.parametrize("batch", [1, 2, 128])
@pytest.mark.parametrize("passes", ["all", "none"])
def test_answers_are_pytorchs_at_every_batch(network, exported, batch, passes):
    x = images(batch)
    with torch.no_grad():
        expected = network.eval()(x).numpy()
    (found,) = RUNTIME.session(exported, passes=passes)(x.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_batch_norms_are_folded_and_nodes_called_as_the_persons_modules(exported):
    nodes = onnx.load(str(exported / "model.onnx")).graph.node
    assert "BatchNormalization" not in [n.op_type for n in nodes]
    names = [n.name for n in nodes]
    assert {"stem.0/Conv", "body.1.conv/Conv", "body.1/Add", "head/Gemm"} <= set(names)
    assert len(set(names)) == len(names)


def test_the_file_is_hardly_larger_than_its_weights(network, exported):
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert (exported / "model.onnx").stat().st_size < weights + 1500


def test_a_transformer_exports_in_eval_mode_and_is_left_in_training(tmp_path):
    torch.manual_seed(0)
    module = Transformer().train()
    folder = export(module, tokens(2), tmp_path).parent
    assert all(part.training for part in module.modules())
    module.eval()
    for batch in (1, 5):
        with torch.no_grad():
            expected = module(tokens(batch)).numpy()
        (found,) = RUNTIME.session(folder)(tokens(batch).numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_optimising_stores_a_graph_of_fewer_nodes_with_the_same_answers(exported, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes((exported / "model.onnx").read_bytes())
    assert optimise_file(path, [images(2).numpy()])
    before, after = (len(onnx.load(str(p)).graph.node) for p in (exported / "model.onnx", path))
    assert after < before
    for batch in (1, 2, 128):
        x = images(batch).numpy()
        expected = RUNTIME.session(exported)(x)[0]
        np.testing.assert_allclose(OnnxSession(path)(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_an_optimised_graph_that_answers_otherwise_is_not_kept(exported, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    original = (exported / "model.onnx").read_bytes()
    path.write_bytes(original)

    def broken(source, level, *, portable):
        proto = onnx.load(str(source))
        bias = next(w for w in proto.graph.initializer if w.name == "head.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
        return proto

    monkeypatch.setattr("attar.runtimes.onnxruntime_graph.optimised", broken)
    assert not optimise_file(path, [images(2).numpy()])
    assert path.read_bytes() == original
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Unsupported(), ["Unsupported", "aten._linalg_svd", "test_runtimes.py line", "svdvals"]),
        (Branching(), ["Branching", "control flow", "test_runtimes.py line", "if x.sum() > 0"]),
        (Mistaken(), ["Mistaken", "test_runtimes.py line", "x @ torch.ones(3, 4)"]),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "",
)
def test_what_cannot_be_exported_is_named(module, words, tmp_path, capfd):
    with pytest.raises(ExportError) as caught:
        export(module, images(2), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert [w for w in words if w not in message] == []
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_looking_inside_a_session(exported):
    rows = operators(exported, "none")
    assert {r["op"]: r["count"] for r in rows} == {
        "Conv": 2,
        "Relu": 2,
        "Add": 1,
        "MaxPool": 1,
        "Reshape": 1,
        "Gemm": 1,
    }
    fused = [node for row in operators(exported) for node in row["nodes"]]
    assert len(fused) <= sum(r["count"] for r in rows) + 2  # reordered for the processor at most
    times = profile(exported, (images(1).numpy(),), runs=5)
    assert "head/Gemm" in [t["node"] for t in times]
    assert sum(t["share"] for t in times) == pytest.approx(1)


def test_plain_int8_answers_like_its_source(network, exported, tmp_path):
    (path,) = RUNTIME.plain_int8(exported, tmp_path, ((images(n).numpy(),) for n in (32, 33)))
    found = OnnxSession(path)(images(64).numpy())[0]
    expected = RUNTIME.session(exported)(images(64).numpy())[0]
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    ops = {r["op"] for r in operators(path.parent)}
    assert "QLinearConv" in ops
    assert not ops & {"Conv", "Gemm", "MatMul"}


def test_eight_bit_products_do_not_overflow(tmp_path):
    """The fast kernel of x86 without VNNI adds pairs of products in 16 bits: 2·255·127 is more.
    Two products share their constants, which the slower kernel's preparation can't take."""
    tensors = {
        "scale": np.float32(1 / 255),
        "zero": np.uint8(0),
        "w": np.full((64, 16), 127, np.int8),
        "w_scale": np.float32(1 / 127),
        "w_zero": np.int8(0),
        "out_scale": np.float32(1),
    }
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
    ]
    for k in "ab":
        nodes += [
            node("DequantizeLinear", ["w", "w_scale", "w_zero"], [f"wd_{k}"]),
            node("MatMul", ["xd", f"wd_{k}"], [f"y_{k}"]),
            node("QuantizeLinear", [f"y_{k}", "out_scale", "zero"], [f"yq_{k}"]),
            node("DequantizeLinear", [f"yq_{k}", "out_scale", "zero"], [f"out_{k}"]),
        ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info(f"out_{k}", TensorProto.FLOAT, ["batch", 16]) for k in "ab"],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    save(tidy(model), path)
    for _ in ("as exported", "optimised offline"):
        for found in OnnxSession(path)(np.ones((1, 64), np.float32)):
            np.testing.assert_array_equal(found, np.full((1, 16), 64, np.float32))
        assert optimise_file(path, [np.ones((1, 64), np.float32)])


@pytest.mark.parametrize("lacking", [True, False])
def test_only_processors_that_overflow_take_the_slower_kernels(lacking, monkeypatch):
    """With VNNI the setting would double the time of every 8-bit layer for nothing."""
    monkeypatch.setattr(onnxruntime_session, "saturates", lambda: lacking)
    made = onnxruntime_session.options(1, onnxruntime_session.Level.ORT_ENABLE_ALL)
    for key in onnxruntime_session.CONFIG_WITHOUT_VNNI:
        if lacking:
            assert made.get_session_config_entry(key) == "1"
        else:
            with pytest.raises(RuntimeError):  # never set
                made.get_session_config_entry(key)


def test_asking_for_a_runtime_imports_no_pytorch():
    program = (
        "import sys\n"
        "from attar.runtimes import runtimes\n"
        "assert runtimes.get('onnxruntime').available()[0]\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def same_class(a, b):
    return a.argmax(-1) == b.argmax(-1)


logits = hnp.arrays(np.float32, (20, 5), elements=st.floats(-50, 50, width=32))


@given(logits)
def test_parity_passes_what_rounding_moves(reference):
    moved = reference + np.float32(1e-5)
    figures = check_parity(reference, moved, same_class)
    assert figures["n"] == 20
    assert figures["max_abs_diff"] <= 2e-5


@given(logits, st.integers(0, 19), st.integers(0, 4))
def test_parity_refuses_one_value_out_of_bound(reference, row, column):
    moved = reference.copy()
    moved[row, column] += 2e-3 * max(1, np.abs(reference).max())
    with pytest.raises(ParityError, match="differ from PyTorch's by up to"):
        check_parity(reference, moved, same_class)


def test_parity_of_integers_holds_the_answers():
    reference = np.eye(10, dtype=np.float32)[np.arange(200) % 10]
    near = reference + np.random.default_rng(0).normal(0, 0.05, reference.shape)
    assert check_parity(reference, near, same_class, QUANTIZED)["agreement"] == 1.0
    wrong = near.copy()
    wrong[:5] = np.roll(wrong[:5], 1, axis=1)
    with pytest.raises(ParityError, match="other answers than PyTorch on 5 of 200"):
        check_parity(reference, wrong, same_class, QUANTIZED)


def test_parity_refuses_nan_and_other_shapes():
    reference = np.zeros((4, 3), np.float32)
    with pytest.raises(ParityError, match="NaN"):
        check_parity(reference, np.full((4, 3), np.nan, np.float32), same_class)
    with pytest.raises(ParityError, match="shapes"):
        check_parity(reference, np.zeros((4, 2), np.float32), same_class)


def test_parity_excuses_ties_but_reports_them():
    reference = np.zeros((10, 2), np.float32)
    moved = reference + np.float32([0, 1e-6])
    assert check_parity(reference, moved, same_class)["agreement"] == 0.0


def test_the_runtime_that_is_exported_to_can_be_listed():
    assert runtimes.describe()["onnxruntime"].startswith("ONNX Runtime on the CPU")
    ready, version = runtimes.get("onnxruntime").available()
    assert ready and version[0].isdigit()


def test_a_runtime_without_int8_graphs_says_so(monkeypatch):
    monkeypatch.setattr(type(RUNTIME), "quantizer", Runtime.quantizer)
    with pytest.raises(UsageError, match="no int8 graphs are made for the runtime onnxruntime"):
        quantize(
            Student(ConvNet().eval()),
            Scheme(),
            [(images(4),)],
            example=(images(2),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )


@pytest.mark.parametrize("newer", [{"opset": 99}, {"ir": 99}])
def test_a_file_newer_than_the_runtime_says_what_to_do(newer, tmp_path):
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    node = helper.make_node("Relu", ["x"], ["y"])
    proto = helper.make_model(
        helper.make_graph([node], "network", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", newer.get("opset", 20))],
        ir_version=newer.get("ir", 10),
    )
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(BundleError, match=r"too old, knowing ONNX up to .* --upgrade onnxruntime"):
        RUNTIME.session(tmp_path)
