"""Vector codebooks: runs of weights replaced whole by the nearest of a few vectors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attar.errors import UsageError
from attar.share.codebook import Codebook, distortion, finite, rounded
from attar.share.importance import checked_importance

RUNS_A_VECTOR = 4
"""So many runs there are at least for each vector of a codebook, on average."""
MANY = 1 << 16
"""From so many runs on, vectors are first looked for in batches of them."""


@dataclass(frozen=True)
class Vectors:
    """What shares vectors, and which.

    length: weights in a run, at least 2: of a linear layer, consecutive inputs of an output; of an
        embedding, consecutive coordinates; of a convolution, whole kernels where it is their size
        (9 for 3 × 3). values: vectors in a tensor's codebook, 2 to 4096. layers: patterns of the
        layers or weights meant. seed: where k-means begins.
    """

    length: int = 4
    values: int = 256
    layers: Iterable[str] = ("*",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UsageError(f"vectors of length {self.length}: it takes two weights to make one")
        if not 2 <= self.values <= 4096:
            raise UsageError(f"a codebook has 2 to 4096 vectors, not {self.values}")


def unfit(weight: Tensor, vectors: Vectors) -> str | None:
    """Why a tensor can't share such vectors, a sentence's end; `None` where it can."""
    row, runs = weight[0].numel(), weight.numel() // vectors.length
    if row % vectors.length:
        return f"its outputs have {row} weights each, no multiple of {vectors.length}"
    if runs < RUNS_A_VECTOR * vectors.values:
        return (
            f"it has {runs} runs of {vectors.length}, fewer than {RUNS_A_VECTOR} for each of "
            f"{vectors.values} vectors"
        )
    zero = weight.detach().reshape(-1, vectors.length) == 0
    if (zero.any(1) & ~zero.all(1)).any():
        return "it has zeros beside other weights in a run, and zeros must stay"
    return None


def cluster_vectors(
    tensor: Tensor,
    vectors: Vectors,
    *,
    name: str = "the tensor",
    importance: Tensor | None = None,
) -> Codebook:
    """At most `vectors.values` vectors for a tensor's runs of weights, by k-means.

    One codebook serves all runs, wherever in a row they lie. Runs of zeros keep a vector of zeros.
    importance: how much each weight's error counts, of the tensor's shape: which runs are one
    weighs their mean importance, what becomes of them each weight's.

    k-means is scikit-learn's, from its own k-means++ start by the seed: over all runs, or, from
    65,536 of them on, in batches and then a few rounds over all.

    Source: Jégou et al. 2011, "Product Quantization for Nearest Neighbor Search"; Gong et al. 2014,
    "Compressing Deep Convolutional Networks using Vector Quantization" (section 3.2.3, product
    quantization); Stock et al. 2020, "And the Bit Goes Down" (one codebook for all subspaces,
    whole kernels, four runs a vector at least). Stock et al. weigh by what a layer reads; here
    the importance takes that place.

    Raises `UsageError` for a tensor that isn't fit for them, `AttarError` as `cluster` does.

    Example:
        >>> codebook = cluster_vectors(torch.ones(8, 4), Vectors(length=2, values=2))
        >>> codebook.values.tolist(), codebook.indices.shape
        ([[1.0, 1.0]], torch.Size([16]))
    """
    runs = finite(tensor, name).reshape(-1, vectors.length)
    reason = unfit(tensor, vectors)
    if reason is not None:
        raise UsageError(f"{name} can't share vectors: {reason}")
    mass = np.ones(runs.shape)
    if importance is not None:
        mass = checked_importance(importance, tensor, name).reshape(runs.shape)
    alive = runs.any(axis=1)
    zeros = not alive.all()
    indices = np.zeros(len(runs), dtype=np.int64)
    means = np.zeros((0, vectors.length))
    if alive.any():
        k = min(vectors.values - zeros, int(alive.sum()))
        scaled = runs[alive] / np.abs(runs).max()  # squares of what is large or small stay numbers
        clusters = _clusters(scaled, k, mass[alive].mean(axis=1), vectors.seed)
        means = _means(runs[alive], mass[alive], clusters)
        indices[alive] = clusters + zeros
    values, places = rounded(means, tensor.dtype, zeros)
    indices = places[indices]
    return Codebook(
        values.to(tensor.device),
        torch.from_numpy(indices).to(tensor.device),
        distortion(runs, values.double().numpy(), indices),
        int(places[0]) if zeros else None,
    )


def _clusters(runs: np.ndarray, k: int, mass: np.ndarray, seed: int) -> np.ndarray:
    """Which of at most k clusters, all of them used, each run is in: int64 (n,)."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    start, rounds = "k-means++", 100
    # on several threads, sums come out in no fixed order, and runs would change sides
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different runs than vectors
        if len(runs) >= MANY:
            batches = MiniBatchKMeans(
                k, batch_size=max(4096, 4 * k), n_init=1, max_iter=4, random_state=seed
            )
            start, rounds = batches.fit(runs, sample_weight=mass).cluster_centers_, 3
        found = KMeans(k, init=start, n_init=1, max_iter=rounds, random_state=seed)
        labels = found.fit(runs, sample_weight=mass).labels_
    return np.unique(labels, return_inverse=True)[1]


def _means(runs: np.ndarray, mass: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """The mean of each cluster, each weight weighed by itself: float64 (k, length)."""
    order = np.argsort(clusters, kind="stable")
    starts = np.flatnonzero(np.diff(clusters[order], prepend=-1))
    sums = np.add.reduceat(runs[order].astype(np.float64) * mass[order], starts)
    return sums / np.add.reduceat(mass[order], starts)
