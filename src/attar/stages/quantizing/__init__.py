"""What the ways of quantizing in the stage have in common."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attar.data.base import Batch, Split
from attar.quantize.bench import RuntimeBench
from attar.quantize.fallback import Decision, decide, telling
from attar.runtimes.base import runtimes
from attar.stages.base import Context
from attar.student import Student

BATCH = 64
"""Examples that are looked at at once."""


def traced(run: Context) -> dict[str, Any]:
    """What a network is traced with."""
    example = run.task.example(run.data)
    return {"example": example, "dynamic_shapes": run.task.dynamic_shapes(example)}


def calibration(run: Context, count: int) -> Iterator[tuple[Any, ...]]:
    """So many training examples as argument tuples, not augmented; shuffled by the seed, for a
    folder of images comes class by class."""
    seen, size = 0, min(BATCH, count)
    for batch in run.data.train.batches(size, shuffle=True, seed=run.seed):
        arguments, _ = run.task.arguments(batch)
        yield tuple(x[: count - seen] for x in arguments)
        seen += len(batch.indices)
        if seen >= count:
            return


def spread_over(split: Split, count: int) -> Iterator[Batch]:
    """So many examples, or all there are, at even distances over a split, in batches."""
    count = min(count, len(split))
    places = [i * len(split) // count for i in range(count)]
    for start in range(0, count, BATCH):
        yield split.pick(places[start : start + BATCH])


@contextmanager
def runtime_bench(
    run: Context, quantized: Callable[[tuple[str, ...]], Student]
) -> Iterator[RuntimeBench]:
    """What measures arrangements in the deploy runtime, as long as its files are there."""
    batch = next(iter(run.data.validation.batches(run.batch)))
    arguments, _ = run.task.arguments(batch)
    with tempfile.TemporaryDirectory() as folder:
        yield RuntimeBench(
            runtimes.get(run.runtime)(),
            quantized,
            Path(folder),
            inputs=tuple(x.numpy() for x in arguments),
            threads=run.threads,
            **traced(run),
        )


def decided(bench: RuntimeBench, given: tuple[str, ...], run: Context) -> Decision:
    """What stays float because int8 loses time there, told and kept for the report."""
    tell = telling(run.tell)
    decision = decide(bench, given, tell)
    run.found.update(decision.found())
    for layer in decision.float_layers:
        whole = layer == "*"
        tell(f"{'every layer' if whole else layer} stays float: {decision.why[layer]}")
    return decision
