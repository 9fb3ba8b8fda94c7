"""Places in a codebook as equal weights tell them: the first is that of the smallest value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attar.share.codebook import index_dtype


def numbered(tensors: Sequence[Tensor], length: int = 1) -> tuple[list[Tensor], int]:
    """The rank of each run of `length` weights among the different ones of all tensors together,
    and how many of these there are. Runs rise by the first coordinate that differs.

    tensors: each of whole runs. Returns ranks flat, (runs,), for each tensor, on the CPU.

    Example:
        >>> ranks, count = numbered([torch.tensor([5.0, 1.0]), torch.tensor([3.0])])
        >>> [each.tolist() for each in ranks], count
        ([[2, 0], [1]], 3)
    """
    runs = [_array(tensor).reshape(-1, length) for tensor in tensors]
    places, size = _ranks(np.concatenate([part[:, 0] for part in runs]))
    for column in range(1, length):
        further, count = _ranks(np.concatenate([part[:, column] for part in runs]))
        places, size = _ranks(places * count + further)
    whole = torch.from_numpy(places).to(index_dtype(size))
    return list(whole.split([len(part) for part in runs])), size


def numbered_by_group(weight: Tensor, channels: int, zero: bool) -> tuple[Tensor, int]:
    """As `numbered`, of each `channels` consecutive channels (the first dimension) apart: ranks of
    the weight's shape, and how many values the group of most has. zero: whether exact zeros have
    the first place, in every group, whether it has any or not."""
    ranks, most = np.empty(weight.numel(), dtype=np.int64), int(zero)
    flat = _array(weight)
    step = channels * weight[0].numel()
    for begin in range(0, flat.size, step):
        part = flat[begin : begin + step]
        own = ranks[begin : begin + step]
        alive = part != 0 if zero else np.ones(part.size, dtype=bool)
        own[~alive] = 0
        places, size = _ranks(part[alive])
        own[alive] = places + int(zero)
        most = max(most, size + int(zero))
    return torch.from_numpy(ranks).to(index_dtype(most)).reshape(weight.shape), most


def _array(tensor: Tensor) -> np.ndarray:
    numbers = tensor.detach().cpu()
    array: np.ndarray = (
        numbers if numbers.dtype == torch.float64 else numbers.float()
    ).numpy().ravel()  # fmt: skip
    return array


def _ranks(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Each value's place among the different ones, and their number. Faster than `np.unique` with
    its inverse, as it sorts what it needs no order of."""
    ordered = np.sort(values)
    distinct = ordered[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]]
    return np.searchsorted(distinct, values), distinct.size
