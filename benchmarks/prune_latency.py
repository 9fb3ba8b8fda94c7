"""At the same measured latency, whose choice of what to remove is the best?

    python benchmarks/prune_latency.py

The shared ResNet-56 is made smaller until it answers in a share of its time: ONNX Runtime, one
thread, one image at a time, float (`prune_latency.yaml`). Then all recover alike, for the same two
epochs over the same images, and are quantized to int8 after that. What differs is what goes:

- `plan`: `prune: {latency_ms: …}`, a solver over layers' measured times: channels and blocks;
- `uniform`: the same share of every layer's channels, by the L2 norm;
- `group-norm`: wherever a group's norm, divided by the mean of its layer, is smallest over the
  whole network. That is what Torch-Pruning's group-norm importance ranks by; removed by Attar, as
  Torch-Pruning takes wrong channels of padded shortcuts.

The last two take the smallest ratio, found by bisection, whose network keeps the latency. Latencies
are each timed beside the original's. Finished trainings are lines of
`results/prune_latency.jsonl`; what is there is not trained again.

`points_over_uniform` and `points_over_group_norm` are the plan's accuracy minus theirs on the half
of the test images that chooses nothing, mean over the shares, in points, paired; `half_…` is half
the 95 % interval. Latency falls in steps, and by a ratio alone not every latency is met; so each
plan is held against the fastest of the other's networks that takes at least as long (within 5 %),
where there is one. `latency_gain_at_equal_accuracy` is how many times longer the uniform network
takes that is as accurate as the plan's, between two that were measured, the original counting as
one of which nothing was removed; the smallest over the shares. `int8_…` says the same of the
quantized networks. Latencies are compared as shares of the original's, timed beside each.
`--quick` does all of it to an untrained ResNet-8, to see that it runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
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
from attar.stages.base import Context
from attar.stages.quantize import Quantize
from attar.student import Student
from attar.training.evaluation import statistics_of

RECIPE = Path(__file__).with_suffix(".yaml")
LOG = Log(RESULTS / "prune_latency.jsonl", RECIPE)
METHODS: dict[str, dict[str, Any]] = {
    "plan": {},
    "uniform": {"scope": "local"},
    "group-norm": {"scope": "global"},
}
SHARES = (60, 45)
FURTHER = (90, 75)
"""Shares that only uniform pruning is tried at too, to see how much time it needs to do as well."""
QUICK = [
    "data.subset.count=256",
    "stages.prune.recover.epochs=1",
    "teacher={model: cifar-resnet8, train: {epochs: 1}}",
]
AS_SLOW = 0.95
"""Of the plan's latency: what takes no less counts as slow as it."""
HALVINGS, HALVINGS_QUICK = 6, 1

Line = dict[str, Any]


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    overrides = QUICK if arguments.quick else []
    shares = SHARES[:1] if arguments.quick else SHARES
    found: Found = {}
    for seed in range(arguments.seeds):
        recipe = load_recipe(str(RECIPE), [*overrides, f"seed={seed}"])
        for method, share in tried(shares, arguments.quick):
            found[method, share, seed] = line(recipe, method, share, overrides, arguments)
    report(found, shares, arguments)


def tried(shares: tuple[int, ...], quick: bool) -> list[tuple[str, int]]:
    """The methods, each with a share of the latency."""
    further = () if quick else FURTHER
    return [(m, s) for s in shares for m in METHODS] + [("uniform", s) for s in further]


def line(
    recipe: Recipe, method: str, share: int, overrides: list[str], arguments: argparse.Namespace
) -> Line:
    """The training's line: from the log, or run now."""
    label, setting = f"{method} {share} %", LOG.setting(overrides)
    known = LOG.find(label, recipe.seed, setting)
    if known is not None:
        return known
    job = job_of(recipe)
    target, original = target_of(job, arguments.quick), job.teacher.fresh()
    whole = target.latency_ms(original)
    changes: dict[str, Any] = {"ratio": None, "latency_ms": f"{share}%"}
    if method != "plan":
        steps = HALVINGS_QUICK if arguments.quick else HALVINGS
        changes = {**METHODS[method]}
        changes["ratio"] = smallest_ratio(
            job, original, target, whole * share / 100, changes, steps
        )

    def measured(student: Student) -> Line:
        return {
            "latency_ms": target.latency_ms(student),
            "original_ms": whole,
            "int8": in_int8(job, original, student, arguments.quick),
        }

    keep = not arguments.quick
    return LOG.trained(recipe, label, setting, keep=keep, also=measured, **changes)


def in_int8(job: Job, original: Student, student: Student, quick: bool) -> Line:
    """What the quantized networks take, and which test images the smaller one gets right."""
    target = target_of(job, quick)
    work = Path("runs") / "benchmarks" / job.name / "int8"
    run = Context(job.task, job.data, None, job.seed, work, runtime=job.deploy.runtime)
    before, after = (Quantize(fallback="off").apply(one.copy(), run) for one in (original, student))
    whole, latency = target.latency_ms(before), target.latency_ms(after)
    with tempfile.TemporaryDirectory() as folder:
        target.export(after, Path(folder))
        session = target.runtime.session(Path(folder), threads=1)
        statistics = [
            job.task.statistics(
                session(*(x.numpy() for x in job.task.arguments(batch)[0]))[0], batch
            )
            for batch in job.data.test.batches(250)
        ]
    hits = job.task.hits(np.concatenate(statistics)).astype(bool)
    return {
        "latency_ms": latency,
        "original_ms": whole,
        "test": float(hits.mean()),
        "hits": np.packbits(hits).tobytes().hex(),
    }


def target_of(job: Job, quick: bool) -> Target:
    example = job.task.example(job.data)
    batch = next(iter(job.data.validation.batches(job.deploy.batch)))
    return Target(
        runtimes.get(job.deploy.runtime)(),
        example,
        job.task.dynamic_shapes(example),
        (["input"], ["output"]),
        tuple(x.numpy() for x in job.task.arguments(batch)[0]),
        job.deploy.threads,
        seconds=0.3 if quick else 1.5,
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

Found = dict[tuple[str, int, int], Line]


def report(found: Found, shares: tuple[int, ...], arguments: argparse.Namespace) -> None:
    network = "untrained ResNet-8" if arguments.quick else "ResNet-56"
    columns = ["removed by", "ms", "of original", "test, %", "int8: ms", "of original", "test, %"]
    rows = [row(found, *case, arguments.seeds) for case in tried(shares, arguments.quick)]
    show(f"{network} at the same latency, CIFAR-10", columns, rows)
    figures: dict[str, float] = {}
    whole = original_right(arguments)
    for name, lines in (("", found), ("int8_", {k: v["int8"] for k, v in found.items()})):
        said = compared(lines, shares, arguments.seeds, whole)
        figures |= {f"{name}{k}": v for k, v in said.items()}
    goals = {k: (">=", 1.3) for k in figures if k.endswith("latency_gain_at_equal_accuracy")}
    conclude("prune_latency", arguments, figures, goals, seeds=arguments.seeds)


def row(found: Found, method: str, share: int, seeds: int) -> list[str]:
    lines = [found[method, share, seed] for seed in range(seeds)]
    cells = [f"{method}, {share} %"]
    for form in (lines, [line["int8"] for line in lines]):
        cells += [
            f"{np.mean([x['latency_ms'] for x in form]):.3f}",
            f"{np.mean([took(x) for x in form]):.1%}",
            f"{100 * np.mean([x['test'] for x in form]):.2f}",
        ]
    return cells


def original_right(arguments: argparse.Namespace) -> float:
    """The share of the test images that the original gets right, in float."""
    job = job_of(load_recipe(str(RECIPE), QUICK if arguments.quick else []))
    module = job.teacher.fresh().module
    return float(job.task.value(statistics_of(module, job.data.test, job.task)))


def took(line: Line) -> float:
    """The latency as a share of the original's."""
    return float(line["latency_ms"] / line["original_ms"])


def compared(found: Found, shares: tuple[int, ...], seeds: int, whole: float) -> dict[str, float]:
    """The plan beside the others, paired; and how much longer uniform pruning takes to be as
    right."""
    figures = {}
    for other, name in (("uniform", "uniform"), ("group-norm", "group_norm")):
        own, others = beside(found, other, shares, seeds)
        if own:
            figures[f"points_over_{name}"] = round(float(gain(own, others)["gain"]), 2)
            figures[f"half_{name}"] = round(float(gain(own, others)["half"]), 2)
    gains = [latency_gain(found, share, seeds, whole) for share in shares]
    if known := [x for x in gains if x is not None]:
        figures["latency_gain_at_equal_accuracy"] = round(min(known), 3)
    return figures


def beside(
    found: Found, other: str, shares: tuple[int, ...], seeds: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """By seed, how often each test image was classified rightly, mean over the shares: by the
    plan's networks, and by those of another method that are at least as slow."""
    rivals = {}
    for share in shares:
        least = AS_SLOW * mean(found, "plan", share, took, seeds)
        tried = {at for method, at, _ in found if method == other}
        slower = {at: mean(found, other, at, took, seeds) for at in tried}
        slower = {at: latency for at, latency in slower.items() if latency >= least}
        if slower:
            rivals[share] = min(slower, key=slower.__getitem__)

    def rightly(method: str, of: Iterable[int], seed: int) -> np.ndarray:
        return np.mean([right(found[method, at, seed]) for at in of], axis=0)

    if not rivals:
        return {}, {}
    own = {seed: rightly("plan", rivals, seed) for seed in range(seeds)}
    return own, {seed: rightly(other, rivals.values(), seed) for seed in range(seeds)}


def mean(found: Found, method: str, share: int, of: Callable[[Line], float], seeds: int) -> float:
    return float(np.mean([of(found[method, share, seed]) for seed in range(seeds)]))


def latency_gain(found: Found, share: int, seeds: int, whole: float) -> float | None:
    """How many times longer the uniform network takes that is as accurate as the plan's; `None`
    where none between those measured and the original is."""
    shares = {at for method, at, _ in found if method == "uniform"}
    points = [
        (
            mean(found, "uniform", at, lambda x: x["test"], seeds),
            mean(found, "uniform", at, took, seeds),
        )
        for at in shares
    ]
    accuracies, latencies = zip(*sorted([*points, (whole, 1.0)]), strict=True)
    wanted = mean(found, "plan", share, lambda x: x["test"], seeds)
    if not accuracies[0] <= wanted <= accuracies[-1]:
        return None
    needed = float(np.interp(wanted, accuracies, latencies))
    return needed / mean(found, "plan", share, took, seeds)


if __name__ == "__main__":
    main()
