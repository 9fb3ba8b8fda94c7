"""Does calibration take more memory for more images?

    python benchmarks/calibration_memory.py

ResNet-56 with random weights is calibrated on 256 and on 10,000 training images of CIFAR-10, by a
recipe's own data and the quantize stage's own look at them, each in a fresh process. What counts is
the process's peak resident memory, as the system tells it; median over `--seeds`.
`calibration_memory_growth` is the second over the first. The process's imports count: the table
shows what it had before the look too. `--quick` takes ResNet-8, and 2,560 images for 10,000.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import conclude, options, show

FEW, MANY, MANY_QUICK = 256, 10_000, 2_560
GOAL = 1.1
RECIPE = Path(__file__).with_name("prune_latency.yaml")


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--calibrate", nargs=3, metavar=("NETWORK", "COUNT", "SEED"))
    arguments = parser.parse_args()
    if arguments.calibrate:
        network, count, seed = arguments.calibrate
        print(json.dumps(calibrated(network, int(count), int(seed))))
        return
    network = "cifar-resnet8" if arguments.quick else "cifar-resnet56"
    counts = (FEW, MANY_QUICK if arguments.quick else MANY)
    found = {
        count: [in_fresh_process(network, count, seed) for seed in range(arguments.seeds)]
        for count in counts
    }
    rows = [[n, *(f"{median(found[n], k):.1f}" for k in ("before_mb", "peak_mb"))] for n in counts]
    show(f"Calibrating {network}", ["images", "before, MB", "peak, MB"], rows)
    few, many = (median(found[n], "peak_mb") for n in counts)
    figures = {"calibration_memory_growth": round(many / few, 4)}
    goals = {"calibration_memory_growth": ("<=", GOAL)}
    conclude("calibration_memory", arguments, figures, goals, peak_mb=[few, many])


def in_fresh_process(network: str, count: int, seed: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--calibrate", network]
    ended = subprocess.run([*command, str(count), str(seed)], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def calibrated(network: str, count: int, seed: int) -> dict[str, float]:
    """This process's memory before the look and at its peak, in MB."""
    import resource

    from attar.models.building import build, resolve
    from attar.pipeline.job import job_of
    from attar.recipe import load_recipe
    from attar.stages.base import Context
    from attar.stages.quantize import Quantize
    from attar.student import Student

    job = job_of(load_recipe(str(RECIPE), [f"seed={seed}"]))
    student = Student(build(resolve(network, channels=3, classes=10)))
    run = Context(job.task, job.data, None, seed, Path(), runtime="onnxruntime")

    def peak() -> float:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

    before = peak()
    Quantize(calibration=count, fallback="off", inside=False).apply(student, run)
    return {"before_mb": before, "peak_mb": peak()}


def median(found: list[dict[str, Any]], name: str) -> float:
    return float(np.median([one[name] for one in found]))


if __name__ == "__main__":
    main()
