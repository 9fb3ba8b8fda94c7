"""A bundle on the machine it is to run on: does it answer as it should, how fast, in how much
memory. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attar.errors import BundleError
from attar.runtimes.base import GraphPasses
from attar.runtimes.bundle import Bundle, read_bundle

FORM = 1
FLOAT_DIFFERENCE = 1e-3
QUANTIZED_DIFFERENCE = 0.05
"""Shares of the outputs' scale by which another machine's answers may differ: kernels add in
another order, and one integer rounding step can move the ones after it."""


def bench(
    folder: Path,
    *,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 2.0,
    passes: GraphPasses = "all",
) -> dict[str, Any]:
    """Replays the golden inputs, then measures.

    Returns `attar_bench` (the form's number, which the bundle's own `predict.py --bench` writes
    too), `model_sha256` (of the main file), `golden` (`agrees`, `max_abs_diff`, `n`), `latency` (as
    the ledger has it), `memory_mb` (what a fresh process with the session adds), `bytes` and
    `environment`. Raises `BundleError` for a damaged bundle or one without golden inputs.

    Example:
        >>> bench(Path("runs/digits/bundle"))["latency"]  # doctest: +SKIP
        {'runtime': 'onnxruntime', 'batch': 1, 'threads': 1, 'p50_ms': 0.021, 'p90_ms': 0.022}
    """
    from attar.measure.latency import time_interleaved
    from attar.measure.machine import environment
    from attar.measure.memory import session_memory_mb

    bundle = read_bundle(folder)
    session = bundle.session(threads=threads, passes=passes)
    inputs, _ = bundle.golden()
    rows = np.arange(batch) % len(inputs[0])
    feed = [np.ascontiguousarray(x[rows]) for x in inputs]
    timed = time_interleaved({"bundle": lambda: session(*feed)}, seconds=seconds)["bundle"]
    name = bundle.runtime.name
    return {
        "attar_bench": FORM,
        "model_sha256": bundle.manifest["files"][0]["sha256"],
        "golden": replay(bundle, session),
        "latency": {
            "runtime": name,
            "batch": batch,
            "threads": threads,
            "p50_ms": timed["p50_ms"],
            "p90_ms": timed["p90_ms"],
        },
        "memory_mb": session_memory_mb(Path(folder), name, threads=threads),
        "bytes": bundle.bytes,
        "environment": environment(),
    }


def replay(bundle: Bundle, session: Any) -> dict[str, Any]:
    """Whether this machine gives the stored answers: `agrees`, `max_abs_diff`, `n`."""
    inputs, expected = bundle.golden()
    if not inputs or not expected:
        raise BundleError(f"{bundle.folder} has no golden inputs and outputs to replay")
    found = session(*inputs)
    rounds = bundle.manifest.get("quantization", {"rounds": "nothing"}).get("rounds", "activations")
    limit = QUANTIZED_DIFFERENCE if rounds == "activations" else FLOAT_DIFFERENCE
    apart = [float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True)]
    scales = [max(1.0, float(np.abs(a).max())) for a in expected]
    return {
        "agrees": all(d <= limit * s for d, s in zip(apart, scales, strict=True)),
        "max_abs_diff": max(apart),
        "n": len(inputs[0]),
    }
