"""Is int8 by Attar as fast as the fastest int8 graph that others make, and never slower than float?

    python benchmarks/int8_runtime.py --nncf /path/to/environment/bin/python

ResNet-20 and 56 on 32 by 32 pixels, MobileNetV2, ResNet-18, EfficientNet-B0 and ViT-Tiny on 224 by
224, an encoder of BERT's shape on 128 tokens; one thread, batch 1 and 16. Their weights are random,
of a trained network's scale: what is measured is time, nothing is downloaded, and nothing is said
of accuracy. All tools calibrate on the same random inputs. The contenders:

- `attar`: what the quantize stage makes, measured fallback included, which may leave layers or the
  whole in float;
- `quantize_static`: ONNX Runtime's own, after its `quant_pre_process`, in all of `SETTINGS`. A
  short look at all finds the two fastest; both are measured on, and the faster is held against;
- `nncf`: NNCF's quantized ONNX file. NNCF is no dependency: `--nncf` names the Python of an
  environment that has it (`pip install nncf onnx onnxruntime`); without it its column is left out;
- `float`: the network as it is, all graph passes.

They are timed in one process, taking turns. Where OpenVINO is installed, Attar's graph for it, the
file by NNCF and the float one are timed in it too (`openvino_…`).

Each `worst_…` is the largest upper bound (95 %, paired) of Attar's latency over another's, over all
networks and batches. Where the fallback has left the whole network in float, the graph is the float
one again, and the bound of equals lies slightly above one: it is counted as it was measured.
`float_ops_inside` counts the operators of Attar's graph, after ONNX Runtime's passes, that compute
in float though they have an int8 kernel and stand between values that are quantized already (with
others of their kind, perhaps), without those that the fallback left in float. Attention's own
products, softmax, layer normalisation and GELU lie among float values, and aren't counted.

Measurements are lines of `results/int8_runtime.jsonl` by network, batch, runtime, seed, machine and
version (a hash of the code that makes the graphs): what is there isn't measured again. `--quick`
measures ResNet-20 at batch 1 and keeps nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import RESULTS, conclude, options, show
from int8_networks import CASES, Case
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch.export import Dim

import attar
from attar.measure.intervals import ratio_interval
from attar.measure.latency import time_interleaved
from attar.measure.machine import environment, package_version
from attar.measure.processor import saturates
from attar.quantize import Scheme, quantize
from attar.quantize.bench import RuntimeBench
from attar.quantize.fallback import Decision, decide
from attar.runtimes.base import runtimes
from attar.runtimes.onnxruntime_graph import optimised
from attar.runtimes.onnxruntime_session import Level
from attar.student import Student

LOG = RESULTS / "int8_runtime.jsonl"
WORKER = Path(__file__).with_name("int8_nncf_worker.py")
BATCHES, CALIBRATION, PORTION = (1, 16), 16, 4
SHAPES = ({0: Dim("batch", min=1)},)
NAMES = (["input"], ["output"])
LOOK, LONG, LONG_QUICK = 0.3, 6.0, 1.0
ROUNDS = 60
KEPT = 2
"""Of `SETTINGS`, those measured on after a look at all."""
WEIGHTED = {"op_types_to_quantize": ["Conv", "Gemm", "MatMul"]}
ONLY_WEIGHTS = {**WEIGHTED, "extra_options": {"MatMulConstBOnly": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    "QDQ": {},
    "QDQ a tensor": {"per_channel": False},
    "QDQ int8": {"activation_type": QuantType.QInt8},
    "QDQ weighted": ONLY_WEIGHTS,
    "QOperator": {"quant_format": QuantFormat.QOperator},
    "QOperator weighted": {"quant_format": QuantFormat.QOperator, **ONLY_WEIGHTS},
}
"""Beside what its documentation advises for CPUs: QDQ, uint8 activations, weights per channel."""
KERNELS = {
    "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul", "Sigmoid",
    "LeakyRelu", "Relu", "Clip", "AveragePool", "GlobalAveragePool", "ReduceMean", "Concat",
    "QuickGelu",
}  # fmt: skip
"""Float operators whose like ONNX Runtime has in int8."""
MOVES = {"Transpose", "Reshape", "Flatten", "Slice", "Pad", "ReorderInput", "ReorderOutput"}

Row = dict[str, Any]


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--nncf", metavar="PYTHON", help="the Python of an environment with NNCF")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these networks")
    arguments = parser.parse_args()
    if not arguments.nncf:
        print("NNCF's column is left out: name an environment's Python that has it by --nncf")
    rows = []
    for case in CASES[:1] if arguments.quick else CASES:
        if not arguments.only or case.name in arguments.only:
            for seed in range(arguments.seeds):
                rows += measured(case, seed, arguments)
    report(rows, arguments)


def measured(case: Case, seed: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """The network's rows: from the log, or measured now."""
    known = {} if arguments.quick else stored()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, seed, Path(folder), arguments.nncf)
        for runtime in ("onnxruntime", "openvino"):
            if not runtimes.get(runtime).available()[0]:
                continue
            for batch in BATCHES[:1] if arguments.quick else BATCHES:
                about = {
                    "network": case.name,
                    "runtime": runtime,
                    "batch": batch,
                    "seed": seed,
                    "nncf": bool(arguments.nncf),
                    "version": version(),
                    "cpu": environment()["cpu"],
                }
                row = known.get(key(about))
                if row is None:
                    seconds = LONG_QUICK if arguments.quick else LONG
                    row = about | bench.row(runtime, batch, seconds)
                    print(f"{case.name}, {runtime}, batch {batch}: {said(row)}", flush=True)
                    if not arguments.quick:
                        with LOG.open("a", encoding="utf-8") as file:
                            line = row | {"environment": environment()}
                            file.write(json.dumps(line) + "\n")
                yield row


def key(row: Row) -> str:
    names = ("network", "runtime", "batch", "seed", "nncf", "version", "cpu")
    return json.dumps([row[name] for name in names])


def stored() -> dict[str, Row]:
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


@cache
def version() -> str:
    """A hash of the code that makes the graphs, and the runtimes' versions."""
    root = Path(attar.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(f for part in ("quantize", "runtimes") for f in (root / part).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    others = [f"{name} {package_version(name)}" for name in ("onnxruntime", "openvino")]
    return ", ".join([digest.hexdigest()[:12], *others])


# --- measuring ------------------------------------------------------------------------------------


class Bench:
    """One network's contenders, each made when it is first asked for."""

    def __init__(self, case: Case, seed: int, folder: Path, nncf: str | None) -> None:
        self._case, self._folder, self._nncf = case, folder, nncf
        self._inputs = case.inputs(CALIBRATION, seed)
        self._student = cache(lambda: Student(case.build(seed)))
        self._quantized = cache(self._make_quantized)
        self._plain = cache(self._make_plain)
        self._float = cache(self._make_float)
        self._by_nncf = cache(self._make_by_nncf)

    def row(self, runtime: str, batch: int, seconds: float) -> Row:
        """What was measured of one batch in one runtime."""
        inputs = tuple(x[:batch].numpy() for x in self._inputs)
        decision = self._decision(runtime, inputs)
        folders = {"float": self._float(runtime), "attar": self._own(runtime, decision)}
        refused = {}
        if runtime == "onnxruntime":
            plain, refused = self._plain()
            timed = latencies(runtime, plain, inputs, LOOK)
            fastest = sorted(plain, key=lambda name: timed[name]["p50_ms"])[:KEPT]
            folders |= {name: plain[name] for name in fastest}
        if self._nncf:
            by_nncf = self._by_nncf()
            if isinstance(by_nncf, Path):
                folders["nncf"] = by_nncf
            else:
                refused["nncf"] = by_nncf
        timed = latencies(runtime, folders, inputs, seconds)
        rest = [name for name in folders if name in SETTINGS]
        best = min(rest, key=lambda name: timed[name]["p50_ms"], default=None)
        return {
            "p50_ms": {name: found["p50_ms"] for name, found in timed.items()},
            "ratios": {name: against(timed, name) for name in folders if name != "attar"},
            "best_ort": best,
            "float_layers": list(decision.float_layers),
            "float_ops": self._float_ops(runtime, decision),
            "refused": refused,
        }

    def _decision(self, runtime: str, inputs: tuple[np.ndarray, ...]) -> Decision:
        with tempfile.TemporaryDirectory() as folder:
            bench = RuntimeBench(
                runtimes.get(runtime)(),
                partial(self._quantized, runtime),
                Path(folder),
                example=self._example,
                dynamic_shapes=SHAPES,
                inputs=inputs,
            )
            return decide(bench)

    @property
    def _example(self) -> tuple[Any, ...]:
        return tuple(x[:2] for x in self._inputs)

    def _make_quantized(self, runtime: str, float_layers: tuple[str, ...]) -> Student:
        scheme = Scheme(runtime=runtime, float_layers=float_layers, calibration=CALIBRATION)
        portions = zip(*(x.split(PORTION) for x in self._inputs), strict=True)
        return quantize(
            self._student(), scheme, portions, example=self._example, dynamic_shapes=SHAPES
        )

    def _export(self, runtime: str, student: Student, name: str) -> Path:
        folder = self._folder / name
        runtimes.get(runtime)().export(
            student, folder, example=self._example, dynamic_shapes=SHAPES, names=NAMES
        )
        return folder

    def _make_float(self, runtime: str) -> Path:
        return self._export(runtime, self._student(), f"float-{runtime}")

    def _own(self, runtime: str, decision: Decision) -> Path:
        student = self._quantized(runtime, decision.float_layers)
        return self._export(runtime, student, f"attar-{runtime}")

    def _make_plain(self) -> tuple[dict[str, Path], dict[str, str]]:
        """By setting: its folder, or why there is none."""
        source = self._float("onnxruntime") / "model.onnx"
        made, refused = {}, {}
        with quiet():
            prepared = self._folder / "prepared.onnx"
            quant_pre_process(str(source), str(prepared))
            for name, given in SETTINGS.items():
                folder = self._folder / f"plain {name}"
                folder.mkdir()
                try:
                    self._quantize_plainly(prepared, folder / "model.onnx", given)
                    runtimes.get("onnxruntime")().session(folder)
                    made[name] = folder
                except Exception as error:  # the quantizer raises whatever it stumbles on
                    refused[name] = str(error).strip()[:200] or type(error).__name__
        return made, refused

    def _quantize_plainly(self, source: Path, target: Path, given: dict[str, Any]) -> None:
        advised = {
            "quant_format": QuantFormat.QDQ,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
            "reduce_range": saturates(),
        }
        reader = Reader(self._inputs[0].numpy())
        quantize_static(str(source), str(target), reader, **(advised | given))

    def _make_by_nncf(self) -> Path | str:
        """The folder of NNCF's file, or why there is none."""
        folder = self._folder / "nncf"
        folder.mkdir()
        images = folder / "images.npz"
        np.savez(images, inputs=self._inputs[0].numpy())
        source = self._float("onnxruntime") / "model.onnx"
        command = [
            str(self._nncf),
            str(WORKER),
            str(source),
            str(images),
            str(folder / "model.onnx"),
        ]
        more = ["--transformer"] if self._case.transformer else []
        ended = subprocess.run([*command, *more], capture_output=True, text=True)
        if ended.returncode:
            return (ended.stderr.strip().splitlines() or ["no message"])[-1][:200]
        return folder

    def _float_ops(self, runtime: str, decision: Decision) -> int | None:
        """`None` for a runtime whose graph can't be looked at, or one that computes in float."""
        if runtime != "onnxruntime" or "*" in decision.float_layers:
            return None
        path = self._folder / f"attar-{runtime}" / "model.onnx"
        graph = optimised(path, Level.ORT_ENABLE_ALL).graph
        return len(float_inside(graph, decision.float_layers))


class Reader(CalibrationDataReader):
    """Hands inputs on in the same portions that Attar looks at."""

    def __init__(self, inputs: np.ndarray) -> None:
        self._portions = iter(np.split(inputs, range(PORTION, len(inputs), PORTION)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        portion = next(self._portions, None)
        return None if portion is None else {NAMES[0][0]: portion}


def latencies(
    runtime: str, folders: dict[str, Path], inputs: tuple[np.ndarray, ...], seconds: float
) -> dict[str, Row]:
    sessions = {name: runtimes.get(runtime)().session(at) for name, at in folders.items()}
    calls = {name: partial(session, *inputs) for name, session in sessions.items()}
    return time_interleaved(calls, seconds=seconds, rounds=ROUNDS)


def against(timed: dict[str, Row], other: str) -> list[float]:
    """Attar's latency over the other's, with the bounds of its interval."""
    ratio = ratio_interval(*(np.array(timed[name]["round_ms"]) for name in ("attar", other)))
    return [ratio.value, ratio.low, ratio.high]


def float_inside(graph: onnx.GraphProto, float_layers: tuple[str, ...] = ()) -> list[str]:
    """The nodes that compute in float with nothing but their like, and moves, between them and
    quantized values on every side; layers left in float by choice are none of their like."""
    makers = {value: node for node in graph.node for value in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    chosen = tuple(f"{layer}{end}" for layer in float_layers for end in "./")
    inside = {
        node.output[0]: node
        for node in graph.node
        if node.op_type in KERNELS | MOVES and not node.name.startswith(chosen)
    }
    answers = {value.name for value in graph.output}

    def enclosed(node: onnx.NodeProto) -> bool:
        before = [makers.get(value) for value in node.input if value in makers]
        after = [reader for value in node.output for reader in readers.get(value, [])]
        return (
            bool(before)
            and not answers & set(node.output)
            and all(n.op_type == "DequantizeLinear" or n.output[0] in inside for n in before)
            and all(n.op_type == "QuantizeLinear" or n.output[0] in inside for n in after)
        )

    while outside := [value for value, node in inside.items() if not enclosed(node)]:
        for value in outside:
            del inside[value]
    return [node.name for node in inside.values() if node.op_type in KERNELS]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


# --- reporting ------------------------------------------------------------------------------------


def said(row: Row) -> str:
    return ", ".join(f"{name} {ms:.3f} ms" for name, ms in row["p50_ms"].items())


def report(rows: list[Row], arguments: argparse.Namespace) -> None:
    columns = ["network", "float, ms", "Attar, ms", "best of ORT", "NNCF", "of float"]
    columns += ["of ORT's best", "of NNCF", "float inside"]
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        own = [row for row in rows if row["runtime"] == runtime]
        show(f"int8 in {runtime}, one thread", columns, list(map(cells, own)))
    conclude("int8_runtime", arguments, figures_of(rows), goals_of(rows), seeds=arguments.seeds)


def cells(row: Row) -> list[str]:
    ms, ratios, best = row["p50_ms"], row["ratios"], row["best_ort"]

    def took(name: str | None) -> str:
        return f"{ms[name]:.3f}" if name in ms else "–"

    def ratio(name: str | None) -> str:
        if name not in ratios:
            return "–"
        value, _, high = ratios[name]
        return f"{value:.3f} ≤ {high:.3f}"

    layers = row["float_layers"]
    label = f"{row['network']}, {row['batch']}"
    if layers:
        label += " (all float)" if "*" in layers else f" ({len(layers)} float)"
    inside = "–" if row["float_ops"] is None else str(row["float_ops"])
    times = [took("float"), took("attar"), f"{took(best)} {best or ''}".strip(), took("nncf")]
    return [label, *times, ratio("float"), ratio(best), ratio("nncf"), inside]


def figures_of(rows: list[Row]) -> dict[str, float]:
    """The largest upper bounds, over all rows in which both were measured."""
    figures: dict[str, float] = {}
    for runtime, prefix in (("onnxruntime", ""), ("openvino", "openvino_")):
        own = [row for row in rows if row["runtime"] == runtime]
        for name in ("best_ort", "float", "nncf"):
            bounds = [
                row["ratios"][other][2]
                for row in own
                if (other := row["best_ort"] if name == "best_ort" else name) in row["ratios"]
            ]
            if bounds:
                figures[f"{prefix}worst_ratio_to_{name}"] = round(max(bounds), 4)
    figures["float_ops_inside"] = sum(row["float_ops"] or 0 for row in rows)
    return figures


def goals_of(rows: list[Row]) -> dict[str, tuple[str, float]]:
    goals = {"worst_ratio_to_best_ort": ("<=", 1.05), "worst_ratio_to_float": ("<=", 1.0)}
    known = figures_of(rows)
    return {name: goal for name, goal in goals.items() if name in known} | {
        "float_ops_inside": ("<=", 0)
    }


if __name__ == "__main__":
    main()
