"""Is a student that learns from stored answers as good as one whose teacher answers live?

    python benchmarks/distill_stored.py --seeds 5

The other half of `distill_throughput.py`'s claim: the same ResNet-20 is taught by a ResNet-56 for
60 epochs, live (every epoch augments anew) and from the store (ten augmentations of each image,
gone through six times), with the same images, initial weights and schedule, seed by seed
(`distill_stored.yaml`). Each finished training is a line of `results/distill_stored.jsonl`; what is
there already is not trained again.

`difference_points` is stored minus live, in points of test accuracy, mean over seeds, with a 95 %
interval that holds both the seeds and the test images as drawn at random; `lost_at_most_points` is
that interval's lower end, turned into a loss. The seconds of stored trainings include asking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, conclude, options, show
from trainings import Log, gain, right

from attar.recipe import load_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
LOG = Log(RESULTS / "distill_stored.jsonl", RECIPE)
WAYS: dict[str, int | None] = {"live": None, "stored": 10}


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    overrides = ["data.subset.count=200", "stages.distill.epochs=2"] if arguments.quick else []
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):
        recipe = load_recipe(str(RECIPE), [*overrides, f"seed={seed}"])
        for way, views in WAYS.items():
            line = LOG.trained(
                recipe,
                way,
                LOG.setting(overrides, views),
                keep=not arguments.quick,
                views=views,
            )
            found[way].append(line)
    report(found, arguments)


def report(found: dict[str, list[dict[str, Any]]], arguments: Any) -> None:
    rows = []
    for way, lines in found.items():
        tests = [100 * line["test"] for line in lines]
        spread = float(np.std(tests, ddof=1)) if len(tests) > 1 else 0.0
        seconds = float(np.median([line["seconds"] for line in lines]))
        rows.append([way, f"{np.mean(tests):.2f} ± {spread:.2f}", f"{seconds:.0f}"])
    show("ResNet-56 → ResNet-20, CIFAR-10", ["teacher", "test, %", "seconds, median"], rows)
    stored, live = ({x["seed"]: right(x) for x in found[way]} for way in ("stored", "live"))
    between = gain(stored, live)
    figures = {
        "difference_points": round(float(between["gain"]), 2),
        "half_interval_points": round(float(between["half"]), 2),
        "lost_at_most_points": round(float(between["half"] - between["gain"]), 2),
    }
    conclude("distill_stored", arguments, figures, {}, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
