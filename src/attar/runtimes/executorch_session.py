"""A model loaded by ExecuTorch and ready to answer. Needs numpy, and executorch with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from attar.errors import BundleError
from attar.runtimes.executorch_library import import_executorch, silenced
from attar.runtimes.executorch_threads import LOCK, take_pool

METHOD = "forward"
VARYING = "varying_dimensions"
"""A method of the file beside the model's own: for each dimension that varies, the number of the
input and that of the dimension, one after another. The file has no other place for that."""


class ExecuTorchSession:
    """A model loaded with fixed threads, one call at a time in the whole process.

    ExecuTorch reserves memory for a largest batch when a model is exported; larger ones are
    answered in parts. Its threads are the process's: where another session has another number of
    them, the pool is made anew and the model loaded again, which takes milliseconds, so let
    sessions that take turns have the same.

    Raises `BundleError` when the file can't be loaded or run; `ValueError` for inputs of another
    shape or type than the model's.

    Example:
        >>> session = ExecuTorchSession(Path("bundle/model.pte"))  # doctest: +SKIP
        >>> (logits,) = session(images)                            # doctest: +SKIP
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._path, self._threads = path, threads
        self._method: Any = None
        with LOCK:
            self._inputs = Inputs(self.load().method_meta(), varying(path))

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for one batch, in the model's order."""
        self._inputs.refuse_others(inputs)
        with LOCK:
            method = self._method or self.load()
            parts = [self._call(method, part) for part in self._inputs.parts(inputs)]
        if len(parts) == 1:
            return parts[0]
        return tuple(np.concatenate(each) for each in zip(*parts, strict=True))

    @property
    def largest_batch(self) -> int | None:
        """How many examples are answered at once; `None` where the batch doesn't vary."""
        return self._inputs.largest_batch

    def load(self) -> Any:
        """Loads the model, with the process's threads as this session wants them, and returns
        ExecuTorch's method. Hold `LOCK`."""
        take_pool(self, self._threads)
        self._method = load_method(self._path, METHOD)
        return self._method

    def unload(self) -> None:
        """Forgets the model, which the next call loads again."""
        self._method = None

    def _call(self, method: Any, inputs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        import torch

        try:
            outputs = method.call([torch.from_numpy(x) for x in inputs])
        except RuntimeError as error:
            raise BundleError(f"ExecuTorch can't run {self._path}: {_reason(error)}") from error
        return tuple([output.numpy() for output in outputs])


class Inputs:
    """What a model takes: shapes with the largest sizes, which dimensions vary, types.

    meta: ExecuTorch's `MethodMeta`. varying: pairs of an input's number and a dimension's.
    """

    def __init__(self, meta: Any, varying: set[tuple[int, int]]) -> None:
        infos = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        self._sizes = [tuple(info.sizes()) for info in infos]
        self._types = [_dtype(info.dtype()) for info in infos]
        self._varying = varying
        self._batched = [(i, 0) in varying for i in range(len(infos))]
        batches = [sizes[0] for sizes, b in zip(self._sizes, self._batched, strict=True) if b]
        self.largest_batch: int | None = min(batches, default=None)

    def refuse_others(self, inputs: tuple[np.ndarray, ...]) -> None:
        """Raises `ValueError` for inputs that the model doesn't take."""
        if len(inputs) != len(self._sizes):
            raise ValueError(f"the model takes {len(self._sizes)} inputs, not {len(inputs)}")
        for place, given in enumerate(inputs):
            if not self._fits(place, given.shape):
                raise ValueError(
                    f"an input has the shape {list(given.shape)}, not {self._shape(place)}"
                )
            if given.dtype != self._types[place]:
                raise ValueError(f"an input is of {given.dtype}, not {self._types[place]}")

    def parts(self, inputs: tuple[np.ndarray, ...]) -> list[list[np.ndarray]]:
        """The inputs as the model takes them: contiguous, no more examples than it has room for."""
        given = [np.require(x, requirements=["C", "W"]) for x in inputs]
        most = self.largest_batch
        count = 0 if most is None else len(given[self._batched.index(True)])
        if most is None or count <= most:
            return [given]
        pairs = list(zip(given, self._batched, strict=True))
        starts = range(0, count, most)
        return [[x[s : s + most] if batched else x for x, batched in pairs] for s in starts]

    def _fits(self, place: int, shape: tuple[int, ...]) -> bool:
        sizes = self._sizes[place]
        if len(shape) != len(sizes) or 0 in shape:
            return False
        return all(
            found == most or ((place, axis) in self._varying and (axis == 0 or found < most))
            for axis, (found, most) in enumerate(zip(shape, sizes, strict=True))
        )

    def _shape(self, place: int) -> str:
        named = enumerate(self._sizes[place])
        sizes = ["?" if (place, axis) in self._varying else str(size) for axis, size in named]
        return f"[{','.join(sizes)}]"


def load_method(path: Path, name: str) -> Any:
    """ExecuTorch's method of the file. Raises `BundleError`."""
    try:
        with silenced():
            return import_executorch()._load_program(str(path)).load_method(name)
    except (RuntimeError, ValueError) as error:
        raise BundleError(f"ExecuTorch can't load {path}: {_reason(error)}") from error


def varying(path: Path) -> set[tuple[int, int]]:
    """The dimensions of the model's inputs that vary: (input, dimension), counted from zero."""
    flat = load_method(path, VARYING).call([])
    return set(zip(flat[::2], flat[1::2], strict=True))


def _dtype(code: int) -> np.dtype:
    """PyTorch's number for a type as numpy's type."""
    types = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64]
    return np.dtype(np.bool_ if code == 11 else types[code])


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
