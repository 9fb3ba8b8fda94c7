"""How a teacher's answers are kept in files: dense or the largest few, in 4, 2 or 1 byte each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np

from attar.errors import UsageError

Format = Literal["float32", "float16", "int8"]
Arrays = Mapping[str, np.ndarray]
LEVELS = 255


class Encoding(ABC):
    """Rows of floats as arrays, a row of each for every row: what files hold of one column."""

    @property
    @abstractmethod
    def layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The arrays by name: the type and the shape of a row of each."""

    @abstractmethod
    def encode(self, rows: np.ndarray) -> Arrays:
        """Rows, float32 (n, *shape), as those arrays."""

    @abstractmethod
    def decode(self, arrays: Arrays) -> np.ndarray:
        """The rows again, float32 (n, *shape)."""

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        return sum(int(np.prod(shape)) * kind.itemsize for kind, shape in self.layout.values())


def encoding(shape: tuple[int, ...], form: Format, top_k: int | None = None) -> Encoding:
    """The encoding for rows of `shape`. top_k: how many of the last axis to keep; default: all.

    Raises `UsageError` where there aren't more than `top_k`.

    Example:
        >>> encoding((1000,), "float16", top_k=10).row_bytes  # 10 values, 10 places, the rest
        44
    """
    if top_k is not None:
        return TopK(shape, form, top_k)
    return Quantized(shape) if form == "int8" else Dense(shape, np.dtype(form))


class Dense(Encoding):
    """Every value, rounded to a float type; what is too large for it becomes its largest."""

    def __init__(self, shape: tuple[int, ...], kind: np.dtype) -> None:
        self._shape, self._kind = shape, kind

    @property
    def layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        return {"values": (self._kind, self._shape)}

    def encode(self, rows: np.ndarray) -> Arrays:
        largest = np.finfo(self._kind).max
        return {"values": np.clip(rows, -largest, largest).astype(self._kind)}

    def decode(self, arrays: Arrays) -> np.ndarray:
        return arrays["values"].astype(np.float32)


class Quantized(Encoding):
    """Every value in a byte: 256 even steps from a row's smallest value to its largest. No value is
    further off than half a step."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    @property
    def layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        return {
            "values": (np.dtype(np.uint8), self._shape),
            "range": (np.dtype(np.float32), (2,)),
        }

    def encode(self, rows: np.ndarray) -> Arrays:
        flat = rows.reshape(len(rows), -1)
        low = flat.min(1, keepdims=True, initial=np.inf)
        step = (flat.max(1, keepdims=True, initial=-np.inf) - low) / LEVELS
        step[step <= 0] = 1
        values = np.rint((flat - low) / step).astype(np.uint8).reshape(rows.shape)
        return {"values": values, "range": np.concatenate([low, step], 1).astype(np.float32)}

    def decode(self, arrays: Arrays) -> np.ndarray:
        low, step = (arrays["range"][:, i].reshape(-1, *(1 for _ in self._shape)) for i in range(2))
        return arrays["values"].astype(np.float32) * step + low


class TopK(Encoding):
    """Each position's `k` largest logits and their places; all others get one logit, so that
    together they have the probability that they had:

        rest = log(mean over the others of exp(z))

    Probabilities of the kept classes are exact at temperature 1 but for the values' rounding.
    Places are as wide as the classes need: a byte up to 256.
    """

    def __init__(self, shape: tuple[int, ...], form: Format, k: int) -> None:
        if not 1 <= k < shape[-1]:
            raise UsageError(
                f"top_k is {k} and the teacher answers with {shape[-1]} classes: it must be fewer; "
                "leave it out to keep all"
            )
        self._shape, self._k = shape, k
        self._values = encoding((*shape[:-1], k), form)

    @property
    def layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        return {
            **self._values.layout,
            "places": (np.min_scalar_type(self._shape[-1] - 1), (*self._shape[:-1], self._k)),
            "rest": (np.dtype(np.float32), self._shape[:-1]),
        }

    def encode(self, rows: np.ndarray) -> Arrays:
        order = np.argpartition(-rows, self._k - 1, axis=-1)
        kept, others = order[..., : self._k], order[..., self._k :]
        values = np.take_along_axis(rows, others, -1).astype(np.float64)
        largest = values.max(-1, keepdims=True)
        rest = np.log(np.exp(values - largest).mean(-1)) + largest[..., 0]
        return {
            **self._values.encode(np.take_along_axis(rows, kept, -1)),
            "places": kept.astype(self.layout["places"][0]),
            "rest": rest.astype(np.float32),
        }

    def decode(self, arrays: Arrays) -> np.ndarray:
        rows = np.repeat(arrays["rest"][..., None], self._shape[-1], -1)
        np.put_along_axis(
            rows, arrays["places"].astype(np.int64), self._values.decode(arrays), axis=-1
        )
        return rows
