"""What OpenVINO really runs: the operators after its passes, their precision, the time of each."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from attar.runtimes.openvino_session import FixedRequest, OpenVinoSession

WEIGHTED = {"Conv", "Gemm", "MatMul"}


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
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        call(inputs)
        for row in call.profile():
            taken[row.node_name].append(row.real_time.total_seconds() * 1e6)
    times: dict[str, float] = {}
    for name, each in taken.items():
        if layer := owner.layer(name):
            times[layer] = times.get(layer, 0.0) + statistics.median(each)
    return times


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
