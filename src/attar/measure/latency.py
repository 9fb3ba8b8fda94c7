"""How long one answer takes: warmed up, interleaved with what it is compared to."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BLOCK_SECONDS = 0.004
WARM_UP_SECONDS = 0.05
FEWEST_ROUNDS = 9


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, rounds: int = 30
) -> dict[str, dict[str, Any]]:
    """Times each call many times, taking turns, so that a machine whose speed drifts treats all
    alike.

    seconds: about how long to measure each call in all; a slow call still gets `FEWEST_ROUNDS`.
    rounds: at most how many turns. A round gives every call, in an order that
    rotates, a block of consecutive calls; each call is timed by itself.

    Returns name → `p50_ms`, `p90_ms`, `n` (calls timed) and `round_ms`: every round's median, for
    paired ratios (`attar.measure.intervals.ratio_interval`).
    """
    names = list(calls)
    each = {n: _seconds_a_call(calls[n]) for n in names}
    rounds = min(rounds, max(FEWEST_ROUNDS, round(seconds / max(each.values()))))
    blocks = {n: max(1, round(max(seconds / rounds, BLOCK_SECONDS) / each[n])) for n in names}
    taken: dict[str, list[np.ndarray]] = {n: [] for n in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                taken[name].append(_time_block(calls[name], blocks[name]))
    finally:
        if collecting:
            gc.enable()
    return {n: _summary(taken[n]) for n in names}


def _seconds_a_call(call: Callable[[], Any]) -> float:
    """Warms the call up, and says how long it takes."""
    call()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < WARM_UP_SECONDS or count < 2:
        call()
        count += 1
    return elapsed / count


def _time_block(call: Callable[[], Any], length: int) -> np.ndarray:
    clock = time.perf_counter_ns
    call()  # the caches now hold this call's data, as in a stream of requests
    ticks = np.empty(length, dtype=np.int64)
    for i in range(length):
        start = clock()
        call()
        ticks[i] = clock() - start
    return ticks / 1e6


def _summary(blocks: list[np.ndarray]) -> dict[str, Any]:
    everything = np.concatenate(blocks)
    return {
        "p50_ms": float(np.median(everything)),
        "p90_ms": float(np.percentile(everything, 90)),
        "n": len(everything),
        "round_ms": [float(np.median(b)) for b in blocks],
    }
