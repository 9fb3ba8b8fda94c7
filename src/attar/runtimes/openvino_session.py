"""A model loaded by OpenVINO and ready to answer. Needs only numpy and openvino."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from attar.errors import BundleError

CONFIG = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    # Where the processor has bfloat16, OpenVINO would compute float networks in it, unasked.
    "INFERENCE_PRECISION_HINT": "f32",
    # Nor are float activations to be quantized in passing, where weights are stored in bytes.
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    # Pinned, the threads of two sessions would share one core and leave others idle.
    "ENABLE_CPU_PINNING": "NO",
}
"""Settings that every session of a bundle wants; the manifest tells them to others."""

TELEMETRY = "openvino_telemetry"

Shapes = tuple[tuple[int, ...], ...]


class OpenVinoSession:
    """A model loaded with fixed threads, one call at a time.

    The shapes of the first call are compiled for: fixed shapes take up to an eighth less time. All
    other shapes share a second compilation that takes any, so memory doesn't grow with them.

    Raises `BundleError` when the file can't be loaded, or on the first call, compiled; `ValueError`
    for inputs of another shape than the model's.

    Example:
        >>> session = OpenVinoSession(Path("bundle/model.onnx"))  # doctest: +SKIP
        >>> (logits,) = session(images)                           # doctest: +SKIP
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._path = path
        self._settings = {**CONFIG, "INFERENCE_NUM_THREADS": str(threads)}
        self._model = read(path)
        self._fixed: FixedRequest | None = None
        self._any: Any = None

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for one batch, in the model's order."""
        shapes = tuple([x.shape for x in inputs])
        if self._fixed is not None and self._fixed.shapes == shapes:
            return self._fixed(inputs)
        refuse_other_shapes(self._model, shapes)
        if self._fixed is None:
            self._fixed = FixedRequest(self.compiled(shapes), shapes)
            return self._fixed(inputs)
        if self._any is None:
            self._any = self.compiled().create_infer_request()
        self._any.infer(list(inputs), share_inputs=True, share_outputs=True)
        return _outputs(self._any, len(self._model.outputs))

    def compiled(self, shapes: Shapes | None = None, **settings: str) -> Any:
        """OpenVINO's `CompiledModel`, for inputs of these shapes or of any.

        settings: properties beside the session's own.
        """
        model = self._model
        if shapes is not None:
            model = model.clone()
            model.reshape(dict(enumerate(map(list, shapes))))
        try:
            return core().compile_model(model, "CPU", self._settings | settings)
        except RuntimeError as error:
            raise BundleError(f"OpenVINO can't compile {self._path}: {reason(error)}") from error


class FixedRequest:
    """Calls a model compiled for inputs of these shapes.

    OpenVINO's own way of taking arrays costs 0.05 ms a call, twice a tiny network's time; copying
    into tensors that stay is near nothing.
    """

    def __init__(self, compiled: Any, shapes: Shapes) -> None:
        self.shapes = shapes
        self._request = compiled.create_infer_request()
        self._inputs = [self._request.get_input_tensor(i).data for i in range(len(shapes))]
        self._count = len(compiled.outputs)

    def __call__(self, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        for place, given in zip(self._inputs, inputs, strict=True):
            np.copyto(place, given)
        self._request.infer(share_outputs=True)
        return _outputs(self._request, self._count)

    def profile(self) -> list[Any]:
        """OpenVINO's `ProfilingInfo` of the last call, where it was compiled with `PERF_COUNT`."""
        return self._request.get_profiling_info()


def _outputs(request: Any, count: int) -> tuple[np.ndarray, ...]:
    return tuple([request.get_output_tensor(i).data.copy() for i in range(count)])


def import_openvino() -> Any:
    """The module `openvino`, imported without the part that reports its use to Intel over the
    network, which it does without. Raises `ImportError`."""
    absent = TELEMETRY not in sys.modules
    if absent:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if absent:
            del sys.modules[TELEMETRY]
    return openvino


@functools.cache
def core() -> Any:
    """OpenVINO's `Core`, with its part for CPUs loaded."""
    made = import_openvino().Core()
    made.get_versions("CPU")
    return made


def read(path: Path) -> Any:
    """OpenVINO's `Model` of the file. Raises `BundleError` with OpenVINO's own reason."""
    try:
        return core().read_model(str(path))
    except RuntimeError as error:
        raise BundleError(f"OpenVINO can't load {path}: {reason(error)}") from error


def refuse_other_shapes(model: Any, shapes: Shapes) -> None:
    """Raises `ValueError` where the model's inputs have other shapes, or are more or fewer."""
    wanted = [i.partial_shape for i in model.inputs]
    if len(wanted) != len(shapes):
        raise ValueError(f"the model takes {len(wanted)} inputs, not {len(shapes)}")
    for expected, found in zip(wanted, shapes, strict=True):
        if not expected.compatible(import_openvino().PartialShape(list(found))):
            raise ValueError(f"an input has the shape {list(found)}, not {expected}")


def reason(error: Exception) -> str:
    """What is wrong, of the lines that say where in OpenVINO's sources it was found."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [x for x in lines if x and not x.startswith(("Exception from ", "Check '", "While "))]
    return (said or [type(error).__name__])[-1].rstrip(".")
