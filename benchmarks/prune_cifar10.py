"""The field's table: a ResNet-56 on CIFAR-10 with half its multiply-accumulates, as a difference
from the same original.

    python benchmarks/prune_cifar10.py --seeds 1

The shared ResNet-56 loses channels and blocks by `prune: {macs: …}` until it has 1/2.13 or 1/2.57
of its multiply-accumulates (`--times`), which are DepGraph's points of the table (there: +0.24
points at 2.13 times, +0.11 at 2.57, chosen on the test set), and recovers by its own soft targets
(`prune_cifar10.yaml`). What goes is chosen on one half of the test images; the last epoch's
accuracy is measured on the other half, as is the original's, image by image.

`points` is the pruned network's accuracy minus the original's, in points, `half` half its 95 %
interval. Finished trainings are lines of `results/prune_cifar10.jsonl`; what is there is not
trained again. `--quick` takes 256 images and one epoch, and keeps nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, conclude, options, show
from trainings import Log, gain, right

from attar.measure.cost import macs
from attar.pipeline.job import job_of
from attar.recipe import load_recipe
from attar.student import Student
from attar.training.evaluation import statistics_of

RECIPE = Path(__file__).with_suffix(".yaml")
LOG = Log(RESULTS / "prune_cifar10.jsonl", RECIPE)
QUICK = [
    "data.subset.count=256",
    "stages.prune.recover.epochs=1",
    "stages.prune.sensitivity=false",
]
Line = dict[str, Any]
GOALS = {2.13: -0.9}
"""Points at so many times fewer multiply-accumulates, in about an hour on two cores."""


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--times", type=float, nargs="+", default=[2.13], help="fewer operations")
    arguments = parser.parse_args()
    overrides = QUICK if arguments.quick else []
    figures, rows, goals = {}, [], {}
    for times in arguments.times:
        lines = {
            seed: pruned(times, seed, overrides, arguments.quick) for seed in range(arguments.seeds)
        }
        compared = gain({s: right(x) for s, x in lines.items()}, originals(lines))
        points, half = float(compared["gain"]), float(compared["half"])
        name = f"{times:g}".replace(".", "_")
        figures |= {f"points_{name}": round(points, 2), f"half_{name}": round(half, 2)}
        if times in GOALS and not arguments.quick:
            goals[f"points_{name}"] = (">=", GOALS[times])
        rows.append(row(times, list(lines.values()), points, half))
    columns = ["fewer", "MACs", "parameters", "blocks", "validation, %", "test, %", "points", "min"]
    show("ResNet-56 on CIFAR-10, beside the same original", columns, rows)
    conclude("prune_cifar10", arguments, figures, goals, seeds=arguments.seeds)


def pruned(times: float, seed: int, overrides: list[str], quick: bool) -> Line:
    """The pruned and recovered network's line: from the log, or trained now."""
    recipe = load_recipe(str(RECIPE), [*overrides, f"seed={seed}"])

    def measured(student: Student) -> Line:
        job = job_of(recipe)
        original = job.teacher.fresh()
        example = job.task.example(job.data)
        hits = job.task.hits(statistics_of(original.module, job.data.test, job.task))
        return {
            "macs": macs(student.module, example),
            "original_macs": macs(original.module, example),
            "parameters": sum(p.numel() for p in student.module.parameters()),
            "blocks": sum(len(e.wrapped) for e in student.find("blocks-removed")),
            "original_hits": np.packbits(hits.astype(bool)).tobytes().hex(),
        }

    label, setting = f"{times:g} times", LOG.setting(overrides)
    share = f"{100 / times:.2f}%"
    return LOG.trained(recipe, label, setting, keep=not quick, also=measured, macs=share)


def originals(lines: dict[int, Line]) -> dict[int, np.ndarray]:
    """Which test images the original gets right, by seed."""
    return {seed: right({"hits": line["original_hits"]}) for seed, line in lines.items()}


def row(times: float, lines: list[Line], points: float, half: float) -> list[str]:
    one = lines[0]
    return [
        f"{times:g}×", f"{one['macs']:,}", f"{one['parameters']:,}", str(one["blocks"]),
        *(f"{100 * np.mean([x[k] for x in lines]):.2f}" for k in ("validation", "test")),
        f"{points:+.2f} ± {half:.2f}", f"{np.mean([x['seconds'] for x in lines]) / 60:.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
