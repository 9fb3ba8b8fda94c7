"""Latencies of one student in float and in int8, side by side in the runtime it is deployed to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from attar.data.base import Split
from attar.measure.intervals import Interval, ratio_interval
from attar.measure.latency import time_interleaved
from attar.quantize.fallback import LIMIT
from attar.quantize.noise import LayerNoise, student_noise
from attar.runtimes.base import Runtime, Session
from attar.runtimes.inside import Operator
from attar.student import Student
from attar.tasks.base import Task
from attar.training.evaluation import session_outputs

SECONDS = 0.6
PROFILED_RUNS = 60


class RuntimeBench:
    """Exports what it is asked about into a folder, once each, and measures it.

    quantized: makes the student with these layers left in float, all for `*`.
    inputs: one batch as the model is deployed to answer it.
    """

    def __init__(
        self,
        runtime: Runtime,
        quantized: Callable[[tuple[str, ...]], Student],
        folder: Path,
        *,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
        inputs: tuple[np.ndarray, ...],
        threads: int = 1,
    ) -> None:
        self._runtime, self._quantized = runtime, quantized
        self._folder, self._inputs, self._threads = folder, inputs, threads
        self._example, self._dynamic_shapes = example, dynamic_shapes
        self._exported: dict[tuple[str, ...], Path] = {}

    def ratio(self, float_layers: tuple[str, ...]) -> Interval:
        """Measured for longer where the first look leaves open whether int8 is too slow."""
        sessions = {"float": self.session(("*",)), "int8": self.session(float_layers)}
        calls = {name: lambda s=s: s(*self._inputs) for name, s in sessions.items()}
        for seconds, rounds in ((SECONDS, 30), (4 * SECONDS, 90)):
            timed = time_interleaved(calls, seconds=seconds, rounds=rounds)
            taken = {name: np.array(timed[name]["round_ms"]) for name in calls}
            ratio = ratio_interval(taken["int8"], taken["float"])
            if not ratio.low <= LIMIT < ratio.high:
                break
        return ratio

    def session(self, float_layers: tuple[str, ...]) -> Session:
        """The exported student with these layers in float, loaded."""
        return self._runtime.session(self._export(float_layers), threads=self._threads)

    def statistics(self, float_layers: tuple[str, ...], split: Split, task: Task) -> np.ndarray:
        """The task's per-example statistics of the exported student, (N, k)."""
        answers = session_outputs(self.session(float_layers), split, task)
        return np.concatenate([task.statistics(output, batch) for output, batch in answers])

    def milliseconds(self, float_layers: tuple[str, ...]) -> float:
        """The median time of an answer."""
        session = self.session(float_layers)
        timed = time_interleaved({"it": lambda: session(*self._inputs)}, seconds=SECONDS)
        return float(timed["it"]["p50_ms"])

    def times(self, float_layers: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        was, now = self._layer_times(("*",)), self._layer_times(float_layers)
        return {layer: (was[layer], now[layer]) for layer in now if layer in was}

    @property
    def runtime(self) -> str:
        """The runtime's name."""
        return self._runtime.name

    def inside(self, float_layers: tuple[str, ...]) -> list[Operator]:
        """What the runtime runs with these layers in float, each operator with its time."""
        return self._runtime.inside(
            self._export(float_layers), self._inputs, threads=self._threads, runs=PROFILED_RUNS
        )

    def noise(
        self,
        float_layers: tuple[str, ...],
        examples: Iterable[tuple[Any, ...]],
        student: Student | None = None,
    ) -> list[LayerNoise]:
        """Each layer's noise with these layers in float, or in another quantized student. Empty
        where nothing is quantized."""
        return student_noise(
            student or self._quantized(float_layers),
            examples,
            example=self._example,
            dynamic_shapes=self._dynamic_shapes,
        )

    def _layer_times(self, float_layers: tuple[str, ...]) -> dict[str, float]:
        folder = self._export(float_layers)
        return self._runtime.layer_times(
            folder, self._inputs, threads=self._threads, runs=PROFILED_RUNS
        )

    def _export(self, float_layers: tuple[str, ...]) -> Path:
        if float_layers not in self._exported:
            folder = self._folder / str(len(self._exported))
            self._runtime.export(
                self._quantized(float_layers),
                folder,
                example=self._example,
                dynamic_shapes=self._dynamic_shapes,
                names=([f"input{i}" for i in range(len(self._inputs))], ["output"]),
            )
            self._exported[float_layers] = folder
        return self._exported[float_layers]
