"""Weights on a grid of each row, or of each group in a row: integers and steps, whose products they
are bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from attar.student.edits import RowGrid
from attar.student.packed.elements import Elements
from attar.student.packed.grid import LARGEST


@dataclass(frozen=True)
class Steps:
    """steps: float32 (rows, groups), of the tensor's first axis and the rest of it, flat. length:
    of a group; the last one of a row may be shorter."""

    steps: np.ndarray
    length: int

    def elements(self) -> Elements:
        """The steps as a tensor."""
        return Elements("float32", self.steps.shape, self.steps.view(np.uint32).ravel())

    def integers(self, bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
        """The multiples that the elements are, as float32 (n,) without negative zeros; `None` where
        one isn't, to the last bit. bits: uint32 (n,)."""
        each = self._each(shape)
        with np.errstate(all="ignore"):
            found = np.rint(bits.view(np.float32).reshape(each.shape) / each)
        found = np.where(bits.reshape(each.shape), found, np.float32(0)) + np.float32(0)
        sure = np.abs(found) < LARGEST
        if not sure.all() or not np.array_equal(self.values(found, shape), bits):
            return None
        return found.ravel()

    def values(self, integers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The elements' bits, uint32 (n,): each integer times its step, and 0.0 for 0."""
        each = self._each(shape)
        integers = integers.reshape(each.shape)
        with np.errstate(all="ignore"):
            each *= integers
        each[integers == 0] = 0
        return each.view(np.uint32).ravel()

    def _each(self, shape: tuple[int, ...]) -> np.ndarray:
        """Each element's step, (rows, columns)."""
        columns = prod(shape[1:])
        repeated = np.repeat(self.steps, self.length, axis=1)
        return np.ascontiguousarray(repeated[:, :columns])


def fitting(grid: RowGrid | None, tensor: Tensor) -> Steps | None:
    """The steps of a tensor's grid; `None` where there is none, or it isn't one for this tensor."""
    if grid is None or {grid.steps.dtype, tensor.dtype} != {torch.float32}:
        return None
    length = prod(tensor.shape[1:]) if grid.length is None else grid.length
    if not has_groups(tensor.shape, length):
        return None
    if grid.steps.shape != groups_of(tensor.shape, length):
        return None
    return Steps(grid.steps.detach().cpu().contiguous().numpy(), length)


def has_groups(shape: tuple[int, ...], length: int) -> bool:
    """Whether the rows of a tensor with elements can be cut in groups of a length."""
    return len(shape) > 1 and 0 < length <= prod(shape[1:])


def groups_of(shape: tuple[int, ...], length: int) -> tuple[int, int]:
    """The shape of the steps of a tensor with such groups."""
    return shape[0], -(-prod(shape[1:]) // length)
