"""What ONNX Runtime really runs: the operators after its passes, and the time of each."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from attar.runtimes.base import GraphPasses
from attar.runtimes.inside import Kind, Operator
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.runtimes.onnxruntime_graph import optimised
from attar.runtimes.onnxruntime_session import Level, load, options

NEW_LAYOUT = "_nchwc"
COMPUTE = {
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
}
"""Operators with weights, before and after passes."""
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
MOVES = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "ReorderInput",
    "ReorderOutput", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip
"""Operators that hand values on as they are, shapes among them, or lay them out anew."""
HAVE_INT8 = {
    "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul", "MaxPool",
    "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Relu", "Clip",
}  # fmt: skip
"""Float operators that `OnnxRuntimeQuantizer` has int8 kernels take over, or vanish into one."""
KERNEL = "_kernel_time"
PRECISIONS = {"float": "float32", "uint8": "int8"}
FLOAT = onnx.TensorProto.FLOAT


def operators(folder: Path, passes: GraphPasses = "all") -> list[dict[str, Any]]:
    """The operators of the graph that a session in this machine runs, most frequent first:
    `op`, `domain`, `count`, `nodes` (their names: the person's module paths, as far as fusing
    kept them).

    Example:
        >>> operators(Path("bundle"))                         # doctest: +SKIP
        [{'op': 'QLinearConv', 'domain': '', 'count': 9, 'nodes': ['conv1/Conv', ...]}, ...]
    """
    level = Level.ORT_ENABLE_ALL if passes == "all" else Level.ORT_DISABLE_ALL
    path = folder / OnnxRuntime.model_file
    graph = optimised(path, level).graph
    layers = _layers(path)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in graph.node:
        found[node.op_type, node.domain].append(_layer(node.name, layers))
    rows = [
        {"op": op, "domain": domain, "count": len(names), "nodes": names}
        for (op, domain), names in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["op"]))


def profile(
    folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
) -> list[dict[str, Any]]:
    """The median time of each node over `runs` calls on `inputs`, slowest first: `node`, `op`,
    `p50_us` (microseconds) and `share` of the nodes' total.

    Measuring slows each node by about a microsecond, so for a tiny network compare two profiles
    rather than reading one; the total is not a latency.
    """
    path = folder / OnnxRuntime.model_file
    _, events = _profiled(path, inputs, threads, runs)
    return _summary(events, _layers(path))


def inside(
    folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
) -> list[Operator]:
    """As `Runtime.inside`."""
    path = folder / OnnxRuntime.model_file
    graph, events = _profiled(path, inputs, threads, runs)
    owner, layers = _owners(path), _layers(path)
    names = {node.name for node in onnx.load(str(path)).graph.node}
    told = {event["name"].removesuffix(KERNEL): event["args"] for event in events}
    times = {node: statistics.median(taken) for (node, _), taken in _times(events).items()}
    makers = {value: i for i, node in enumerate(graph.node) for value in node.output}
    given, answers = ({v.name for v in values} for values in (graph.input, graph.output))
    constants = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    found = []
    for node in graph.node:
        name = _layer(node.name, layers)
        weighted = owner(name) if node.op_type in COMPUTE else None
        known = _known(name, names)
        found.append(
            Operator(
                node=known,
                layer=weighted or known.rpartition("/")[0],
                op=node.op_type,
                kind=_kind(node),
                precision=_precision(told.get(node.name, {})),
                us=times.get(node.name, 0.0),
                reads=tuple(dict.fromkeys(makers[v] for v in node.input if v in makers)),
                of_input=not given.isdisjoint(node.input),
                answers=not answers.isdisjoint(node.output),
                has_int8=node.op_type in HAVE_INT8,
                with_constant=not constants.isdisjoint(node.input),
            )
        )
    return found


def _known(name: str, names: set[str]) -> str:
    """The file's name that a pass appended to; the name itself where the file has none like it."""
    found = name
    while found and found not in names:
        found = found.rpartition("/")[0]
    return found or name


def _kind(node: onnx.NodeProto) -> Kind:
    if node.op_type in CONVERSIONS:
        return "convert"
    return "move" if node.op_type in MOVES else "compute"


def _precision(told: dict[str, Any]) -> str:
    """The type of what a node reads first, as the profiler has it."""
    types = [name for shapes in told.get("input_type_shape", []) for name in shapes]
    return PRECISIONS.get(types[0], types[0]) if types else "unknown"


def _profiled(
    path: Path, inputs: tuple[np.ndarray, ...], threads: int, runs: int
) -> tuple[onnx.GraphProto, list[dict[str, Any]]]:
    """The graph that a session runs, and the kernels' events of `runs` calls."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "optimised.onnx"
        settings = options(threads, Level.ORT_ENABLE_ALL)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(scratch) / "profile")
        settings.optimized_model_filepath = str(target)
        session = load(path, settings)
        names = [i.name for i in session.get_inputs()]
        feed = dict(zip(names, inputs, strict=True))
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(str(target)).graph
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(KERNEL)]
    return graph, kernels


def layer_times(
    folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
) -> dict[str, float]:
    """As `Runtime.layer_times`."""
    owner = _owners(folder / OnnxRuntime.model_file)
    times: dict[str, float] = {}
    for row in profile(folder, inputs, threads=threads, runs=runs):
        layer = owner(row["node"]) if row["op"] in COMPUTE else None
        if layer:
            times[layer] = times.get(layer, 0.0) + row["p50_us"]
    return times


def _owners(path: Path) -> Callable[[str], str | None]:
    """Which layer a profiled node belongs to. ONNX Runtime calls a convolution by what it fused
    into it (`layer1.0/Relu`), so the way back leads to the nearest one that feeds it; a product and
    the addition of its bias it joins under the product's name."""
    nodes = onnx.load(str(path)).graph.node
    named = {node.name: node for node in nodes}
    makers = {value: node for node in nodes for value in node.output}

    def owner(name: str) -> str | None:
        name = name.removeprefix("fused ").partition("_token_")[0]
        node = named.get(name.removesuffix("/MatMulAddFusion"))
        while node is not None and node.op_type not in COMPUTE:
            node = makers.get(node.input[0]) if node.input else None
        return node.name.rpartition("/")[0] if node is not None else None

    return owner


def _summary(events: list[dict[str, Any]], layers: dict[str, str]) -> list[dict[str, Any]]:
    medians = {key: statistics.median(taken) for key, taken in _times(events).items()}
    total = sum(medians.values()) or 1.0
    rows = [
        {"node": _layer(node, layers), "op": op, "p50_us": us, "share": us / total}
        for (node, op), us in medians.items()
    ]
    return sorted(rows, key=lambda row: -row["p50_us"])


def _times(events: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """By node and operator: the microseconds of each call."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        times[event["name"].removesuffix(KERNEL), event["args"]["op_name"]].append(event["dur"])
    return times


def _layers(path: Path) -> dict[str, str]:
    """Value → name of the node that makes it, in the file."""
    graph = onnx.load(str(path)).graph
    return {value: node.name for node in graph.node for value in node.output}


def _layer(node: str, layers: dict[str, str]) -> str:
    """The file's name of a node; passes that lay data out anew name nodes by their value."""
    return layers.get(node.removesuffix(NEW_LAYOUT), node)
