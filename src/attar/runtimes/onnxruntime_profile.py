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
}
"""Operators with weights, before and after passes."""


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
    with tempfile.TemporaryDirectory() as scratch:
        settings = options(threads, Level.ORT_ENABLE_ALL)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(scratch) / "profile")
        session = load(path, settings)
        names = [i.name for i in session.get_inputs()]
        feed = dict(zip(names, inputs, strict=True))
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _summary(events, _layers(path))


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
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"].removesuffix("_kernel_time")
            times[node, event["args"]["op_name"]].append(event["dur"])
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    total = sum(medians.values()) or 1.0
    rows = [
        {"node": _layer(node, layers), "op": op, "p50_us": us, "share": us / total}
        for (node, op), us in medians.items()
    ]
    return sorted(rows, key=lambda row: -row["p50_us"])


def _layers(path: Path) -> dict[str, str]:
    """Value → name of the node that makes it, in the file."""
    graph = onnx.load(str(path)).graph
    return {value: node.name for node in graph.node for value in node.output}


def _layer(node: str, layers: dict[str, str]) -> str:
    """The file's name of a node; passes that lay data out anew name nodes by their value."""
    return layers.get(node.removesuffix(NEW_LAYOUT), node)
