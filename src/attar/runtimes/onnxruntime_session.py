"""A model loaded by ONNX Runtime and ready to answer. Needs only numpy and onnxruntime."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnxruntime as ort

from attar.errors import BundleError
from attar.measure.processor import saturates
from attar.runtimes._predict import too_old
from attar.runtimes.base import GraphPasses

Level = ort.GraphOptimizationLevel

CONFIG = {
    # Threads may spin while a call is under way, not between calls.
    "session.force_spinning_stop": "1",
}
"""Session settings that every session of a bundle wants; the manifest tells them to others."""

CONFIG_WITHOUT_VNNI = {
    # The kernel for uint8 times int8 adds pairs of products in 16 bits, which overflow silently.
    # With this, weights beyond 7 bits go through a slower kernel that doesn't; weights within
    # -64..64 can't overflow and keep the fast one. ONNX Runtime doesn't ask whether the processor
    # needs it, and on those with VNNI it doubles the time of every 8-bit layer.
    "session.x64quantprecision": "1",
}
"""What sessions want besides on x86 before VNNI (`attar.measure.processor.saturates`)."""


class OnnxSession:
    """A model loaded with fixed threads, one operator at a time.

    passes: `all` lets ONNX Runtime optimise the graph for this machine while loading; `none` runs
    the file as it is. Raises `BundleError` when the file can't be loaded.

    Example:
        >>> session = OnnxSession(Path("bundle/model.onnx"))  # doctest: +SKIP
        >>> (logits,) = session(images)                       # doctest: +SKIP
    """

    def __init__(self, path: Path, *, threads: int = 1, passes: GraphPasses = "all") -> None:
        level = Level.ORT_ENABLE_ALL if passes == "all" else Level.ORT_DISABLE_ALL
        self._session = load(path, options(threads, level))
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]
        # The public `run` checks the feed's names again on every call, a fifth of a tiny network's
        # time. The names here come from the model itself.
        inner = getattr(self._session, "_sess", None)
        self._run = self._session.run if inner is None else inner.run

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for one batch, in the model's order."""
        feed = dict(zip(self._inputs, inputs, strict=True))
        return tuple(self._run(self._outputs, feed, None))


def options(
    threads: int, level: ort.GraphOptimizationLevel, *, portable: bool = False
) -> ort.SessionOptions:
    """Session options. portable: leave out what fits the graph to this machine's processor."""
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    made.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    made.graph_optimization_level = level
    made.log_severity_level = 4
    if not portable:
        wanted = CONFIG | CONFIG_WITHOUT_VNNI if saturates() else CONFIG
        for key, value in wanted.items():
            made.add_session_config_entry(key, value)
    return made


def load(
    path: Path, settings: ort.SessionOptions, *, without: Collection[str] = ()
) -> ort.InferenceSession:
    """Loads the file on the CPU, without the named passes. Raises `BundleError` with ONNX Runtime's
    own reason."""
    try:
        return ort.InferenceSession(
            str(path),
            settings,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(without),
        )
    except Exception as error:  # onnxruntime's errors share no base class
        reason = too_old(str(error)) or str(error).strip().splitlines()[0]
        raise BundleError(f"ONNX Runtime can't load {path}: {reason}") from error
