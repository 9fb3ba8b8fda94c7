"""What does a file of few-valued weights cost where it is loaded?

    python benchmarks/shared_load.py

Networks with random weights, dense and with 4-bit codebooks, are exported for ONNX Runtime. Each
file is opened in fresh processes, in turn with the other, on one thread: the seconds that takes
(of the processor, median of five in a process), the resident memory that the first one adds, and
how long an answer takes. A small file's weights are put together when it is loaded, so that answers
should take no longer. Medians over processes. `--quick` takes a ResNet-8 and two processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from common import conclude, options, processor_seconds, show
from torch import nn

from attar.models import ModelSpec, build
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.share import share_weights
from attar.student import Student

SMALL = "cifar-tiny"
"""What processes open first, so that the runtime's own memory isn't counted."""
NETWORKS = ("cifar-resnet56", "vit-small")
PROCESSES, OPENINGS, ANSWERS = 7, 5, 200
BITS = 4


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--open", nargs=2, metavar=("WARM", "FILE"))
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opened(*arguments.open)))
        return
    networks = ("cifar-resnet8",) if arguments.quick else NETWORKS
    rows, load, answer, memory = [], [], [], []
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            files = exported(network, Path(folder))
            warm = model_file(Student(built(SMALL)), Path(folder) / "warm")
            found = compared(warm, files, 2 if arguments.quick else PROCESSES)
            for name, file in files.items():
                one = found[name]
                measured = [f"{one[k]:.2f}" for k in ("load_ms", "memory_mb", "answer_ms")]
                size = f"{file.stat().st_size / 1000:.0f}"
                rows.append([f"{network}, {name}", size, *measured])
        dense, shared = found["dense"], found["shared"]
        load.append(shared["load_ms"] / dense["load_ms"])
        answer.append(shared["answer_ms"] / dense["answer_ms"])
        memory.append(shared["memory_mb"] - dense["memory_mb"])
    show(
        "Opening a file in ONNX Runtime",
        ["network", "KB", "load, ms", "memory, MB", "answer, ms"],
        rows,
    )
    figures = {
        "worst_load_ratio": round(max(load), 3),
        "worst_memory_added_mb": round(max(memory), 2),
        "worst_answer_ratio": round(max(answer), 3),
    }
    conclude("shared_load", arguments, figures, {})


def exported(network: str, folder: Path) -> dict[str, Path]:
    """The files of a network, dense and shared."""
    module = built(network)
    dense = model_file(Student(module), folder / "dense")
    edit, _ = share_weights(module, BITS)
    return {"dense": dense, "shared": model_file(Student(module, None, [edit]), folder / "shared")}


def built(network: str) -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec(model=network, channels=3, classes=10)).eval()


def model_file(student: Student, folder: Path) -> Path:
    folder.mkdir()
    files = OnnxRuntime().export(
        student,
        folder,
        example=(torch.zeros(2, 3, 32, 32),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        names=(["image"], ["logits"]),
    )
    (found,) = (file for file in files if file.suffix == ".onnx")
    return Path(found)


def compared(warm: Path, files: dict[str, Path], processes: int) -> dict[str, dict[str, float]]:
    """Medians over fresh processes, each file's in turn."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for _ in range(processes):
        for name, file in files.items():
            command = [sys.executable, "-W", "ignore", __file__, "--open", str(warm)]
            ended = subprocess.run([*command, str(file)], stdout=subprocess.PIPE, check=True)
            seen[name].append(json.loads(ended.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(one[key] for one in all_of) for key in all_of[0]}
        for name, all_of in seen.items()
    }


def opened(warm: str, file: str) -> dict[str, float]:
    """What opening a file takes, once the runtime has opened another."""
    session(warm)
    before = resident_mb()
    first = session(file)
    added = resident_mb() - before
    image = {"image": np.zeros((1, 3, 32, 32), np.float32)}
    return {
        "load_ms": 1000 * processor_seconds(lambda: session(file), OPENINGS),
        "memory_mb": added,
        "answer_ms": 1000 * processor_seconds(lambda: first.run(None, image), ANSWERS),
    }


def session(file: str) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main()
