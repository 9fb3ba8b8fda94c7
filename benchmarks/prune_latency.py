"""At the same measured latency, whose choice of channels is the best?

    python benchmarks/prune_latency.py

The shared ResNet-56 loses channels until it answers in a share of its time: ONNX Runtime, one
thread, one image at a time, float (`prune_latency.yaml`). Then all recover alike, for the same few
epochs from the same images. What differs is which channels go:

- `plan`: `prune: {latency_ms: …}`, a solver over layers' measured times;
- `uniform`: the same share of every layer, by the L2 norm;
- `group-norm`: wherever a group's norm, divided by the mean of its layer, is smallest over the
  whole network. That is what Torch-Pruning's group-norm importance ranks by; removed by Attar, as
  Torch-Pruning takes wrong channels of padded shortcuts.

The last two take the smallest ratio, found by bisection, whose network keeps the latency. Latencies
are each timed beside the original's. Finished trainings are lines of
`results/prune_latency.jsonl`; what is there is not trained again.

`points_over_uniform` and `points_over_group_norm` are the plan's accuracy minus theirs on the half
of the test images that chooses nothing, mean over the shares, in points, paired; `half_…` is half
the 95 % interval. `latency_gain_at_equal_accuracy` is how many times longer the uniform network
takes that is as accurate as the plan's, between two that were measured; the smallest over the
shares where there is one. `--quick` does all of it to an untrained ResNet-8, to see that it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, conclude, options, show
from trainings import Log, gain, right

from attar.pipeline.job import Job, job_of
from attar.prune import Widths, criteria, prune_channels
from attar.recipe import Recipe, load_recipe
from attar.runtimes.base import runtimes
from attar.runtimes.target import Target
from attar.student import Student

RECIPE = Path(__file__).with_suffix(".yaml")
LOG = Log(RESULTS / "prune_latency.jsonl", RECIPE)
METHODS: dict[str, dict[str, Any]] = {
    "plan": {},
    "uniform": {"scope": "local"},
    "group-norm": {"scope": "global"},
}
SHARES = (75, 60, 50)
QUICK = [
    "data.subset.count=256",
    "stages.prune.recover.epochs=1",
    "teacher={model: cifar-resnet8, train: {epochs: 1}}",
]
HALVINGS, HALVINGS_QUICK = 6, 2

Line = dict[str, Any]


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    overrides = QUICK if arguments.quick else []
    shares = SHARES[:1] if arguments.quick else SHARES
    found: dict[tuple[str, int, int], Line] = {}
    for seed in range(arguments.seeds):
        recipe = load_recipe(str(RECIPE), [*overrides, f"seed={seed}"])
        for share in shares:
            for method in METHODS:
                found[method, share, seed] = line(recipe, method, share, overrides, arguments)
    report(found, shares, arguments)


def line(
    recipe: Recipe, method: str, share: int, overrides: list[str], arguments: argparse.Namespace
) -> Line:
    """The training's line: from the log, or run now."""
    label, setting = f"{method} {share} %", LOG.setting(overrides)
    known = LOG.find(label, recipe.seed, setting)
    if known is not None:
        return known
    job = job_of(recipe)
    target, original = target_of(job), job.teacher.fresh()
    whole = target.latency_ms(original)
    changes: dict[str, Any] = {"ratio": None, "latency_ms": f"{share}%"}
    if method != "plan":
        steps = HALVINGS_QUICK if arguments.quick else HALVINGS
        changes = {**METHODS[method]}
        changes["ratio"] = smallest_ratio(
            job, original, target, whole * share / 100, changes, steps
        )

    def latency(student: Student) -> Line:
        return {"latency_ms": target.latency_ms(student), "original_ms": whole}

    keep = not arguments.quick
    return LOG.trained(recipe, label, setting, keep=keep, also=latency, **changes)


def target_of(job: Job) -> Target:
    example = job.task.example(job.data)
    batch = next(iter(job.data.validation.batches(job.deploy.batch)))
    return Target(
        runtimes.get(job.deploy.runtime)(),
        example,
        job.task.dynamic_shapes(example),
        (["input"], ["output"]),
        tuple(x.numpy() for x in job.task.arguments(batch)[0]),
        job.deploy.threads,
    )


def smallest_ratio(
    job: Job, original: Student, target: Target, limit: float, how: Line, steps: int
) -> float:
    """By bisection, the smallest ratio whose network takes no longer than `limit`."""
    (stage,) = job.stages
    example = job.task.example(job.data)
    low, high = 0.0, 0.9
    for _ in range(steps):
        ratio = (low + high) / 2
        student, _ = prune_channels(
            original,
            example,
            criterion=criteria.get(stage.criterion)(),
            ratio=ratio,
            scope=how["scope"],
            widths=Widths(stage.floor, stage.round_to),
        )
        if target.latency_ms(student) <= limit:
            high = ratio
        else:
            low = ratio
    return high


# --- reporting ------------------------------------------------------------------------------------


def report(
    found: dict[tuple[str, int, int], Line], shares: tuple[int, ...], arguments: argparse.Namespace
) -> None:
    rows = []
    for share in shares:
        for method in METHODS:
            lines = [found[method, share, seed] for seed in range(arguments.seeds)]
            took = np.mean([x["latency_ms"] / x["original_ms"] for x in lines])
            rows.append(
                [
                    f"{method}, {share} %",
                    f"{np.mean([x['latency_ms'] for x in lines]):.3f}",
                    f"{took:.1%}",
                    *(
                        f"{100 * np.mean([x[k] for x in lines]):.2f}"
                        for k in ("validation", "test")
                    ),
                ]
            )
    columns = ["channels", "ms", "of the original", "validation, %", "test, %"]
    network = "untrained ResNet-8" if arguments.quick else "ResNet-56"
    show(f"{network} at the same latency, CIFAR-10", columns, rows)
    figures = {}
    for other, name in (("uniform", "uniform"), ("group-norm", "group_norm")):
        compared = gain(by_share(found, "plan"), by_share(found, other))
        figures[f"points_over_{name}"] = round(float(compared["gain"]), 2)
        figures[f"half_{name}"] = round(float(compared["half"]), 2)
    gains = [latency_gain(found, share, shares, arguments.seeds) for share in shares]
    known = [x for x in gains if x is not None]
    goals = {}
    if known:
        figures["latency_gain_at_equal_accuracy"] = round(min(known), 3)
        goals = {"latency_gain_at_equal_accuracy": (">=", 1.3)}
    conclude("prune_latency", arguments, figures, goals, seeds=arguments.seeds)


def by_share(found: dict[tuple[str, int, int], Line], method: str) -> dict[int, np.ndarray]:
    """Which test images were right, a row for each share and seed."""
    return {
        1000 * seed + share: right(line)
        for (own, share, seed), line in found.items()
        if own == method
    }


def latency_gain(
    found: dict[tuple[str, int, int], Line], share: int, shares: tuple[int, ...], seeds: int
) -> float | None:
    """How many times longer the uniform network takes that is as accurate as the plan's; `None`
    where none between those measured is."""

    def mean(method: str, at: int, key: str) -> float:
        return float(np.mean([found[method, at, seed][key] for seed in range(seeds)]))

    points = sorted(
        (mean("uniform", at, "test"), mean("uniform", at, "latency_ms")) for at in shares
    )
    accuracies, latencies = zip(*points, strict=True)
    wanted = mean("plan", share, "test")
    if not accuracies[0] <= wanted <= accuracies[-1]:
        return None
    return float(np.interp(wanted, accuracies, latencies)) / mean("plan", share, "latency_ms")


if __name__ == "__main__":
    main()
