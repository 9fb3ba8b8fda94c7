"""A tensor's weights replaced by a few values: which values, and which weight takes which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attar.errors import AttarError
from attar.share.kmeans import kmeans


class Codebook(NamedTuple):
    """values: rising, of the tensor's dtype, (k,). indices: uint8, the tensor's shape, each
    weight's place among the values. distortion: the mean squared error over the mean square."""

    values: Tensor
    indices: Tensor
    distortion: float


def cluster(tensor: Tensor, size: int, *, name: str = "the tensor") -> Codebook:
    """At most `size` (2 to 256) values for a tensor's weights, with the least squared error.

    Weights that are exactly zero, as pruned ones are, stay exactly zero and apart from the others:
    where there are any, zero is one of the values. Fewer distinct weights than `size` are kept as
    they are. Raises `AttarError` naming the tensor for weights that are NaN or infinite.

    Example:
        >>> cluster(torch.tensor([0.0, 1.0, 1.2, 5.0]), 3).values.tolist()
        [0.0, 1.100000023841858, 5.0]
    """
    weights = tensor.detach().cpu().double().numpy()
    if not np.isfinite(weights).all():
        raise AttarError(
            f"{name} has NaN or infinite weights, so it can't be shared: train the network again "
            "with a lower learning rate, or exclude this tensor"
        )
    alive = weights != 0
    rebuilt = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if alive.any():
        clustering = kmeans(weights[alive], size - (not alive.all()))
        means = torch.from_numpy(clustering.codebook).to(tensor.dtype)
        rebuilt[torch.from_numpy(alive)] = means[clustering.indices]
    values, indices = rebuilt.unique(return_inverse=True)
    energy = (weights**2).sum()
    error = ((weights - rebuilt.double().numpy()) ** 2).sum()
    return Codebook(
        values.to(tensor.device),
        indices.to(tensor.device, torch.uint8),
        float(error / energy) if energy else 0.0,
    )


def pack(indices: Tensor, bits: int) -> Tensor:
    """Indices at `bits` each, as a flat uint8 tensor, most significant bit first."""
    digits = np.unpackbits(indices.cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(digits.ravel()))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` indices that `pack` packed: uint8 (count,)."""
    digits = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    padded = np.pad(digits, ((0, 0), (8 - bits, 0)))
    return torch.from_numpy(np.packbits(padded, axis=1)[:, 0])
