"""Which single weights are zero together: N:M groups along the inputs, and blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from attar.errors import UsageError


@dataclass(frozen=True)
class NM:
    """N:M: of every `m` consecutive weights along the inputs, at most `n` are not zero.

    dim: the weight's dimension that holds inputs (`input_dim`), a multiple of `m` long. Of a
    convolution these are its input channels, for each filter and kernel position by itself, as
    sparse tensor cores want it (cuSPARSELt, TensorRT); of a grouped one, those of one group.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (2:4); Zhou et al. 2021,
    "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch".

    Example:
        >>> NM(2, 4).mask(torch.tensor([[4.0, 1.0, 2.0, 3.0]])).int().tolist()
        [[1, 0, 0, 1]]
    """

    n: int
    m: int
    dim: int = 1

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def mask(self, scores: Tensor) -> Tensor:
        """True at the `n` largest scores of each group, the earlier of equal ones; bool, of the
        scores' shape."""
        lines = scores.movedim(self.dim, -1)
        groups = lines.reshape(-1, self.m)
        order = torch.sort(groups, dim=1, descending=True, stable=True).indices
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(1, order[:, : self.n], True)
        return mask.view(lines.shape).movedim(-1, self.dim).contiguous()

    def fits(self, mask: Tensor) -> bool:
        """Whether no group keeps more than `n` weights. mask: true where a weight stays."""
        if mask.shape[self.dim] % self.m:
            return False
        groups = mask.movedim(self.dim, -1).reshape(-1, self.m)
        return bool((groups.sum(1) <= self.n).all())

    def to_json(self) -> dict[str, Any]:
        return {"pattern": str(self), "dim": self.dim}


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` x `columns` weights, each zero as a whole or not at all.

    They tile the weight as a matrix (out, in · kernel positions), from its first element on; at the
    lower and right edge they are smaller where the matrix ends. dim: the weight's dimension that
    holds inputs; where it is 0, as of a transposed convolution, the matrix is (out / groups, in ·
    kernel positions).

    Source: Gray et al. 2017, "GPU Kernels for Block-Sparse Weights"; Narang et al. 2017,
    "Block-Sparse Recurrent Neural Networks", which scores a block by its largest weight; here it is
    by the mean, so that smaller blocks at an edge neither go first nor last.

    Example:
        >>> Blocks(2, 2).means(torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 7.0]])).tolist()
        [[2.0, 6.0]]
    """

    rows: int
    columns: int
    dim: int = 1

    def __str__(self) -> str:
        return f"blocks of {self.rows}x{self.columns}"

    def means(self, scores: Tensor) -> Tensor:
        """Each block's mean score, (blocks down, blocks across). scores: of the weight's shape."""
        return self._sums(self._matrix(scores)) / self.sizes(scores)

    def sizes(self, weight: Tensor) -> Tensor:
        """How many weights each block has, (blocks down, blocks across)."""
        return self._sums(torch.ones_like(self._matrix(weight), dtype=torch.float32))

    def mask(self, kept: Tensor, weight: Tensor) -> Tensor:
        """A mask of the weight's shape. kept: bool (blocks down, blocks across)."""
        matrix = self._matrix(weight)
        rows, columns = self._clipped(matrix)
        mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        mask = mask[: matrix.shape[0], : matrix.shape[1]]
        if self.dim == 1:
            return mask.reshape(weight.shape)
        return mask.reshape(weight.transpose(0, 1).shape).transpose(0, 1).contiguous()

    def fits(self, mask: Tensor) -> bool:
        """Whether every block stays or goes as a whole. mask: true where a weight stays."""
        share = self.means(mask.float())
        return bool(((share == 0) | (share == 1)).all())

    def to_json(self) -> dict[str, Any]:
        return {"block": [self.rows, self.columns], "dim": self.dim}

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1 - self.dim).flatten(1)

    def _clipped(self, matrix: Tensor) -> tuple[int, int]:
        return min(self.rows, matrix.shape[0]), min(self.columns, matrix.shape[1])

    def _sums(self, matrix: Tensor) -> Tensor:
        rows, columns = self._clipped(matrix)
        padding = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
        padded = F.pad(matrix, padding)
        tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        return tiles.sum((1, 3))


Pattern = NM | Blocks


def parsed_pattern(text: object) -> tuple[int, int]:
    """N and M of `"2:4"`. Raises `UsageError`.

    YAML reads 2:4 without quotes as a number to the base 60, which is undone.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        text = "{}:{}".format(*divmod(text, 60))
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip()) if isinstance(text, str) else None
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise UsageError(
            f"pattern {str(text)!r} is not N:M, at most N of every M weights, N from 1 and less "
            'than M: for instance "2:4"'
        )
    return n, m


def parsed_block(block: object) -> tuple[int, int]:
    """Rows and columns of `[4, 1]`. Raises `UsageError`."""
    numbers = list(block) if isinstance(block, Sequence) and not isinstance(block, str) else []
    if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers):
        raise UsageError(
            f"block {block!r} is not [rows, columns], two whole numbers from 1: for instance [4, 1]"
        )
    return numbers[0], numbers[1]


def pattern_from(record: dict[str, Any]) -> Pattern:
    """What `to_json` recorded. Raises `KeyError`, `ValueError` or `UsageError` for a damaged
    record."""
    dim = record["dim"]
    if dim not in (0, 1):
        raise ValueError(f"dimension {dim} is neither 0 nor 1")
    if "block" in record:
        return Blocks(*parsed_block(record["block"]), dim)
    return NM(*parsed_pattern(record["pattern"]), dim)


def input_dim(layer: nn.Module) -> int | None:
    """Which dimension of a layer's weights holds its inputs, 0 or 1; `None` where nobody knows."""
    if isinstance(layer, _ConvTransposeNd) or _is_conv1d(type(layer)):
        return 0
    return 1 if isinstance(layer, nn.Linear | nn.MultiheadAttention | _ConvNd) else None


def dense_for(layer: nn.Module, weight: Tensor, n: int, m: int, floor: int) -> str | None:
    """Why N:M leaves a layer's weight dense, for people; `None` where it doesn't.

    A rest that is no whole group would have to be zero or break the pattern, and sparse kernels
    don't take such layers: the whole layer stays dense.
    """
    dim = input_dim(layer)
    if dim is None:
        return f"which dimension of {type(layer).__name__} holds its inputs is not known"
    inputs = weight.shape[dim] // (layer.groups if isinstance(layer, _ConvTransposeNd) else 1)
    if inputs % m:
        return f"its outputs read {inputs} input{'s' * (inputs != 1)} each, no multiple of {m}"
    if weight.numel() // m * n < floor:
        return f"it would keep {weight.numel() // m * n} weights, less than the floor of {floor}"
    return None


def _is_conv1d(kind: type) -> bool:
    """Whether it is the linear layer of transformers whose weight is (in, out)."""
    named = {(base.__module__, base.__name__) for base in kind.__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in named
