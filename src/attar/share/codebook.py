"""A tensor's weights replaced by a few values: which values, and which weight takes which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attar.errors import AttarError
from attar.share.importance import checked_importance
from attar.share.kmeans import kmeans, squared_error


class Codebook(NamedTuple):
    """values: rising, of the tensor's dtype, (k,); of vectors, (k, length), rising by the first
    coordinate that differs. indices: each weight's place among the values, of the tensor's shape;
    of vectors, each run's, (runs,); uint8, or int16 for k above 256. distortion: the mean squared
    error over the mean square. zero: the place of the weights that are exactly zero, if any are."""

    values: Tensor
    indices: Tensor
    distortion: float
    zero: int | None = None


def cluster(
    tensor: Tensor, size: int, *, name: str = "the tensor", importance: Tensor | None = None
) -> Codebook:
    """At most `size` (2 to 256) values for a tensor's weights, with the least squared error.

    Weights that are exactly zero, as pruned ones are, stay exactly zero and apart from the others:
    where there are any, zero is one of the values. Fewer distinct weights than `size` are kept as
    they are. importance: how much each weight's error counts, of the tensor's shape.

    Raises `AttarError` naming the tensor for weights, or importances, that are NaN or infinite.

    Example:
        >>> cluster(torch.tensor([0.0, 1.0, 1.2, 5.0]), 3).values.tolist()
        [0.0, 1.100000023841858, 5.0]
    """
    weights = finite(tensor, name)
    mass = None if importance is None else checked_importance(importance, tensor, name)
    alive = weights != 0
    zeros = not alive.all()
    chosen = (lambda array: array[alive]) if zeros else (lambda array: array)
    means, clusters = np.zeros(0), np.zeros(0, dtype=np.uint8)
    if alive.any():
        masses = None if mass is None else chosen(mass.ravel())
        means, clusters, _ = kmeans(chosen(weights), size - zeros, masses)
    values, places = rounded(means[:, None], tensor.dtype, zeros)
    indices = np.full(weights.shape, places[0], dtype=places.dtype)
    indices[alive if zeros else slice(None)] = places[zeros:][clusters]
    return Codebook(
        values[:, 0].to(tensor.device),
        torch.from_numpy(indices).reshape(tensor.shape).to(tensor.device),
        distortion(weights, values[:, 0].double().numpy(), indices),
        int(places[0]) if zeros else None,
    )


def as_it_is(tensor: Tensor, before: Tensor) -> Codebook:
    """The codebook of a tensor that has few values (at most 256) already. before: what it was
    before it had, of the same shape; the distortion is counted from there."""
    values, indices = tensor.unique(return_inverse=True)
    zero = (values == 0).nonzero().flatten().tolist()
    lost = float((tensor.double() - before.double()).square().sum())
    energy = float(before.double().square().sum())
    places = indices.to(index_dtype(len(values)))
    return Codebook(values, places, lost / energy if energy else 0.0, zero[0] if zero else None)


def finite(tensor: Tensor, name: str) -> np.ndarray:
    """A tensor's numbers, (n,), float32 or, where they are, float64. Raises `AttarError`."""
    detached = tensor.detach().cpu()
    numbers = detached if detached.dtype == torch.float64 else detached.float()
    weights: np.ndarray = numbers.numpy().ravel()
    if not np.isfinite(weights).all():
        raise AttarError(
            f"{name} has NaN or infinite weights, so it can't be shared: train the network again "
            "with a lower learning rate, or exclude this tensor"
        )
    return weights


def rounded(means: np.ndarray, dtype: torch.dtype, zero: bool) -> tuple[Tensor, np.ndarray]:
    """Codewords (k, length) rising and in the tensor's dtype, where some may have become one, and
    which of them each of the means is; before these, with `zero`, that of zero."""
    words = torch.from_numpy(np.concatenate([np.zeros((int(zero), means.shape[1])), means]))
    values, places = (words.to(dtype) + 0.0).unique(dim=0, return_inverse=True)
    return values, places.to(index_dtype(len(values))).numpy()


def distortion(weights: np.ndarray, values: np.ndarray, indices: np.ndarray) -> float:
    """The mean squared error of weights (n,), or runs (n, length), over their mean square."""
    energy = squared_error(weights, np.zeros((1, *values.shape[1:])), np.zeros_like(indices))
    return squared_error(weights, values, indices) / energy if energy else 0.0


def index_dtype(size: int) -> torch.dtype:
    """The smallest dtype for places among so many values."""
    return torch.uint8 if size <= 256 else torch.int16 if size <= 1 << 15 else torch.int32


def bits_of(size: int) -> int:
    """How many bits a place among so many values takes."""
    return max(1, (size - 1).bit_length())


def pack(indices: Tensor, bits: int) -> Tensor:
    """Indices at `bits` (1 to 16) each, as a flat uint8 tensor, most significant bit first."""
    octets = _octets(bits)
    whole = indices.cpu().numpy().astype(f">u{octets}").reshape(-1, 1).view(np.uint8)
    digits = np.unpackbits(whole, axis=1)[:, 8 * octets - bits :]
    return torch.from_numpy(np.packbits(digits.ravel()))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` indices that `pack` packed: (count,), of the smallest dtype that holds them."""
    octets = _octets(bits)
    digits = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    padded = np.pad(digits, ((0, 0), (8 * octets - bits, 0)))
    whole = np.packbits(padded, axis=1).view(f">u{octets}")[:, 0]
    return torch.from_numpy(whole.astype(np.int32)).to(index_dtype(1 << bits))


def _octets(bits: int) -> int:
    return 1 if bits <= 8 else 2
