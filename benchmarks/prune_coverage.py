"""Networks halved with answers equal to their masked selves, out of all tried, by Attar and by
Torch-Pruning.

    python benchmarks/prune_coverage.py --quick
    python benchmarks/prune_coverage.py --source timm --tool attar

The networks are all of torchvision's classifiers up to 100 M parameters, families of timm at a
small size, and classifiers of text that the library transformers builds (`coverage_networks.py`).
All have random weights, made lively so that a wrong channel shows; nothing is downloaded. Each is
pruned by L1 magnitude at a ratio of 0.5, layer by layer, the output layer left alone. A network is
`halved` where all of this holds:

- at most half of its parameters are left;
- it answers on two random examples as the masked network, within 1e-4 of the largest answer;
- saved and loaded in a fresh process, it answers the same, within 1e-6;
- pruning, saving, loading and answering take at most 60 seconds of one core's time.

Each tool's work runs in a process of its own, of one thread (`coverage_worker.py`). The clock
starts there after all imports, and counts processor time, so that other work on the machine doesn't
count; at 60 seconds the system ends the process. The fresh process has what the first left of the
60. Making the network to be pruned and checking it against the masked one are the benchmark's own
and off the clock.

The check is the same for both tools and knows nothing of what they say they did: what was removed
is read off the weights that are left, and the same weights are set to zero in a copy. Where that
answers otherwise, the copy computes norms, means and softmaxes over channels over those that stay,
and the pruned network's attention is scaled as it was: a narrower head may scale by its new width.
Where the pruned network has a plain convolution for one that computes its weight, so has the copy,
with the weight as it was computed.

Torch-Pruning (`pip install torch-pruning==1.6.1`, no dependency of Attar's) gets what its README
gives, and the rules that its examples for torchvision, timm and BERT add, for every network alike:
the heads of attention by the modules' own counts, and widths that its examples set after pruning.
What its examples do for single architectures beyond that (language models' heads, edited code)
isn't done. It is saved as it says: the whole module by `torch.save`. Where it isn't installed its
column is left out.

Results are lines of `results/prune_coverage.jsonl`, by network, tool and version (Attar's is a hash
of its code that prunes, saves and loads): what is there isn't measured again without `--again`, so
the whole can be measured in pieces. `--quick` measures six networks afresh and keeps none.
`--seeds` changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import RESULTS, conclude, options, show
from coverage_networks import Network, networks

import attar
from attar.measure.machine import environment

LOG = RESULTS / "prune_coverage.jsonl"
WORKER = Path(__file__).with_name("coverage_worker.py")
SECONDS, SHARE, TOLERANCE, LOADED = 60.0, 0.5, 1e-4, 1e-6
STUCK = 1800
"""Seconds after which a process is given up that neither ends nor uses its time."""
SOURCES = ("torchvision", "timm", "transformers")
TOOLS = ("attar", "torch-pruning")
HALVED, OVER = "halved", f"over {SECONDS:g} s"
QUICK = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "timm:vit_tiny_patch16_224",
    "timm:convnextv2_atto",
    "transformers:Bert",
]
GOAL = 1.0

Row = dict[str, Any]


def main() -> None:
    arguments = parsed()
    tools = [t for t in TOOLS if not arguments.tool or t in arguments.tool]
    if "torch-pruning" in tools and importlib.util.find_spec("torch_pruning") is None:
        tools.remove("torch-pruning")
        print(
            "Torch-Pruning's column is left out, since it isn't installed: "
            "pip install torch-pruning==1.6.1"
        )
    asked = [n for n in networks() if wanted(n, arguments)]
    known = {} if arguments.quick else stored()
    now = {tool: version_of(tool) for tool in TOOLS}
    rows = {(key, tool): row for (key, tool, v), row in known.items() if v == now[tool]}
    pairs = [(one, tool) for one in asked for tool in tools]
    for row in measured([p for p in pairs if arguments.again or (p[0].key, p[1]) not in rows]):
        rows[row["network"], row["tool"]] = row
        if not arguments.quick:
            with LOG.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    report(asked, rows, tools, arguments)


def parsed() -> argparse.Namespace:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these networks")
    parser.add_argument("--source", nargs="+", choices=SOURCES, help="only these libraries'")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, help="measure only these tools")
    parser.add_argument("--again", action="store_true", help="measure again what is stored")
    return parser.parse_args()


def wanted(one: Network, arguments: argparse.Namespace) -> bool:
    if arguments.only:
        return one.name in arguments.only or one.key in arguments.only
    if arguments.source:
        return one.source in arguments.source
    return not arguments.quick or one.key in QUICK


def version_of(tool: str) -> str:
    """Torch-Pruning's own; Attar's is a hash of the code that prunes, saves and loads."""
    if tool == "torch-pruning":
        try:
            return version(tool)
        except PackageNotFoundError:
            return "1.6.1"
    root = Path(attar.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(f for part in ("prune", "student") for f in (root / part).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def stored() -> dict[tuple[str, str, str], Row]:
    """What was measured before; of lines for the same the last holds."""
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.exists() else []
    rows = map(json.loads, lines)
    return {(row["network"], row["tool"], row["version"]): row for row in rows}


# --- measuring ------------------------------------------------------------------------------------


def measured(todo: list[tuple[Network, str]]) -> Iterator[Row]:
    """The rows, as many at a time as there are cores, in order."""
    if not todo:
        return
    machine = environment()

    def row(one: tuple[Network, str]) -> Row:
        network, tool = one
        return {
            "network": network.key,
            "source": network.source,
            "tool": tool,
            "version": version_of(tool),
            **measure(network, tool),
            "environment": machine,
        }

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for done in pool.map(row, todo):
            share = "" if done["share"] is None else f", {done['share']:.3f} left"
            print(f"{done['network']}, {done['tool']}: {done['outcome']}{share}", flush=True)
            yield done


def measure(one: Network, tool: str) -> Row:
    """One network by one tool: what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        steps, failure = run("make", one, tool, folder, SECONDS)
        if "made" in steps and not failure:
            left = max(SECONDS - steps["made"]["seconds"], 0.01)
            more, failure = run("load", one, tool, folder, left)
            steps.update(more)
    made, loaded = steps.get("made", {}), steps.get("loaded", {})
    return {
        "share": made.get("share"),
        "difference": steps.get("checked", {}).get("difference"),
        "difference_loaded": loaded.get("difference"),
        "seconds": round(made["seconds"] + loaded["seconds"], 2) if loaded else None,
        "outcome": outcome(steps, failure),
        "notes": [note[:300] for note in made.get("notes", [])],
    }


def outcome(steps: dict[str, Row], failure: str | None) -> str:
    """In a word or a sentence."""
    checking = "made" in steps and "checked" not in steps
    if failure == OVER and not checking:
        return OVER
    if failure:
        at = " in the check" if checking else " when loaded" if "made" in steps else ""
        return f"error{at}: {failure}"
    if (
        not steps["checked"]["difference"] <= TOLERANCE
        or not steps["loaded"]["difference"] <= LOADED
    ):
        return "wrong answers"
    return "too little" if steps["made"]["share"] > SHARE else HALVED


def run(
    step: str, one: Network, tool: str, folder: str, seconds: float
) -> tuple[dict[str, Row], str | None]:
    """What the process told, by step, and how it failed, if it did."""
    command = [sys.executable, "-W", "ignore", str(WORKER), step, one.key, tool, folder]
    try:
        ended = subprocess.run(
            [*command, f"{seconds:.3f}"],
            capture_output=True,
            text=True,
            timeout=STUCK,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {}, OVER
    lines = [json.loads(x) for x in ended.stdout.splitlines() if x.startswith('{"step"')]
    steps = {line.pop("step"): line for line in lines}
    if ended.returncode == 0:
        return steps, None
    if ended.returncode == -signal.SIGPROF:
        return steps, OVER
    if ended.returncode < 0:
        return steps, f"the process was ended by {signal.Signals(-ended.returncode).name}"
    return steps, sentence(ended.stderr)


def sentence(text: str) -> str:
    """The error at the end of a traceback."""
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    errors = [line for line in lines if "Error" in line.partition(":")[0]] or lines or ["unknown"]
    return errors[-1][:300]


# --- reporting ------------------------------------------------------------------------------------


def report(
    asked: list[Network],
    rows: dict[tuple[str, str], Row],
    tools: list[str],
    arguments: argparse.Namespace,
) -> None:
    table = []
    for one in asked:
        own = [rows.get((one.key, tool)) for tool in TOOLS]
        table.append([one.key, *map(said, own), " / ".join(map(seconds_of, own))])
    show("Networks halved", ["network", "Attar", "Torch-Pruning", "seconds"], table)
    figures: dict[str, float] = {}
    for tool, prefix in zip(TOOLS, ("coverage", "coverage_torch_pruning"), strict=True):
        for source in (None, *SOURCES):
            mine = [n for n in asked if source in (None, n.source)]
            found = [rows[n.key, tool] for n in mine if (n.key, tool) in rows]
            if found and len(found) == len(mine):
                halved = sum(row["outcome"] == HALVED for row in found)
                name = f"{prefix}_{source}" if source else prefix
                figures[name] = round(halved / len(found), 4)
    goals = {"coverage": (">=", GOAL)} if "attar" in tools and "coverage" in figures else {}
    tried = {s: sum(n.source == s for n in asked) for s in SOURCES}
    conclude("prune_coverage", arguments, figures, goals, tried=tried)


def said(row: Row | None) -> str:
    """A cell: the share that is left, and the outcome where it isn't halved."""
    if row is None:
        return ""
    share = "" if row["share"] is None else f"{row['share']:.3f} "
    return (share + ("" if row["outcome"] == HALVED else row["outcome"])).strip()[:48]


def seconds_of(row: Row | None) -> str:
    return "–" if row is None or row["seconds"] is None else f"{row['seconds']:.1f}"


if __name__ == "__main__":
    main()
