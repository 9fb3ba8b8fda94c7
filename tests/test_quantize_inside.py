"""A look inside an int8 graph: which operators are float, where they lie, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attar.quantize import Scheme, quantize
from attar.quantize.bench import RuntimeBench
from attar.quantize.inside import look_inside
from attar.runtimes import runtimes
from attar.runtimes.inside import Operator, float_operators
from attar.student import Student
from network_fixture import Encoder

SHAPES = ({0: torch.export.Dim("batch", min=1)},)


def op(node: str, name: str, precision: str, *reads: int, **more: Any) -> Operator:
    kind = {"Quantize": "convert", "Dequantize": "convert", "Reshape": "move"}.get(name, "compute")
    layer = node.rpartition("/")[0]
    has = name in {"Conv", "Add", "MatMul"}
    return Operator(node, layer, name, kind, precision, reads=reads, has_int8=has, **more)  # type: ignore[arg-type]


def reasons(graph: list[Operator], kept: dict[str, str] | None = None) -> dict[str, Any]:
    found = float_operators(graph, kept or {}, "R")
    return {f.node: (f.place, f.avoidable, f.why) for f in found}


def test_a_float_layer_between_int8_ones_lies_inside_and_ends_do_not() -> None:
    graph = [
        op("stem/Conv", "Conv", "float32", of_input=True),
        op("q", "Quantize", "float32", 0),
        op("a/Conv", "Conv", "int8", 1),
        op("dq", "Dequantize", "int8", 2),
        op("b/Conv", "Conv", "float32", 3),
        op("q2", "Quantize", "float32", 4),
        op("c/Conv", "Conv", "int8", 5),
        op("head/Conv", "Conv", "float32", 6, answers=True),
    ]
    found = reasons(graph, {"b": "the recipe says so"})
    assert found == {
        "stem/Conv": ("before", False, "nothing comes before it in int8"),
        "b/Conv": ("inside", True, "the recipe says so"),
        "head/Conv": ("after", False, "nothing comes after it in int8"),
    }
    assert reasons(graph)["b/Conv"] == ("inside", True, "no grid was set on what it answers")


def test_one_way_past_int8_is_enough_to_lie_outside() -> None:
    graph = [
        op("q", "Quantize", "float32", of_input=True),
        op("a/Conv", "Conv", "int8", 0),
        op("view", "Reshape", "float32", of_input=True),
        op("add", "Add", "float32", 1, 2),
        op("c/Conv", "Conv", "int8", 3, answers=True),
    ]
    assert reasons(graph)["add"][:2] == ("before", False)


def test_operands_and_operators_without_kernels_are_named() -> None:
    graph = [
        op("a/MatMul", "MatMul", "int8", of_input=True),
        op("norm", "LayerNorm", "float32", 0),
        op("view", "Reshape", "float32", 1),
        op("product", "MatMul", "float32", 2, 0),
        op("dq", "Dequantize", "int8", 0),
        op("add", "Add", "float32", 4, 3),
        op("bias", "Add", "float32", 0, with_constant=True),
        op("b/MatMul", "MatMul", "int8", 5, 6, answers=True),
        op("constant", "Add", "float32"),
    ]
    assert {node: why for node, (_, _, why) in reasons(graph).items()} == {
        "norm": "Attar uses no int8 kernel of R for it",
        "product": "its operands come in float from norm and a/MatMul",
        "add": "an operand comes in float from product",
        "bias": "what it reads comes in float from a/MatMul",
    }


def test_a_float_graph_has_no_quantized_region() -> None:
    assert float_operators([op("a", "Conv", "float32", of_input=True, answers=True)], {}, "R") == []


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.last(torch.relu(self.mid(x))))
        return self.head(x.mean((2, 3)))


def bench(network: nn.Module, folder: Path, runtime: str) -> RuntimeBench:
    torch.manual_seed(0)
    student, x = Student(network.eval()), torch.randn(16, 1, 8, 8)

    def quantized(layers: tuple[str, ...]) -> Student:
        scheme = Scheme(runtime=runtime, float_layers=layers)
        return quantize(student, scheme, [(x,)], example=(x[:2],), dynamic_shapes=SHAPES)

    return RuntimeBench(
        runtimes.get(runtime)(), quantized, folder, example=(x[:2],), dynamic_shapes=SHAPES,
        inputs=(x[:1].numpy(),),
    )  # fmt: skip


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_convolutional_network_is_all_int8_but_what_was_kept(tmp_path: Path, runtime) -> None:
    if not runtimes.get(runtime).available()[0]:
        pytest.skip(f"{runtime} is not installed")
    looked, x = bench(Residual(), tmp_path, runtime), torch.randn(8, 1, 8, 8)
    found = look_inside(looked, (), {}, [(x,)])
    assert found["float_inside"] == []
    kept = look_inside(looked, ("mid",), {"mid": "9 µs in int8, 5 µs in float"}, [(x,)])
    assert [(o["layer"], o["place"], o["avoidable"]) for o in kept["float_inside"]] == [
        ("mid", "inside", True)
    ]
    assert kept["float_inside"][0]["why"] == "9 µs in int8, 5 µs in float"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    rows = {row["layer"]: row for row in found["layers"] if row["op"] in ("conv2d", "linear")}
    assert list(rows) == ["stem", "mid", "last", "head"]
    assert all(row["us_before"] is not None and row["snr_db"] > 15 for row in rows.values())


def test_a_transformers_float_operators_each_have_a_reason(tmp_path: Path) -> None:
    found = look_inside(
        bench(Encoder(), tmp_path, "onnxruntime"), (), {}, [(torch.randn(8, 1, 8, 8),)]
    )
    by_op = {o["op"]: o for o in found["float_inside"]}
    for name in ("Softmax", "LayerNormalization"):
        assert not by_op[name]["avoidable"]
        assert by_op[name]["why"] == "Attar uses no int8 kernel of onnxruntime for it"
    assert all(o["why"] for o in found["float_inside"])
    counted = sum(o["count_after"] for o in found["operators"] if "QuantizeLinear" in o["op"])
    counted += sum(o["count_after"] for o in found["operators"] if o["op"] == "DequantizeLinear")
    assert found["conversions"]["count"] == counted > 0


def test_what_was_not_taken_is_looked_at_and_said_so(tmp_path: Path) -> None:
    looked, x = bench(Residual(), tmp_path, "onnxruntime"), torch.randn(8, 1, 8, 8)
    found = look_inside(looked, ("*",), {"*": "slower"}, [(x,)])
    assert found["deployed"] is False
    assert any(o["op"] == "QLinearConv" and o["count_after"] for o in found["operators"])
    assert look_inside(looked, ("*",), {}, [(x,)], given=("*",)) == {}
