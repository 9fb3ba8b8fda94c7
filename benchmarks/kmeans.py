"""One-dimensional k-means: how close to the optimum, and how long for ten million weights.

    python benchmarks/kmeans.py

`worst_distortion_over_optimum` is the largest of our distortions over the optimum's, over several
distributions, numbers of values and, where ATTAR_DATA has it, a trained ResNet-56: its largest
layer, and all its weights at 16 values. The optimum is computed by the package kmeans1d, another's
exact program, which counts weighted values as often as their weights (whole numbers here) say.

`seconds_10m` is the time for ten million float32 weights into 256 values, indices included, on one
core: of `normal` and `heavy tails`, with and without weights, the median over rounds of each, then
the longest of the four. kmeans1d can't do that: its tables would take 40 GB.

Beside ours stand what one would pick instead: kmeans1d, and scikit-learn's KMeans and
MiniBatchKMeans (one k-means++ start), at sizes that each can do. Distortions are over the optimum.
Everything has one thread; times are the processor's for this process (`time.process_time`), which
others on the machine don't lengthen.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kmeans1d
import numpy as np
import torch
from common import conclude, options, show
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from attar.share import kmeans

GOALS: dict[str, tuple[str, float]] = {
    "seconds_10m": ("<=", 2.0),
    "worst_distortion_over_optimum": ("<=", 1.001),
}
CHECKPOINT = Path("checkpoints") / "resnet56-4bfd9763.th"
VALUES = (4, 16, 64, 256)
Case = tuple[np.ndarray, np.ndarray | None]


def drawn(count: int, seed: int) -> dict[str, Case]:
    """Values, and weights where they have any, by distribution."""
    rng = np.random.default_rng(seed)
    modes = rng.choice([-1.0, 1.0], count) * rng.normal(1, 0.1, count)
    whole = rng.integers(1, 5, count).astype(np.float64)
    cases: dict[str, Case] = {
        "normal": (rng.standard_normal(count), None),
        "Laplace": (rng.laplace(size=count), None),
        "two modes": (modes, None),
        "heavy tails (t, 2)": (rng.standard_t(2, count), None),
        "Cauchy": (rng.standard_cauchy(count), None),
        "normal, weighted": (rng.standard_normal(count), whole),
    }
    return {name: (values.astype(np.float32), mass) for name, (values, mass) in cases.items()}


def real() -> dict[str, np.ndarray]:
    """A trained network's largest layer and all its weights; nothing where it isn't there."""
    folder = os.environ.get("ATTAR_DATA")
    if not folder or not (Path(folder) / CHECKPOINT).exists():
        return {}
    stored = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
    weights = [t.numpy().ravel() for t in stored["state_dict"].values() if t.dim() > 1]
    return {"largest layer": max(weights, key=len), "ResNet-56": np.concatenate(weights)}


def optimum(values: np.ndarray, k: int, mass: np.ndarray | None) -> float:
    every = values.astype(np.float64)
    if mass is not None:
        every = np.repeat(every, mass.astype(np.int64))
    found = kmeans1d.cluster(every, k)
    return float(((every - np.array(found.centroids)[found.clusters]) ** 2).sum())


def by_scikit(kind: type, values: np.ndarray, k: int, mass: np.ndarray | None) -> float:
    found = kind(k, n_init=1, random_state=0).fit(values[:, None], sample_weight=mass)
    error = (values - found.cluster_centers_[found.labels_, 0].astype(np.float64)) ** 2
    return float(error.sum() if mass is None else (mass * error).sum())


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """What a run returns, and the processor's seconds."""
    started = time.process_time()
    found = run()
    return found, time.process_time() - started


def beside(name: str, k: int, values: np.ndarray, mass: np.ndarray | None) -> dict[str, Any]:
    best, exact = timed(lambda: optimum(values, k, mass))
    ours, own = timed(lambda: kmeans(values, k, mass).distortion)
    full, slow = timed(lambda: by_scikit(KMeans, values, k, mass))
    batches, quick = timed(lambda: by_scikit(MiniBatchKMeans, values, k, mass))
    return {
        "case": name,
        "count": values.size,
        "k": k,
        "attar": ours / best,
        "attar_s": own,
        "kmeans1d_s": exact,
        "scikit": full / best,
        "scikit_s": slow,
        "batches": batches / best,
        "batches_s": quick,
    }


def ten_million(rounds: int) -> dict[str, float]:
    """Median seconds by case, the cases taking turns."""
    count = 10_000_000
    cases: dict[str, Case] = {}
    for name, case in drawn(count, 0).items():
        if name in ("normal", "heavy tails (t, 2)"):
            cases[name] = (case[0], None)
            cases[f"{name}, weighted"] = (case[0], np.random.default_rng(1).random(count) + 0.1)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (values, mass) in cases.items():
            seconds[name].append(timed(lambda v=values, m=mass: kmeans(v, 256, m).distortion)[1])
    return {name: statistics.median(each) for name, each in seconds.items()}


def all_cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    count = 20_000 if arguments.quick else 100_000
    found = [
        beside(name, k, values, mass)
        for seed in range(arguments.seeds)
        for name, (values, mass) in drawn(count, seed).items()
        for k in (VALUES[1::2] if arguments.quick else VALUES)
    ]
    for name, values in real().items():
        for k in (16,) if values.size > 2 * count or arguments.quick else VALUES:
            if not arguments.quick or values.size <= 2 * count:
                found.append(beside(name, k, values, None))
    return found


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = all_cases(arguments)
        seconds = ten_million(1 if arguments.quick else 5)
    show(
        "distortion over the optimum's, and seconds",
        ["case", "weights", "values", "attar", "s", "kmeans1d s", "KMeans", "s", "MiniBatch", "s"],
        [
            [
                c["case"], c["count"], c["k"], f"{c['attar']:.6f}", f"{c['attar_s']:.3f}",
                f"{c['kmeans1d_s']:.2f}", f"{c['scikit']:.4f}", f"{c['scikit_s']:.2f}",
                f"{c['batches']:.4f}", f"{c['batches_s']:.2f}",
            ]
            for c in cases
        ],
    )  # fmt: skip
    show(
        "10,000,000 weights, 256 values",
        ["case", "s"],
        [[n, f"{s:.2f}"] for n, s in seconds.items()],
    )
    figures = {
        "seconds_10m": max(seconds.values()),
        "worst_distortion_over_optimum": max(c["attar"] for c in cases),
        "worst_scikit_over_optimum": max(c["scikit"] for c in cases),
        "worst_minibatch_over_optimum": max(c["batches"] for c in cases),
        "kmeans1d_seconds_over_ours": statistics.median(
            c["kmeans1d_s"] / c["attar_s"] for c in cases
        ),
    }
    conclude("kmeans", arguments, figures, GOALS, cases=cases, seconds=seconds)


if __name__ == "__main__":
    main()
