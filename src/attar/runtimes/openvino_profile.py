"""What OpenVINO really runs: the operators after its passes, their precision, the time of each."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from attar.runtimes.inside import Kind, Operator
from attar.runtimes.openvino_session import FixedRequest, OpenVinoSession

WEIGHTED = {"Conv", "Gemm", "MatMul"}
FUSED = "Subgraph"
"""Elementwise operators in one kernel that OpenVINO compiles for them."""
CONVERSIONS = {"FakeQuantize", "Convert", "QuantizeLinear", "DequantizeLinear"}
MOVES = {
    "Concat", "Concatenation", "Gather", "Reorder", "Reshape", "Shape", "ShapeOf", "Slice", "Split",
    "StridedSlice", "Transpose", "Pad", "Broadcast", "Tile",
}  # fmt: skip
"""Operators that hand values on as they are, or lay them out anew."""
HAVE_INT8 = {"Convolution", "FullyConnected", "MatMul", "Pooling", "Eltwise"}
FUSED_HAVE_INT8 = {"Add", "Mul", "MatMul"}
"""Operators that compute in int8 where their operands are on grids."""
PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "u8": "int8", "i8": "int8"}


def operators(path: Path, inputs: tuple[np.ndarray, ...]) -> list[dict[str, Any]]:
    """The operators that a session runs on this machine, in their order: `node` (the file's name of
    it, as far as passes kept it), `op`, `precision` (of what it reads: `f32`, `u8`), `kernel`.

    Example:
        >>> operators(Path("bundle/model.onnx"), (images,))  # doctest: +SKIP
        [{'node': 'conv1/Conv', 'op': 'Convolution', 'precision': 'u8', 'kernel': ...}, ...]
    """
    graph = OpenVinoSession(path).compiled(tuple(x.shape for x in inputs)).get_runtime_model()
    owner = Owners(path)
    rows = []
    for node in graph.get_ordered_ops():
        told = node.get_rt_info()
        op, precision, kernel = (
            told[key].astype(str) for key in ("layerType", "runtimePrecision", "primitiveType")
        )
        name = owner.node(node.get_friendly_name())
        rows.append({"node": name, "op": op, "precision": precision, "kernel": kernel})
    return rows


def layer_times(
    path: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
) -> dict[str, float]:
    """As `Runtime.layer_times`; OpenVINO counts whole microseconds."""
    shapes = tuple(x.shape for x in inputs)
    compiled = OpenVinoSession(path, threads=threads).compiled(shapes, PERF_COUNT="YES")
    call = FixedRequest(compiled, shapes)
    owner = Owners(path)
    times: dict[str, float] = {}
    for name, us in _times(call, inputs, runs).items():
        if layer := owner.layer(name):
            times[layer] = times.get(layer, 0.0) + us
    return times


def inside(
    path: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
) -> list[Operator]:
    """As `Runtime.inside`; OpenVINO counts whole microseconds, and what it only does once, when it
    compiles, is left out."""
    shapes = tuple(x.shape for x in inputs)
    compiled = OpenVinoSession(path, threads=threads).compiled(shapes, PERF_COUNT="YES")
    times = _times(FixedRequest(compiled, shapes), inputs, runs)
    owner = Owners(path)
    given: set[str] = set()
    places: dict[str, int] = {}
    found: list[Operator] = []
    answers: set[str] = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        name, told = node.get_friendly_name(), node.get_rt_info()
        sources = [i.get_source_output().get_node().get_friendly_name() for i in node.inputs()]
        of_data = [s for s in sources if s in places or s in given]
        op = told["layerType"].astype(str)
        if op == "Input":
            given.add(name)
        elif op == "Output":
            answers.update(sources)
        elif of_data:
            places[name] = len(found)
            done = owner.operator(name)
            precision = told["runtimePrecision"].astype(str)
            found.append(
                Operator(
                    node=owner.node(name),
                    layer=owner.node(name).rpartition("/")[0],
                    op=done if op == FUSED and done else op,
                    kind=_kind(op, done),
                    precision=PRECISIONS.get(precision, precision),
                    us=times.get(name, 0.0),
                    reads=tuple(dict.fromkeys(places[s] for s in of_data if s in places)),
                    of_input=any(s in given for s in of_data),
                    has_int8=op in HAVE_INT8 or (op == FUSED and done in FUSED_HAVE_INT8),
                    with_constant=len(of_data) < len(sources),
                )
            )
    return [replace(o, answers=name in answers) for name, o in zip(places, found, strict=True)]


def _kind(op: str, done: str) -> Kind:
    if op in CONVERSIONS or (op == FUSED and done in CONVERSIONS):
        return "convert"
    return "move" if op in MOVES else "compute"


def _times(call: FixedRequest, inputs: tuple[np.ndarray, ...], runs: int) -> dict[str, float]:
    """By OpenVINO's name of a node: its median time in microseconds."""
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        call(inputs)
        for row in call.profile():
            taken[row.node_name].append(row.real_time.total_seconds() * 1e6)
    return {name: statistics.median(each) for name, each in taken.items()}


class Owners:
    """Ways from OpenVINO's names back to the file's. It appends to a node's name what it made of it
    (`conv1/Conv/WithoutBiases`), and calls the last node by the output."""

    def __init__(self, path: Path) -> None:
        nodes = onnx.load(str(path)).graph.node
        self._named = {v: n for n in nodes for v in (*n.output, n.name)}

    def node(self, name: str) -> str:
        """The file's name of a node; the name itself where the file has none like it."""
        found = self._find(name)
        return found.name if found is not None else name

    def operator(self, name: str) -> str:
        """What the file calls the operator; empty where it has none like it."""
        found = self._find(name)
        return found.op_type if found is not None else ""

    def layer(self, name: str) -> str | None:
        """The path of the module whose weights the node computes with."""
        found = self._find(name)
        if found is None or found.op_type not in WEIGHTED:
            return None
        return found.name.rpartition("/")[0] or None

    def _find(self, name: str) -> onnx.NodeProto | None:
        while name and name not in self._named:
            name = name.rpartition("/")[0]
        return self._named.get(name)
