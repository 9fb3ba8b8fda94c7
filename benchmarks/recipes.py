"""The shipped recipes, run whole, seed by seed, and held to what the project promises of them.

    python benchmarks/recipes.py --recipes mnist pneumonia --seeds 3

Every finished run is a line of `results/recipes.jsonl`; runs of the same recipe that are there
already, from such a machine, are not made again, so what one sitting could not finish the next goes
on with. Each recipe's own figures:

- `<recipe>_bytes_ratio`: the teacher's bytes over the final bundle's;
- `<recipe>_speed_up`: the teacher in eager PyTorch over the final bundle, one thread, batch 1,
  side by side in one process; `<recipe>_runtime_speed_up` is the part that exporting alone gave;
- `<recipe>_drop_points`: how much of the metric was lost on the test split, in points;
- `<recipe>_int8_over_float`: the upper bound of the paired ratio of the quantized bundle's time to
  that of the same student in float.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, conclude, options, show

from attar.measure.intervals import ratio_interval
from attar.measure.latency import time_interleaved
from attar.measure.machine import environment
from attar.pipeline import run
from attar.recipe import Recipe, dump_recipe, load_recipe
from attar.runtimes.bundle import read_bundle

GOALS: dict[str, tuple[str, float]] = {
    "mnist_bytes_ratio": (">=", 20),
    "mnist_speed_up": (">=", 10),
    "mnist_drop_points": ("<=", 0.2),
    "cifar10-cnn_speed_up": (">=", 48),
    "cifar10-cnn_drop_points": ("<=", 0),
    "cifar10-resnet56_speed_up": (">=", 20),
    "cifar10-resnet56_drop_points": ("<=", 2),
}
INT8_GOAL: tuple[str, float] = ("<=", 1.05)
LOG = RESULTS / "recipes.jsonl"


def finished() -> list[dict[str, Any]]:
    if not LOG.exists():
        return []
    return [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs must have in common for one to stand for the other."""
    machine = run["environment"]
    return run.get("recipe_sha256"), machine["cpu"], tuple(machine.get("instructions", ()))


def described(recipe: Recipe) -> dict[str, Any]:
    """A run of this recipe on this machine, before anything is measured."""
    text = dump_recipe(recipe).replace(os.environ.get("ATTAR_DATA", "data"), "data")
    return {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": recipe.seed,
        "environment": environment(),
    }


def run_once(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """One run of a recipe, as a line of the log."""
    name, seed = recipe.name, recipe.seed
    folder = Path("runs") / "benchmarks" / f"{name}-{seed}"
    started = time.perf_counter()
    done = run(recipe, folder, resume=True, tell=progress)
    ledger = done.ledger
    first, last = ledger["rows"][0], ledger["rows"][-1]
    return {
        **described(recipe),
        "overrides": overrides,
        "date": time.strftime("%Y-%m-%d"),
        "teacher": first["metric"]["value"],
        "final": last["metric"]["value"],
        "metric": first["metric"]["name"],
        "further": [first["metric"].get("further"), last["metric"].get("further")],
        "drop": last["drop"],
        "bytes": [first["bundle"]["bytes"], last["bundle"]["bytes"]],
        "latency_ms": [first["latency"][0]["p50_ms"], last["latency"][0]["p50_ms"]],
        "speedup": ledger["speedup"],
        "int8_over_float": int8_over_float(folder, ledger["rows"]),
        "seconds": round(time.perf_counter() - started),
        "computed_seconds": round(sum(row["seconds"] for row in ledger["rows"])),
    }


def int8_over_float(folder: Path, rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """The quantized bundle beside the same student's float bundle, taking turns."""
    at = next((i for i, row in enumerate(rows) if row["stage"] == "quantize"), None)
    if at is None:
        return None
    calls = {}
    for name, row in (("float", rows[at - 1]), ("int8", rows[at])):
        bundle = read_bundle(folder / row["bundle"]["path"])
        session = bundle.session(threads=1)
        inputs = tuple(x[:1] for x in bundle.golden()[0])
        calls[name] = lambda session=session, inputs=inputs: session(*inputs)
    timed = time_interleaved(calls, seconds=2)
    ratio = ratio_interval(
        np.array(timed["int8"]["round_ms"]), np.array(timed["float"]["round_ms"])
    )
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def progress(event: dict[str, Any]) -> None:
    if event["event"] == "stage":
        print(f"  {event['name']}{' (stored)' if event['cached'] else ''}", flush=True)


def figures_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of one recipe's runs: means over seeds; the worst seed for int8."""
    name = runs[0]["recipe"]
    figures = {
        f"{name}_bytes_ratio": statistics.mean(r["bytes"][0] / r["bytes"][1] for r in runs),
        f"{name}_speed_up": statistics.mean(r["speedup"]["total"]["value"] for r in runs),
        f"{name}_runtime_speed_up": statistics.mean(r["speedup"]["runtime"]["value"] for r in runs),
        f"{name}_drop_points": 100 * statistics.mean(r["drop"]["value"] for r in runs),
    }
    ratios = [r["int8_over_float"]["high"] for r in runs if r["int8_over_float"]]
    if ratios:
        figures[f"{name}_int8_over_float"] = max(ratios)
    return {key: round(value, 3) for key, value in figures.items()}


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """`mean ± sd` of several seeds, or the one value."""
    text = f"{scale * statistics.mean(values):.{digits}f}"
    return f"{text} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def row_of(runs: list[dict[str, Any]]) -> list[str]:
    final_bytes = statistics.mean(r["bytes"][1] for r in runs)
    return [
        runs[0]["recipe"],
        str(len(runs)),
        spread([r["teacher"] for r in runs], 100),
        spread([r["final"] for r in runs], 100),
        spread([r["drop"]["value"] for r in runs], 100),
        f"{runs[0]['bytes'][0] / 1e3:.0f} → {final_bytes / 1e3:.1f}",
        spread([r["latency_ms"][0] for r in runs], digits=3),
        spread([r["latency_ms"][1] for r in runs], digits=4),
        spread([r["speedup"]["total"]["value"] for r in runs], digits=1),
        spread([r["speedup"]["runtime"]["value"] for r in runs], digits=1),
    ]


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--recipes", nargs="+", default=["digits"], help="which; default: digits")
    parser.add_argument("--set", action="append", default=[], help="as in attar run --set")
    arguments = parser.parse_args()
    names = ["digits"] if arguments.quick else arguments.recipes
    RESULTS.mkdir(exist_ok=True)
    known = {key_of(run): run for run in finished()}
    table, figures = [], {}
    for name in names:
        runs = []
        for seed in range(arguments.seeds):
            recipe = load_recipe(name, [f"seed={seed}", *arguments.set])
            key = key_of(described(recipe))
            if key not in known or arguments.quick:
                print(f"{name}, seed {seed}", flush=True)
                known[key] = run_once(recipe, arguments.set)
                if not arguments.quick:
                    with LOG.open("a", encoding="utf-8") as log:
                        log.write(json.dumps(known[key]) + "\n")
            runs.append(known[key])
        table.append(row_of(runs))
        figures |= figures_of(runs)
    show(
        "The shipped recipes: teacher in eager PyTorch against the final bundle",
        [
            "recipe", "seeds", "teacher %", "final %", "drop, points", "KB",
            "eager ms", "final ms", "speed-up", "of it runtime",
        ],
        table,
    )  # fmt: skip
    goals = {k: v for k, v in GOALS.items() if k in figures}
    goals |= {k: INT8_GOAL for k in figures if k.endswith("_int8_over_float")}
    conclude("recipes", arguments, figures, goals, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
