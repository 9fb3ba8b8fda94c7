"""Tensors as the bits of their elements, whatever their type: NaNs and -0.0 come back as they were.

Types are known by PyTorch's names. Bits are unsigned integers as wide as the type, in one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attar.errors import CheckpointError

TYPES = {
    "float32": (4, "f"),
    "int64": (8, "i"),
    "uint8": (1, "u"),
    "float16": (2, "f"),
    "bfloat16": (2, "f"),
    "float64": (8, "f"),
    "int8": (1, "i"),
    "int16": (2, "i"),
    "int32": (4, "i"),
    "uint16": (2, "u"),
    "uint32": (4, "u"),
    "uint64": (8, "u"),
    "bool": (1, "u"),
    "float8_e4m3fn": (1, "f"),
    "float8_e5m2": (1, "f"),
    "complex64": (8, "c"),
}
"""Bytes an element, and whether it is a float, a signed or an unsigned integer."""
NAMES = tuple(TYPES)
PLACES = 32
"""Types that there is room for in the file."""


@dataclass(frozen=True)
class Elements:
    """type: a key of `TYPES`. shape: the tensor's. bits: uint8 to uint64, (number of elements,)."""

    type: str
    shape: tuple[int, ...]
    bits: np.ndarray

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Elements:
        """A tensor's elements. Raises `CheckpointError` for a type without a place in the file."""
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in TYPES or tensor.is_sparse:
            raise CheckpointError(f"{name} is of type {kind}, which a packed file can't hold")
        width = TYPES[kind][0]
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if not flat.numel():
            return cls(kind, tuple(tensor.shape), np.empty(0, f"u{width}"))
        bits = flat.view(torch.uint8).numpy().view(f"u{width}")
        return cls(kind, tuple(tensor.shape), bits)

    def tensor(self) -> Tensor:
        """The tensor again."""
        raw = torch.from_numpy(self.bits.view(np.uint8))
        return raw.view(getattr(torch, self.type)).reshape(self.shape)

    def array(self) -> np.ndarray:
        """As NumPy has it: bfloat16 widened to float32, 8-bit floats as their bits."""
        if self.type == "bfloat16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        if self.type.startswith("float8"):
            return self.bits.reshape(self.shape)
        return self.bits.view(self.type).reshape(self.shape)


def width_of(kind: str) -> int:
    """Bytes an element."""
    return TYPES[kind][0]


def is_float(kind: str) -> bool:
    """Whether a type's first bit is a sign, and its next ones an exponent."""
    return TYPES[kind][1] == "f"


def by_value(kind: str, bits: np.ndarray) -> np.ndarray:
    """Keys by which elements sort as their values do (NaNs outermost)."""
    top = bits.dtype.type(1 << 8 * bits.itemsize - 1)
    if TYPES[kind][1] == "i":
        return bits ^ top
    if TYPES[kind][1] == "f":
        return np.where(bits & top, ~bits, bits | top)
    return bits
