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
plan is held against the fastest of the other's networks that takes at least as long (within 3 %),
where there is one. `latency_gain_at_equal_accuracy` is how many times longer the uniform network
takes that is as accurate as the plan's, between two that were measured; the smallest over the
shares where there is one. `int8_…` says the same of the quantized networks, at the latency that
each has then. `--quick` does all of it to an untrained ResNet-8, to see that it runs.
"""

from __future__ import annotations

import argparse
import tempfile
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
AS_SLOW = 0.97
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
    target, original = target_of(job), job.teacher.fresh()
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
            "int8": in_int8(job, original, student),
        }

    keep = not arguments.quick
    return LOG.trained(recipe, label, setting, keep=keep, also=measured, **changes)


def in_int8(job: Job, original: Student, student: Student) -> Line:
    """What the quantized networks take, and which test images the smaller one gets right."""
    target = target_of(job)
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

Found = dict[tuple[str, int, int], Line]


def report(found: Found, shares: tuple[int, ...], arguments: argparse.Namespace) -> None:
    network = "untrained ResNet-8" if arguments.quick else "ResNet-56"
    columns = ["removed by", "ms", "of the original", "test, %", "int8: ms", "of float", "test, %"]
    rows = [row(found, *case, arguments.seeds) for case in tried(shares, arguments.quick)]
    show(f"{network} at the same latency, CIFAR-10", columns, rows)
    figures: dict[str, float] = {}
    for name, lines in (("", found), ("int8_", {k: v["int8"] for k, v in found.items()})):
        figures |= {f"{name}{k}": v for k, v in compared(lines, shares, arguments.seeds).items()}
    goals = {k: (">=", 1.3) for k in figures if k.endswith("latency_gain_at_equal_accuracy")}
    conclude("prune_latency", arguments, figures, goals, seeds=arguments.seeds)


def row(found: Found, method: str, share: int, seeds: int) -> list[str]:
    lines = [found[method, share, seed] for seed in range(seeds)]
    int8 = [line["int8"] for line in lines]
    ms, quantized = (np.mean([x["latency_ms"] for x in one]) for one in (lines, int8))
    whole = np.mean([x["original_ms"] for x in lines])
    right_in_float, right_in_int8 = (np.mean([x["test"] for x in one]) for one in (lines, int8))
    return [
        f"{method}, {share} %", f"{ms:.3f}", f"{ms / whole:.1%}", f"{100 * right_in_float:.2f}",
        f"{quantized:.3f}", f"{quantized / whole:.1%}", f"{100 * right_in_int8:.2f}",
    ]  # fmt: skip


def compared(found: Found, shares: tuple[int, ...], seeds: int) -> dict[str, float]:
    """The plan beside the others, paired; and how much longer uniform pruning takes to be as
    right."""
    figures = {}
    for other, name in (("uniform", "uniform"), ("group-norm", "group_norm")):
        own, others = beside(found, other, shares, seeds)
        if own:
            figures[f"points_over_{name}"] = round(float(gain(own, others)["gain"]), 2)
            figures[f"half_{name}"] = round(float(gain(own, others)["half"]), 2)
    gains = [latency_gain(found, share, seeds) for share in shares]
    if known := [x for x in gains if x is not None]:
        figures["latency_gain_at_equal_accuracy"] = round(min(known), 3)
    return figures


def beside(
    found: Found, other: str, shares: tuple[int, ...], seeds: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Which test images the plan's networks got right, and which those of another method did that
    are at least as slow: a row for each share and seed."""
    own, others = {}, {}
    for share in shares:
        least = AS_SLOW * mean(found, "plan", share, "latency_ms", seeds)
        slower = {
            at: latency
            for at in {at for method, at, _ in found if method == other}
            if (latency := mean(found, other, at, "latency_ms", seeds)) >= least
        }
        if slower:
            rival = min(slower, key=slower.__getitem__)
            for seed in range(seeds):
                own[1000 * seed + share] = right(found["plan", share, seed])
                others[1000 * seed + share] = right(found[other, rival, seed])
    return own, others


def mean(found: Found, method: str, share: int, key: str, seeds: int) -> float:
    return float(np.mean([found[method, share, seed][key] for seed in range(seeds)]))


def latency_gain(found: Found, share: int, seeds: int) -> float | None:
    """How many times longer the uniform network takes that is as accurate as the plan's; `None`
    where none between those measured is."""

    shares = {at for method, at, _ in found if method == "uniform"}
    points = sorted(
        tuple(mean(found, "uniform", at, key, seeds) for key in ("test", "latency_ms"))
        for at in shares
    )
    accuracies, latencies = zip(*points, strict=True)
    wanted = mean(found, "plan", share, "test", seeds)
    if not accuracies[0] <= wanted <= accuracies[-1]:
        return None
    needed = float(np.interp(wanted, accuracies, latencies))
    return needed / mean(found, "plan", share, "latency_ms", seeds)


if __name__ == "__main__":
    main()
