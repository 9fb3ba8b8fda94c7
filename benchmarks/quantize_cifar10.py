"""What quantization costs in accuracy, on CIFAR-10: after training, aware of it, and in four bits.

    python benchmarks/quantize_cifar10.py

Three networks, each run whole by its recipe beside this file, so that every figure is of the
exported file's answers, held image by image against the float teacher's:

- `quantize_resnet56.yaml`: the shared ResNet-56, int8 from 512 calibration images, beside ONNX
  Runtime's own `quantize_static` on as many (its row `plain-int8`), and NNCF on as many where
  `--nncf` names the Python of an environment that has it;
- `quantize_mobilenet.yaml`: a MobileNetV2 trained here, whose depthwise layers are int8's hard
  case, beside `quantize_static` with one scale a tensor, after training and aware of it;
- `quantize_resnet20.yaml`: a ResNet-20 trained here, with four-bit weights, for storage: they are
  computed with in float.

`<case>_drop` is the accuracy lost on the test split, in points; the table has its 95 % interval.
All of a network computes in int8 (`fallback: off`), whatever is faster. Finished cases are lines of
`results/quantize_cifar10.jsonl`; what is there for the same recipe is not run again. `--quick`
takes 512 images, an epoch of training, and keeps nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from common import RESULTS, conclude, options, show

from attar.measure.intervals import paired_share_drop
from attar.measure.machine import environment
from attar.pipeline import run
from attar.pipeline.job import Job, job_of
from attar.recipe import Recipe, dump_recipe, load_recipe
from attar.runtimes.bundle import Bundle, read_bundle
from attar.runtimes.onnxruntime_session import OnnxSession

HERE = Path(__file__).parent
LOG = RESULTS / "quantize_cifar10.jsonl"
QAT = [
    "stages.quantize.method=qat",
    "stages.quantize.recover.epochs=4",
    "stages.quantize.recover.optimizer.name=sgd",
    "stages.quantize.recover.optimizer.lr=0.01",
    "stages.quantize.recover.optimizer.weight_decay=0.0001",
]
NNCF = "NNCF"
WORKER = HERE / "int8_nncf_worker.py"
Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to quantize one network. name: of its figure. goal: the most points it may lose."""

    name: str
    recipe: str
    said: str
    overrides: list[str] = field(default_factory=list)
    goal: float | None = None


CASES = [
    Case("resnet56_int8", "resnet56", "int8, after training", goal=0.2),
    Case("mobilenet_int8", "mobilenet", "int8, after training", goal=0.5),
    Case("mobilenet_int8_qat", "mobilenet", "int8, aware", QAT, goal=0.2),
    Case("resnet20_int4", "resnet20", "int4 weights, after training"),
    Case("resnet20_int4_qat", "resnet20", "int4 weights, aware", QAT, goal=1.0),
]


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--cases", nargs="+", help="which, by name; default: all")
    parser.add_argument("--nncf", metavar="PYTHON", help="the Python of an environment with NNCF")
    arguments = parser.parse_args()
    chosen = [c for c in CASES if not arguments.cases or c.name in arguments.cases]
    known = {} if arguments.quick else finished()
    figures, goals, rows = {}, {}, []
    for case in chosen:
        lines = [measured(case, seed, known, arguments) for seed in range(arguments.seeds)]
        figures[f"{case.name}_drop"] = round(mean_drop(lines), 2)
        if case.goal is not None:
            goals[f"{case.name}_drop"] = ("<=", case.goal)
        rows += table_rows(case, lines)
    columns = ["network and way", "float, %", "accuracy, %", "points lost", "95 %", "KB"]
    show("Accuracy of exported files on CIFAR-10's test split", columns, rows)
    conclude("quantize_cifar10", arguments, figures, goals, seeds=arguments.seeds)


def finished() -> dict[tuple[Any, ...], Line]:
    text = LOG.read_text(encoding="utf-8") if LOG.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return {(line["case"], line["seed"], line["setting"]): line for line in lines}


def measured(
    case: Case, seed: int, known: dict[tuple[Any, ...], Line], arguments: argparse.Namespace
) -> Line:
    """The case's line: from the log, or run now and appended."""
    quick = arguments.quick
    overrides = [*case.overrides, f"seed={seed}", *(shortened(case) if quick else [])]
    recipe = load_recipe(str(HERE / f"quantize_{case.recipe}.yaml"), overrides)
    key = (case.name, seed, setting_of(recipe))
    if key in known and (NNCF in known[key]["ways"] or not arguments.nncf):
        return known[key]
    print(f"{case.name}, seed {seed}", flush=True)
    found = quantized(case, recipe, arguments.nncf)
    line = {"case": case.name, "seed": seed, "setting": key[2], **found}
    if not quick:
        with LOG.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    return line


def shortened(case: Case) -> list[str]:
    """What `--quick` lays over a case's recipe."""
    teacher = ["teacher.train.epochs=1"] if case.recipe != "resnet56" else []
    recover = ["stages.quantize.recover.epochs=1"] if case.overrides else []
    return ["data.subset.count=512", *teacher, *recover]


def setting_of(recipe: Recipe) -> str:
    """What two runs must have in common for one to stand for the other."""
    text = dump_recipe(recipe).replace(os.environ.get("ATTAR_DATA", "data"), "data")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def quantized(case: Case, recipe: Recipe, nncf: str | None) -> Line:
    """One run, as a line: rows of the ledger, and of the baselines that the ledger has not."""
    folder = Path("runs") / "benchmarks" / f"quantize-{case.name}-{recipe.seed}"
    started = time.perf_counter()
    ledger = run(recipe, folder, resume=True, tell=progress).ledger
    rows = {row["stage"]: row for row in ledger["rows"]}
    job = job_of(recipe)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "float": rows["exported"]["metric"]["value"],
        "ways": {
            "ours": of_row(rows["quantize"]),
            "quantize_static": of_row(rows["plain-int8"]),
            "quantize_static, a scale a tensor": per_tensor(folder, job),
            **({NNCF: by_nncf(folder, job, nncf)} if nncf else {}),
        },
        "seconds": round(time.perf_counter() - started),
        "environment": environment(),
    }


def of_row(row: dict[str, Any]) -> dict[str, float]:
    drop = {k: round(100 * row["drop"][k], 3) for k in ("value", "low", "high")}
    return {
        "accuracy": row["metric"]["value"],
        "drop": drop["value"],
        "low": drop["low"],
        "high": drop["high"],
        "bytes": row["bundle"]["bytes"],
    }


def per_tensor(folder: Path, job: Job) -> dict[str, float]:
    """`quantize_static` with one scale a tensor and the extremes as range, as its defaults are."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = read_bundle(folder / "stages/00-exported/bundle")
    with TemporaryDirectory() as scratch:
        prepared, target = Path(scratch) / "prepared.onnx", Path(scratch) / "int8.onnx"
        quant_pre_process(str(source.folder / "model.onnx"), str(prepared))
        quantize_static(
            str(prepared),
            str(target),
            Reader(job, [i.name for i in onnx.load(str(prepared)).graph.input]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return of_file(source, target, job)


def by_nncf(folder: Path, job: Job, python: str) -> dict[str, float]:
    """NNCF's own, by its defaults, on the same images."""
    source = read_bundle(folder / "stages/00-exported/bundle")
    with TemporaryDirectory() as scratch:
        images, target = Path(scratch) / "images.npz", Path(scratch) / "int8.onnx"
        batches = [batch["input"] for batch in iter(Reader(job, ["input"]).get_next, None)]
        np.savez(images, inputs=np.concatenate(batches))
        command = [python, str(WORKER), str(source.folder / "model.onnx"), str(images), str(target)]
        subprocess.run(command, check=True)
        return of_file(source, target, job)


def of_file(source: Bundle, target: Path, job: Job) -> dict[str, float]:
    """What a quantized file answers on the test split, beside the float bundle."""
    before, after = (hits(s, job) for s in (source.session(), OnnxSession(target)))
    drop = paired_share_drop(before, after)
    return {
        "accuracy": float(after.mean()),
        "drop": round(100 * drop.value, 3),
        "low": round(100 * drop.low, 3),
        "high": round(100 * drop.high, 3),
        "bytes": target.stat().st_size,
    }


class Reader:
    """512 training images for `quantize_static`, as the ledger's own baseline gets them."""

    def __init__(self, job: Job, names: list[str]) -> None:
        self._batches: Iterator[Any] = iter(job.data.train.batches(32, shuffle=True, seed=job.seed))
        self._job, self._names, self._left = job, names, 512 // 32

    def get_next(self) -> dict[str, np.ndarray] | None:
        if not self._left:
            return None
        self._left -= 1
        arguments, _ = self._job.task.arguments(next(self._batches))
        return dict(zip(self._names, (a.numpy() for a in arguments), strict=True))


def hits(session: Any, job: Job) -> np.ndarray:
    """Whether each test image is classified rightly, 0 or 1."""
    found = []
    for batch in job.data.test.batches(100):
        arguments, _ = job.task.arguments(batch)
        answers = session(*(a.numpy() for a in arguments))[0]
        found.append(answers.argmax(-1) == batch.targets.numpy())
    return np.concatenate(found).astype(float)


def progress(event: dict[str, Any]) -> None:
    if event["event"] == "stage":
        print(f"  {event['name']}{' (stored)' if event['cached'] else ''}", flush=True)
    if event["event"] == "epoch":
        print(f"    {event['label']} {event['epoch']}: {event['metric']['value']:.4f}", flush=True)


def mean_drop(lines: list[Line]) -> float:
    return float(np.mean([line["ways"]["ours"]["drop"] for line in lines]))


def table_rows(case: Case, lines: list[Line]) -> list[list[str]]:
    """Ours, and the first seed's baselines where nothing was trained."""
    rows = []
    for way, found in lines[0]["ways"].items():
        if way != "ours" and case.said != "int8, after training":
            continue
        each = [line["ways"][way] for line in lines]
        mean = {k: np.mean([x[k] for x in each]) for k in found}
        rows.append(
            [
                f"{case.recipe}: {case.said if way == 'ours' else way}",
                f"{100 * np.mean([line['float'] for line in lines]):.2f}",
                f"{100 * mean['accuracy']:.2f}",
                f"{mean['drop']:+.2f}",
                f"{mean['low']:+.2f} to {mean['high']:+.2f}",
                f"{mean['bytes'] / 1e3:.0f}",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
