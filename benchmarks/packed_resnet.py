"""How small a ResNet-56 packs at half a point of accuracy, on CIFAR-10.

    python benchmarks/packed_resnet.py --seeds 1

The network is one that others trained (3.4 MB of float32 weights); `packed_resnet.yaml` trains its
weights for accuracy and few bits at once, with the network itself as the teacher, and packs them.
Beside it, what a user would do without training, packed as well: int8 and 4-bit weights, 4- and
3-bit codebooks by optimal k-means; and the float weights compressed by `xz`. Choices are made on
one half of the test images, figures are of the other half: `resnet56_drop` in points, paired image
by image.

Finished trainings are lines of `results/packed_resnet.jsonl`; what is there for the same recipe is
not run again. `--quick` trains one epoch on 2,000 images, leaves out the rest, and keeps nothing.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import statistics
import time
from pathlib import Path
from typing import Any

from common import RESULTS, conclude, options, show

from attar.measure.machine import environment
from attar.pipeline import run
from attar.recipe import Recipe, dump_recipe, load_recipe

HERE = Path(__file__).parent
LOG = RESULTS / "packed_resnet.jsonl"
RUNS = Path("runs") / "benchmarks"
GOALS: dict[str, tuple[str, float]] = {"resnet56_ratio": (">=", 20), "resnet56_drop": ("<=", 0.5)}
QUICK = [
    "data.subset=2000",
    "stages.share.recover.epochs=1",
    "stages.share.recover.views=1",
]
UNTRAINED = {
    "int8": ("int8", "quantize: {fallback: off}"),
    "int4-weights": ("4-bit weights", "quantize: {scheme: int4-weights}"),
    "kmeans-4": ("4-bit codebooks", "share: {bits: 4}"),
    "kmeans-3": ("3-bit codebooks", "share: {bits: 3}"),
}
"""By label: what it is called, and the stage that does it."""
Line = dict[str, Any]


def measured(recipe: Recipe, label: str) -> Line:
    """The row of a run's one stage, as a line of the log."""
    started = time.perf_counter()
    folder = RUNS / f"packed-resnet56-{label}-{recipe.seed}"
    ledger = run(recipe, folder, resume=True, tell=progress).ledger
    teacher = ledger["rows"][0]
    row = next(row for row in ledger["rows"] if row["stage"] in ("share", "quantize"))
    weights = (folder / "stages" / "00-teacher" / "student" / "weights.safetensors").read_bytes()
    return {
        "label": label,
        "seed": recipe.seed,
        "key": key_of(recipe),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        "teacher": teacher["metric"]["value"],
        "teacher_bytes": 4 * teacher["parameters"],
        "xz_bytes": len(lzma.compress(weights, preset=9)),
        "accuracy": row["metric"]["value"],
        "drop": row["drop"],
        "validation_drop": row["validation_drop"],
        "packed_bytes": row["packed_bytes"],
        "onnx_bytes": row["bundle"]["bytes"],
        "nonzero": row["nonzero"],
        "seconds": round(time.perf_counter() - started),
    }


def key_of(recipe: Recipe) -> str:
    """What two runs must have in common for one to stand for the other."""
    text = dump_recipe(recipe).replace(os.environ.get("ATTAR_DATA", "data"), "data")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def progress(event: dict[str, Any]) -> None:
    if event["event"] == "stage":
        print(f"  {event['name']}{' (stored)' if event['cached'] else ''}", flush=True)
    elif event["event"] == "epoch":
        print(f"    epoch {event['epoch']} of {event['epochs']}: {event['metric']['value']:.4f}")


def line_of(label: str, seed: int, overrides: list[str], quick: bool) -> Line:
    """A run, from the log where it is there."""
    recipe = load_recipe(str(HERE / "packed_resnet.yaml"), [f"seed={seed}", *overrides])
    key = key_of(recipe)
    if not quick and LOG.exists():
        for text in LOG.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if (line["key"], line["seed"]) == (key, seed):
                return line
    print(f"{label}, seed {seed}", flush=True)
    line = measured(recipe, f"{label}-quick" if quick else label)
    if not quick:
        with LOG.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    return line


def row_of(said: str, lines: list[Line]) -> list[str]:
    size = statistics.mean(line["packed_bytes"] for line in lines)
    drops = ", ".join(
        f"{100 * d['value']:.2f} ({100 * d['low']:.2f} to {100 * d['high']:.2f})"
        for d in (line["drop"] for line in lines)
    )
    return [
        said,
        f"{size / 1000:.1f}",
        f"{lines[0]['teacher_bytes'] / size:.1f}",
        f"{100 * statistics.mean(line['accuracy'] for line in lines):.2f}",
        drops,
        f"{statistics.mean(line['onnx_bytes'] for line in lines) / 1000:.0f}",
    ]


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    RESULTS.mkdir(exist_ok=True)
    quick, extra = arguments.quick, QUICK if arguments.quick else []
    trained = [line_of("rate", seed, extra, quick) for seed in range(arguments.seeds)]
    first = trained[0]
    rows = [["float32", f"{first['teacher_bytes'] / 1000:.0f}", "1.0",
             f"{100 * first['teacher']:.2f}", "", ""]]  # fmt: skip
    ratio = f"{first['teacher_bytes'] / first['xz_bytes']:.1f}"
    rows.append(["float32, xz -9", f"{first['xz_bytes'] / 1000:.0f}", ratio, "", "", ""])
    for label, (said, stage) in ({} if quick else UNTRAINED).items():
        found = line_of(label, 0, [f"stages=[{{{stage}}}]"], quick)
        rows.append(row_of(f"{said}, untrained", [found]))
    rows.append(row_of("accuracy and bits trained", trained))
    show(
        "ResNet-56 on CIFAR-10, packed",
        ["weights", "KB", "ratio", "accuracy, %", "drop, points (95 %)", "ONNX, KB"],
        rows,
    )
    size = statistics.mean(line["packed_bytes"] for line in trained)
    figures = {
        "resnet56_ratio": round(first["teacher_bytes"] / size, 2),
        "resnet56_drop": round(100 * statistics.mean(x["drop"]["value"] for x in trained), 3),
    }
    conclude("packed_resnet", arguments, figures, GOALS, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
