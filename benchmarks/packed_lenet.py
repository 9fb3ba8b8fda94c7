"""How small a file answers on MNIST: packed students beside what was published.

    python benchmarks/packed_lenet.py --seeds 3

Two tables. *Same architecture*: LeNet-5 (431,080 parameters) and LeNet-300-100 (266,610), whose
weights are trained for accuracy and few bits at once (`share: {method: rate}`), as ratios of the
original's float32 weights to one `.attar` file that loads and answers. *Free student*: a network of
three convolutions, small from the start. All are taught by a larger network, on turned, moved and
scaled digits (`packed_teacher.yaml`), which none of the published figures had; those are of the
same architectures without either.

Sizes, rates and everything else were chosen on the validation split (6,000 of the training
digits); errors are on the test split, means over seeds. The teacher is the same for all seeds.
Finished runs are lines of `results/packed_lenet.jsonl`; what is there for the same recipe is not
run again. `--quick` trains two epochs of each, and keeps nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, conclude, options, show

from attar.measure.machine import environment
from attar.pipeline import run
from attar.recipe import Recipe, dump_recipe, load_recipe

HERE = Path(__file__).parent
LOG = RESULTS / "packed_lenet.jsonl"
RUNS = Path("runs") / "benchmarks"
Line = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One network at one size. name: of its figures. weights: bytes of the original's, float32."""

    name: str
    recipe: str
    weights: int | None = None
    overrides: list[str] = field(default_factory=list)


ACCURATE = ["student.arguments.widths=[14, 20, 28]", "stages.share.size=3050B"]
CASES = [
    Case("lenet5", "packed_lenet5.yaml", 4 * 431_080),
    Case("lenet300", "packed_lenet300.yaml", 4 * 266_610),
    Case("free", "packed_free.yaml"),
    Case("free_accurate", "packed_free.yaml", overrides=ACCURATE),
]
GOALS: dict[str, tuple[str, float]] = {
    "lenet5_ratio": (">=", 200),
    "lenet5_error": ("<=", 0.9),
    "lenet300_ratio": (">=", 100),
    "lenet300_error": ("<=", 1.6),
    "free_bytes": ("<=", 1550),
    "free_error": ("<=", 0.9),
    "free_accurate_bytes": ("<=", 3100),
    "free_accurate_error": ("<=", 0.69),
}
PUBLISHED = {
    "lenet5": [
        ("Deep Compression (2015)", "39", "0.74"),
        ("Bayesian Compression (2017)", "771", "1.0"),
        ("MIRACLE (2018)", "555", "0.69"),
        ("MIRACLE (2018)", "1110", "0.96"),
    ],
    "lenet300": [("Deep Compression (2015)", "40", "1.58")],
}
QUICK = ["stages.distill.epochs=1", "stages.share.recover.epochs=2", "stages.share.recover.views=1"]


def teacher(quick: bool) -> Path:
    """The teacher's weights; trained once, then found in the store."""
    overrides = ["teacher.train.epochs=1"] if quick else []
    recipe = load_recipe(str(HERE / "packed_teacher.yaml"), overrides)
    folder = RUNS / f"packed-teacher{'-quick' if quick else ''}"
    run(recipe, folder, resume=True, tell=progress)
    return (folder / "student" / "weights.safetensors").resolve()


def recipe_of(case: Case, seed: int, checkpoint: Path, quick: bool) -> Recipe:
    overrides = [f"seed={seed}", f"teacher.checkpoint={checkpoint}", *case.overrides]
    return load_recipe(str(HERE / case.recipe), overrides + (QUICK if quick else []))


def key_of(recipe: Recipe, checkpoint: Path) -> str:
    """What two runs must have in common for one to stand for the other."""
    text = dump_recipe(recipe).replace(os.environ.get("ATTAR_DATA", "data"), "data")
    return hashlib.sha256(text.replace(str(checkpoint), "teacher").encode()).hexdigest()[:16]


def measure(case: Case, recipe: Recipe, checkpoint: Path) -> Line:
    """One run, as a line of the log."""
    started = time.perf_counter()
    folder = RUNS / f"packed-{case.name}-{recipe.seed}"
    ledger = run(recipe, folder, resume=True, tell=progress).ledger
    row = next(row for row in ledger["rows"] if row["stage"] == "share")
    return {
        "case": case.name,
        "seed": recipe.seed,
        "key": key_of(recipe, checkpoint),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "teacher_error": 100 * (1 - ledger["rows"][0]["metric"]["value"]),
        "error": 100 * (1 - row["metric"]["value"]),
        "low": 100 * (1 - row["metric"]["high"]),
        "high": 100 * (1 - row["metric"]["low"]),
        "validation_error": 100 * (1 - row["validation"]["value"]),
        "packed_bytes": row["packed_bytes"],
        "parameters": row["parameters"],
        "nonzero": row["nonzero"],
        "seconds": round(time.perf_counter() - started),
    }


def progress(event: dict[str, Any]) -> None:
    if event["event"] == "stage":
        print(f"  {event['name']}{' (stored)' if event['cached'] else ''}", flush=True)


def finished() -> list[Line]:
    if not LOG.exists():
        return []
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]


def lines_of(case: Case, seeds: int, checkpoint: Path, quick: bool) -> list[Line]:
    """Its runs, seed by seed; those that the log has aren't made again."""
    known = {(line["key"], line["seed"]): line for line in finished()}
    lines = []
    for seed in range(seeds):
        recipe = recipe_of(case, seed, checkpoint, quick)
        line = known.get((key_of(recipe, checkpoint), seed))
        if line is None or quick:
            print(f"{case.name}, seed {seed}", flush=True)
            line = measure(case, recipe, checkpoint)
            if not quick:
                with LOG.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
        lines.append(line)
    return lines


def figures_of(case: Case, lines: list[Line]) -> dict[str, float]:
    """Means over the seeds."""
    size = statistics.mean(line["packed_bytes"] for line in lines)
    error = statistics.mean(line["error"] for line in lines)
    found = {f"{case.name}_error": round(error, 4)}
    if case.weights is None:
        return {f"{case.name}_bytes": round(size, 1), **found}
    return {f"{case.name}_ratio": round(case.weights / size, 1), **found}


def spread(values: list[float]) -> str:
    """`mean ± sd`, or the one value."""
    text = f"{statistics.mean(values):.2f}"
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def row_of(case: Case, lines: list[Line]) -> list[str]:
    sizes = [line["packed_bytes"] for line in lines]
    ratio = "" if case.weights is None else f"{case.weights / statistics.mean(sizes):.0f}"
    return [
        case.name,
        f"Attar, {len(lines)} seeds",
        ratio,
        ", ".join(map(str, sizes)),
        spread([line["error"] for line in lines]),
        spread([line["validation_error"] for line in lines]),
        f"{statistics.mean(line['nonzero'] for line in lines):.0f}",
    ]


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    checkpoint = teacher(arguments.quick)
    wanted = [c for c in CASES if arguments.cases is None or c.name in arguments.cases]
    rows, figures = [], {}
    for case in wanted:
        lines = lines_of(case, arguments.seeds, checkpoint, arguments.quick)
        figures |= figures_of(case, lines)
        rows += [[case.name, said, ratio, "", error, "", ""]
                 for said, ratio, error in PUBLISHED.get(case.name, [])]  # fmt: skip
        rows.append(row_of(case, lines))
    show(
        "MNIST: the smallest file that answers",
        ["network", "by", "ratio", "bytes", "test error, %", "validation error, %", "nonzero"],
        rows,
    )
    goals = {name: goal for name, goal in GOALS.items() if name in figures}
    conclude("packed_lenet", arguments, figures, goals, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
