"""int8 without calibration: integer products in the file, and the same answers in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from attar.errors import ConstraintBroken, UsageError
from attar.quantize import quantize_dynamically, quantized_reference
from attar.runtimes.onnx_operators import dynamic_linear
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.runtimes.onnxruntime_profile import operators
from attar.runtimes.parity import QUANTIZED, bound_for, check_parity
from attar.share import share_weights
from attar.student import Student, load_student, save_student
from network_fixture import Encoder
from runtime_fixture import same_class

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
NAMES = (["input"], ["logits"])
IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRACED = {"example": (IMAGES[:2],), "dynamic_shapes": SHAPES}
FUSED = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}


class ConvNet(nn.Module):
    """A convolution, which stays float, and a linear layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def student_of(network: type[nn.Module]) -> Student:
    torch.manual_seed(0)
    return Student(network().eval())


def export(student: Student, folder: Path, **options: bool) -> int:
    files = OnnxRuntime().export(
        student, folder, example=(IMAGES[:2],), dynamic_shapes=SHAPES, names=NAMES, **options
    )
    return sum(file.stat().st_size for file in files)


def reference(student: Student, x: Tensor = IMAGES) -> np.ndarray:
    graph = quantized_reference(student.edits, student.module, (x[:2],), SHAPES)
    assert graph is not None
    with torch.no_grad():
        return graph(x).numpy()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.sampled_from([-3.0, 0.0, 3.0]), st.booleans())
def test_the_operator_is_onnx_own_arithmetic(seed, shift, empty):
    draw = torch.Generator().manual_seed(seed)
    x = torch.zeros(2, 3, 8) if empty else torch.randn(2, 3, 8, generator=draw) + shift
    weight = torch.randint(-127, 128, (8, 5), generator=draw).to(torch.int8)
    scale, bias = torch.rand(5, generator=draw), torch.randn(5, generator=draw)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "step", "zero"])
    kinds = {"y": onnx.TensorProto.UINT8, "step": onnx.TensorProto.FLOAT}
    kinds["zero"] = onnx.TensorProto.UINT8
    outputs = [helper.make_tensor_value_info(k, v, None) for k, v in kinds.items()]
    given_x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "own", [given_x], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    y, step, zero = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    product = (y.astype(np.int64) - int(zero)) @ weight.numpy().astype(np.int64)
    wanted = product * (step * scale.numpy()) + bias.numpy()
    found = dynamic_linear(x, weight, scale, bias).numpy()
    # One step of the grid is where the two may round a tie's last bit differently.
    apart = np.abs(found - wanted).max()
    assert apart <= 1e-4 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("network", [Encoder, ConvNet])
def test_linear_layers_fuse_to_integer_products_and_answer_as_pytorch(network, bits, tmp_path):
    plain = student_of(network)
    student = quantize_dynamically(plain, weight_bits=bits, **TRACED)
    assert bound_for(student.edits) is QUANTIZED
    linear = {Encoder: 6, ConvNet: 1}[network]
    for optimise in (False, True):
        folder = tmp_path / str(optimise)
        export(student, folder, optimise=optimise)
        counted = {row["op"]: row["count"] for row in operators(folder)}
        assert sum(counted.get(op, 0) for op in FUSED) == linear
        answers = OnnxRuntime().session(folder)(IMAGES.numpy())[0]
        check_parity(reference(student), answers, same_class, QUANTIZED)
    with torch.no_grad():
        apart = np.abs(plain.module(IMAGES).numpy() - answers).max()
    assert 1e-5 < apart < 0.1


def test_the_file_holds_bytes(tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    student = Student(wide.eval())
    sizes = (
        export(student, tmp_path / "float"),
        export(quantize_dynamically(student, **TRACED), tmp_path / "int8"),
    )
    assert sizes[0] - sizes[1] == pytest.approx(3 * (64 * 512 + 512 * 10), rel=0.1)


def test_named_layers_stay_float(tmp_path):
    student = quantize_dynamically(student_of(Encoder), float_layers=("attend",), **TRACED)
    assert set(student.edits[-1].weights) == {
        "embed.weight", "up.weight", "down.weight", "head.weight"
    }  # fmt: skip
    assert "1 layers stay float" in student.edits[-1].summary()


def test_weights_that_share_a_value_stay_equal():
    student = student_of(Encoder)
    edit, _ = share_weights(student.module, bits=3)
    small = quantize_dynamically(student.edited(edit), weight_bits=8, **TRACED)
    for path in set(edit.assignments) & set(small.edits[-1].weights):
        assert small.edits[-1].scales[path].unique().numel() == 1
    small.check()


def test_a_saved_student_makes_the_same_file(tmp_path):
    student = quantize_dynamically(student_of(Encoder), weight_bits=7, **TRACED)
    save_student(student, tmp_path / "student")
    loaded = load_student(tmp_path / "student", build=lambda spec: Encoder(), module=Encoder())
    for name, each in (("before", student), ("after", loaded)):
        export(each, tmp_path / name)
    files = [(tmp_path / name / "model.onnx").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]
    with torch.no_grad():
        loaded.module.head.weight[0, 0] += 1
    with pytest.raises(ConstraintBroken, match="weights changed after quantization"):
        loaded.check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"float_layers": ("*",)}, "the network has none that float_layers leaves"),
        ({"float_layers": ("haed",)}, "no layer 'haed'; did you mean 'head'"),
        ({"runtime": "executorch"}, "executorch has no scheme int8-dynamic: it has int8"),
        ({"weight_bits": 5}, "weights take 7 or 8 bits here, not 5"),
    ],
)
def test_wrong_wishes_get_a_sentence(options, said):
    with pytest.raises(UsageError, match=said) as caught:
        quantize_dynamically(student_of(Encoder), **TRACED, **options)
    assert "\n" not in str(caught.value)
