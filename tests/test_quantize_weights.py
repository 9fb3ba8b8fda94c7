"""Weights stored in few bits: small files that compute in float, exactly as their grids say."""

from __future__ import annotations

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

from attar.errors import CheckpointError, ConstraintBroken, UsageError
from attar.prune import Masked
from attar.quantize import quantize_weights, quantized_reference
from attar.quantize.weight_scales import LIMITS, integers, step_sizes
from attar.runtimes import runtimes
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.runtimes.onnxruntime_profile import operators
from attar.runtimes.parity import FLOAT, bound_for, check_parity
from attar.share import share_weights
from attar.student import Student, load_student, save_student
from network_fixture import Encoder
from runtime_fixture import same_class

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
NAMES = (["input"], ["logits"])
IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TRACED = {"example": (IMAGES[:2],), "dynamic_shapes": SHAPES}


class ConvNet(nn.Module):
    """Batch norms that are folded, one of them negative; a depthwise and a transposed convolution;
    rows of 9, 16 and 144 weights, and a linear layer's of 24, no multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 24, 3, padding=1)
        self.back = nn.ConvTranspose2d(24, 24, 2, stride=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.wide(F.relu(self.deep(x))))
        return self.head(F.relu(self.back(F.max_pool2d(x, 2))).mean((2, 3)))


class Words(nn.Module):
    """An embedding whose weight is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


def student_of(network: type[nn.Module]) -> Student:
    torch.manual_seed(0)
    module = network().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return Student(module)


def stored(student: Student, precision: Any, **options: Any) -> Student:
    return quantize_weights(student, precision, **{**TRACED, **options})


def reference(student: Student, x: Tensor = IMAGES) -> np.ndarray:
    graph = quantized_reference(student.edits, student.module, (x[:2],), SHAPES)
    assert graph is not None
    with torch.no_grad():
        return graph(x).numpy()


def export(student: Student, folder: Path, x: Tensor = IMAGES, **options: Any) -> int:
    files = OnnxRuntime().export(
        student, folder, example=(x[:2],), dynamic_shapes=SHAPES, names=NAMES, **options
    )
    return sum(file.stat().st_size for file in files)


def rounded(student: Student) -> nn.Module:
    """The student's network with its weights as the edit's grids have them, written anew."""
    edit: Any = student.edits[-1]
    module = student.copy().module
    bits = {"int8": 8, "int4": 4}[edit.scheme.precision]
    with torch.no_grad():
        for path in edit.weights:
            weight, scale = module.get_parameter(path), edit.scales[path].double()
            rows = weight.flatten(1).double()
            length = edit.scheme.group if scale.shape[1] > 1 else rows.shape[1]
            steps = scale.repeat_interleave(length, 1)[:, : rows.shape[1]]
            low, high = LIMITS[bits]
            weight.copy_((steps * (rows / steps).round().clamp(low, high)).reshape(weight.shape))
    return module


# -- grids --------------------------------------------------------------------------------------


WEIGHTS = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 99)).map(
    lambda size: torch.randn(
        size[0], size[1], generator=torch.Generator().manual_seed(size[2])
    ).double()
)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.sampled_from([4, 7, 8]), st.sampled_from([None, 2, 16]))
def test_a_grid_is_no_worse_than_one_that_reaches_the_largest_value(weight, bits, group):
    scale = step_sizes(weight, bits, group=group)
    on_grid = integers(weight, scale, bits, group=group)
    low, high = LIMITS[bits]
    assert low <= int(on_grid.min()) and int(on_grid.max()) <= high
    length = min(group or weight.shape[1], weight.shape[1])
    padded = F.pad(weight, (0, -weight.shape[1] % length)).unflatten(1, (-1, length))
    error = (padded - on_grid * scale[..., None].double()).square().sum(-1)
    plain = (padded.abs().amax(-1) / high)[..., None]
    reaching = (padded - plain * (padded / plain).nan_to_num(0).round()).square().sum(-1)
    # The searched grid has the outermost value of the other side as well: never worse by more
    # than what trying 21 places can miss.
    assert (error <= reaching * 1.1 + 1e-6).all()
    assert ((padded - on_grid * scale[..., None].double()).abs()[padded == 0] == 0).all()


def test_four_bits_lose_less_than_by_reaching_the_largest_value():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    scale = step_sizes(weight, 4)
    found = (weight - integers(weight, scale, 4).flatten(1) * scale).square().mean()
    plain = weight.abs().amax(1, keepdim=True) / 7
    assert found < 0.8 * (weight - plain * (weight / plain).round()).square().mean()


def test_zeros_have_a_grid_too():
    weight = torch.zeros(2, 6)
    for bits in (4, 8):
        scale = step_sizes(weight, bits)
        assert (scale > 0).all() and not integers(weight, scale, bits).any()


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [ConvNet, Encoder])
@pytest.mark.parametrize(
    ("precision", "group"),
    [("int8", None), ("int4", 16), ("float16", None), ("bfloat16", None)],
)
def test_the_file_answers_as_the_rounded_network(network, precision, group, tmp_path):
    student = stored(student_of(network), precision, group=group)
    assert bound_for(student.edits) is FLOAT
    export(student, tmp_path, optimise=True)
    answers = OnnxRuntime().session(tmp_path)(IMAGES.numpy())[0]
    check_parity(reference(student), answers, same_class, FLOAT)
    bare = OnnxRuntime().session(tmp_path, passes="none")(IMAGES.numpy())[0]
    np.testing.assert_allclose(bare, answers, atol=1e-5)
    if precision.startswith("int"):
        with torch.no_grad():
            np.testing.assert_allclose(rounded(student)(IMAGES).numpy(), answers, atol=1e-5)
    else:
        with torch.no_grad():
            close = student.module(IMAGES).numpy()
        np.testing.assert_allclose(close, answers, atol=0.02)
        assert np.abs(close - answers).max() > 1e-6


class Large(nn.Module):
    """Weights enough that they, not the graph, make the file's size: 64 × 256 and 256 × 64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.flatten(1))))


def test_files_shrink_by_the_bits_that_weights_take(tmp_path):
    student = student_of(Large)
    plain = export(student, tmp_path / "float")
    weights = 2 * 64 * 256
    for precision, group, bits in (
        ("int4", 32, 5),  # four and a scale of 32 bits for 32 weights
        ("int8", None, 8),
        ("float16", None, 16),
        ("bfloat16", None, 16),
    ):
        small = stored(student, precision, group=group)
        for optimise in (False, True):
            size = export(small, tmp_path / f"{precision}{optimise}", optimise=optimise)
            saved = weights * (32 - bits) / 8
            assert plain - size == pytest.approx(saved, rel=0.1), (precision, optimise)


@pytest.mark.parametrize("precision", ["int8", "float16", "bfloat16"])
def test_openvino_answers_as_the_rounded_network(precision, tmp_path):
    openvino = runtimes.get("openvino")()
    if not openvino.available()[0]:
        pytest.skip("the extra `openvino` is not installed")
    student = stored(student_of(ConvNet), precision, runtime="openvino")
    openvino.export(student, tmp_path, **TRACED, names=NAMES)
    answers = openvino.session(tmp_path)(IMAGES.numpy())[0]
    check_parity(reference(student), answers, same_class, FLOAT)


def test_four_bit_products_can_be_by_integers(tmp_path):
    student = stored(student_of(Large), "int4", group=32, kernel="matmulnbits")
    export(student, tmp_path, optimise=True)
    assert {row["op"]: row["count"] for row in operators(tmp_path)}["MatMulNBits"] == 2
    answers = OnnxRuntime().session(tmp_path)(IMAGES.numpy())[0]
    check_parity(reference(student), answers, same_class, FLOAT)


def test_an_embedding_is_stored_once_for_all_that_read_it(tmp_path):
    student = student_of(Words)
    tokens = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    small = quantize_weights(student, "int4", example=(tokens[:2],), dynamic_shapes=SHAPES)
    sizes = [export(s, tmp_path / str(i), tokens) for i, s in enumerate((student, small))]
    assert sizes[0] - sizes[1] > 50 * 32 * 2.5  # of 4 bytes a weight, half a byte stays
    answers = OnnxRuntime().session(tmp_path / "1")(tokens.numpy())[0]
    check_parity(reference(small, tokens), answers, same_class, FLOAT)


def test_layers_that_are_named_stay_float():
    student = stored(student_of(Encoder), "int4", float_layers=("attend", "head"))
    paths = {"embed.weight", "up.weight", "down.weight"}
    assert set(student.edits[-1].weights) == paths
    assert "2 layers stay float" in student.edits[-1].summary()


# -- what came before -----------------------------------------------------------------------------


def test_masked_weights_stay_zero():
    student = student_of(ConvNet)
    masks = {"wide.weight": torch.rand(24, 16, 3, 3) > 0.5}
    with torch.no_grad():
        student.module.wide.weight.mul_(masks["wide.weight"])
    student = stored(student.edited(Masked(masks)), "int4", group=16)
    assert not rounded(student).wide.weight[~masks["wide.weight"]].any()
    student.check()


@pytest.mark.parametrize("network", [ConvNet, Encoder])
def test_weights_that_share_a_value_stay_equal(network):
    student = student_of(network)
    edit, _ = share_weights(student.module, bits=3)
    small = stored(student.edited(edit), "int4", group=16)
    module = rounded(small)
    for path in set(edit.assignments) & set(small.edits[-1].weights):
        assert module.get_parameter(path).unique().numel() <= 8
        assert small.edits[-1].scales[path].unique().numel() == 1
    small.check()


def test_scales_that_were_learnt_are_taken(tmp_path):
    student = student_of(ConvNet)
    learnt = {"stem.weight": torch.full((16,), 0.11), "wide.weight": torch.tensor(0.05)}
    small = stored(student, "int4", grids=learnt)
    assert small.edits[-1].scales["stem.weight"].eq(0.11).all()
    export(small, tmp_path)
    answers = OnnxRuntime().session(tmp_path)(IMAGES.numpy())[0]
    with torch.no_grad():  # the batch norm's negative factors turn steps round, not integers
        np.testing.assert_allclose(rounded(small)(IMAGES).numpy(), answers, atol=1e-5)


# -- on disk --------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
from pathlib import Path
import test_quantize_weights as here
from attar.student import load_student
student = load_student(Path(sys.argv[1]), build=None, module=here.ConvNet())
here.export(student, Path(sys.argv[2]))
"""


def test_a_saved_student_makes_the_same_file_in_another_process(tmp_path):
    student = stored(student_of(ConvNet), "int4", group=16)
    export(student, tmp_path / "here")
    save_student(student, tmp_path / "student")
    arguments = [str(tmp_path / "student"), str(tmp_path / "there")]
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], check=True, cwd=Path(__file__).parent
    )
    files = [(tmp_path / place / "model.onnx").read_bytes() for place in ("here", "there")]
    assert files[0] == files[1]


def test_changed_weights_break_the_promise():
    student = stored(student_of(Encoder), "float16").copy()
    student.check()
    with torch.no_grad():
        student.module.head.weight[0, 0] += 1
    with pytest.raises(ConstraintBroken, match="weights changed after quantization"):
        student.check()


def test_a_student_without_its_scales_is_refused(tmp_path):
    save_student(stored(student_of(Encoder), "int4"), tmp_path)
    (tmp_path / "edits.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the scales of"):
        load_student(tmp_path, build=lambda spec: Encoder(), module=Encoder())


# -- what can't be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"precision": "int3"},
            "unknown precision 'int3' for weights; did you mean 'int8' or 'int4'",
        ),
        ({"precision": "int4", "group": 15}, "an even number of weights, such as 32, not 15"),
        ({"precision": "int4", "group": 0}, "an even number of weights, such as 32, not 0"),
        ({"precision": "float16", "group": 32}, "float16 weights have no grids"),
        ({"precision": "int4", "float_layers": ("haed",)}, "no layer 'haed'; did you mean 'head'"),
        ({"precision": "int4", "float_layers": ("*",)}, "no weight is left to store as int4"),
        ({"precision": "int4", "runtime": "executorch"}, "no scheme int4-weights: it has int8"),
        ({"precision": "int4", "runtime": "openvino"}, "openvino has no scheme int4-weights"),
        ({"precision": "int8", "kernel": "matmulnbits", "group": 32}, "the kernel expanded works"),
        ({"precision": "int4", "grids": {"hed.weight": torch.ones(1)}}, "no weight 'hed.weight'"),
        ({"precision": "int4", "grids": {"head.weight": torch.ones(3)}}, "10 rows of 1 groups"),
        ({"precision": "int4", "grids": {"head.weight": torch.zeros(10)}}, "other than zero"),
    ],
)
def test_wrong_wishes_get_a_sentence(options, said):
    with pytest.raises(UsageError, match=said) as caught:
        stored(student_of(Encoder), **options)
    assert "\n" not in str(caught.value)


def test_a_weight_too_large_for_float16_is_named():
    student = student_of(Encoder)
    with torch.no_grad():
        student.module.up.weight[0, 0] = 1e5
    with pytest.raises(UsageError, match=r"can't hold up\.weight, .* 1e\+05: bfloat16 can"):
        stored(student, "float16")
    stored(student, "bfloat16")


def test_a_network_that_changed_is_not_quantized_as_the_old_one():
    edit = stored(student_of(ConvNet), "int4").edits[-1]
    with pytest.raises(CheckpointError, match="not the one that was quantized"):
        edit.graph(student_of(Encoder).module, (IMAGES[:2],), SHAPES)
