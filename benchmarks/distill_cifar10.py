"""A ResNet-8 taught by a ResNet-56 on a stratified part of CIFAR-10, criterion by criterion.

    python benchmarks/distill_cifar10.py --seeds 3

Every criterion, and the student alone, has the same schedule, the same images in the same order,
augmented alike, and the same initial weights, seed by seed (`distill_cifar10.yaml`). Weights are
those of the papers or of their authors' code, none was looked for here. Each finished training is a
line of `results/distill_cifar10.jsonl`; what is there already is not trained again.

A gain is over the student alone, in points of test accuracy: the mean over seeds, with a 95 %
interval that holds both the seeds and the test images as drawn at random. `best_gain_points` is
that of the criterion that is best on validation. `criteria_better_than_alone` counts those whose
interval lies above zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, conclude, options, show
from trainings import Log, gain, right

from attar.recipe import load_recipe

RECIPE = Path(__file__).with_suffix(".yaml")
LOG = Log(RESULTS / "distill_cifar10.jsonl", RECIPE)
ALONE = "alone"
LAST = [{"student": "layer3", "teacher": "layer3"}]
GROUPS = [{"student": f"layer{i}", "teacher": f"layer{i}"} for i in (1, 2, 3)]
CRITERIA: list[dict[str, dict[str, Any]]] = [
    # responses
    {"kd": {}},
    {"kd": {"standardize": True, "temperature": 2, "weight": 9}},
    {"logits-mse": {}},
    {"dkd": {}},
    {"dist": {}},
    {"jensen-shannon": {}},
    # features
    {"feature": {"layers": LAST}},
    {"attention": {"layers": GROUPS, "weight": 10}},
    {"reviewkd": {"layers": GROUPS, "weight": 3}},
    {"vid": {"layers": LAST}},
    {"simkd": {"layers": LAST}},
    # relations
    {"similarity": {"layers": LAST, "weight": 3000}},
    {"rkd": {"layers": LAST, "weight": 25}},
    {"pkt": {"layers": LAST, "weight": 500}},
    {"correlation-congruence": {"layers": LAST}},
    {"crd": {"layers": LAST, "weight": 0.8}},
]
BEST_GOAL, BETTER_GOAL = 0.0, 6


def label_of(criterion: dict[str, dict[str, Any]]) -> str:
    """A criterion's name, and `standardize` where it is on."""
    ((name, settings),) = criterion.items()
    return f"{name} standardized" if settings.get("standardize") else name


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 2) for name, value in figures.items()}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", nargs="*", help="only these criteria, beside the student alone")
    arguments = parser.parse_args()
    overrides = ["data.subset.count=500", "stages.distill.epochs=2"] if arguments.quick else []
    asked = [(ALONE, None), *((label_of(one), one) for one in CRITERIA)]
    if arguments.quick:
        asked = asked[:3]
    if arguments.only:
        asked = [(label, one) for label, one in asked if label in (ALONE, *arguments.only)]
    found = []
    for seed in range(arguments.seeds):
        recipe = load_recipe(str(RECIPE), [*overrides, f"seed={seed}"])
        for label, criterion in asked:
            line = LOG.trained(
                recipe,
                label,
                LOG.setting(overrides, criterion),
                keep=not arguments.quick,
                criteria=[criterion] if criterion else [],
            )
            found.append(line)
    report(found, arguments)


def report(found: list[dict[str, Any]], arguments: Any) -> None:
    by: dict[str, list[dict[str, Any]]] = {}
    for line in found:
        by.setdefault(line["criterion"], []).append(line)
    alone = {line["seed"]: right(line) for line in by[ALONE]}
    rows, gains, validation = [], {}, {}
    for label, own in by.items():
        tests, chosen = ([100 * x[k] for x in own] for k in ("test", "validation"))
        validation[label] = float(np.mean(chosen))
        spread = float(np.std(tests, ddof=1)) if len(own) > 1 else 0.0
        row = [label, f"{validation[label]:.2f}", f"{np.mean(tests):.2f} ± {spread:.2f}"]
        if label != ALONE:
            one = gains[label] = gain({x["seed"]: right(x) for x in own}, alone)
            row += [f"{one['gain']:+.2f} ± {one['half']:.2f}", one["gain"] > one["half"]]
        rows.append(row)
    rows.sort(key=lambda row: -float(row[1]))
    columns = ["criterion", "validation, %", "test, %", "gain, points", "better"]
    show("ResNet-56 → ResNet-8, CIFAR-10", columns, [[*r, *[""] * (5 - len(r))] for r in rows])
    best = max(gains, key=lambda label: validation[label])
    figures = {
        "best_gain_points": round(float(gains[best]["gain"]), 2),
        "criteria_better_than_alone": int(sum(g["gain"] > g["half"] for g in gains.values())),
    }
    goals = {
        "best_gain_points": (">=", BEST_GOAL),
        "criteria_better_than_alone": (">=", BETTER_GOAL),
    }
    table = {
        label: {"validation": round(validation[label], 2), **rounded(g)}
        for label, g in gains.items()
    }
    conclude("distill_cifar10", arguments, figures, goals, best=best, criteria=table)


if __name__ == "__main__":
    main()
