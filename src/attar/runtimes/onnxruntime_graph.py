"""ONNX Runtime's graph passes done ahead of time, before the file is deployed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from attar.runtimes.onnx_file import save, tidy
from attar.runtimes.onnxruntime_session import Level, OnnxSession, load, options


def optimised(
    path: Path, level: ort.GraphOptimizationLevel, *, portable: bool = False
) -> onnx.ModelProto:
    """The graph that ONNX Runtime's passes up to `level` make of the file, as it would run here
    or, `portable`, as it could run anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        settings = options(1, level, portable=portable)
        settings.optimized_model_filepath = str(target)
        # The exporter has folded constants; what is left are weights stored in bytes.
        load(path, settings, without={"ConstantFolding"} if portable else set())
        return onnx.load(str(target))


def optimise_file(path: Path, example: Sequence[np.ndarray]) -> bool:
    """Replaces the file by the graph ONNX Runtime's portable passes make of it: nodes fused,
    quantize/dequantize pairs turned into 8-bit operators. Passes that lay data out for one
    processor are left to the session, which knows where it runs.

    Kept only if it answers `example` as the file did before; returns whether it was.
    """
    after = tidy(optimised(path, Level.ORT_ENABLE_EXTENDED, portable=True))
    candidate = path.with_suffix(".optimised")
    try:
        save(after, candidate)
        kept = _same_answers(path, candidate, example)
        if kept:
            candidate.replace(path)
    finally:
        candidate.unlink(missing_ok=True)
    return kept


def _same_answers(before: Path, after: Path, example: Sequence[np.ndarray]) -> bool:
    answers = [OnnxSession(path)(*example) for path in (before, after)]
    return all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(a).max()))
        for a, b in zip(*answers, strict=True)
    )
