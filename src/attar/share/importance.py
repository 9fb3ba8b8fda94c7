"""How much each weight's error counts: the Fisher information, for k-means that weighs by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import AttarError, UsageError
from attar.training.gradients import loss_gradients, trainable_copy

FLOOR = 1e-3
"""The least importance, as a share of a tensor's mean: what no example has asked for yet may
still matter, and a clustering must not be free to put it anywhere."""

B = TypeVar("B")


def fisher_importance(
    module: nn.Module, batches: Iterable[B], loss_of: Callable[[nn.Module, B], Tensor]
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information, 1/N · Σₙ (∂Lₙ/∂w)², by parameter path.

    batches: N of them, each meant to be of one example: of more, a batch's mean gradient takes the
        place of an example's, and what its examples cancel is not seen. Examples are gone through
        one by one, not vectorised (`torch.func.vmap`): so it is exact for any network, and of
        one gradient at a time in memory.
    loss_of: from a network in eval mode and a batch to that batch's loss, a scalar.

    Returns float64 tensors of the parameters' shapes, each parameter once. The network stays as it
    is: gradients are taken on a copy, of frozen parameters too.

    It stands for the Hessian's diagonal at a trained network's minimum: 1/2 Σ F (w - w')² is what
    the loss rises by when w' takes the place of w, which is what k-means weighted by F makes least.
    Source: Choi et al. 2017, "Towards the Limit of Network Quantization" (section 3, weighted
    k-means by the Hessian's diagonal); Kirkpatrick et al. 2017, "Overcoming catastrophic
    forgetting in neural networks" (Fisher's diagonal in its place).

    Raises `UsageError` for no batch, and for a loss that isn't one finite number that depends on
    the weights.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> examples = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
        >>> fisher_importance(net, examples, lambda network, x: network(x).sum())
        {'weight': tensor([[5.]], dtype=torch.float64)}
    """
    network = trainable_copy(module)
    weights = {path: p for path, p in network.named_parameters() if p.requires_grad}
    sums = {path: torch.zeros_like(p, dtype=torch.float64) for path, p in weights.items()}
    count = 0
    for batch in batches:
        found = loss_gradients(
            lambda batch=batch: loss_of(network, batch),  # type: ignore[misc]
            list(weights.values()),
            "fisher_importance",
        )
        for total, gradient in zip(sums.values(), found, strict=True):
            total.add_(gradient.double().square())
        count += 1
    if not count:
        raise UsageError("fisher_importance scores on data, but there is no batch")
    return {path: total.div_(count).detach() for path, total in sums.items()}


def checked_importance(importance: Tensor, weight: Tensor, name: str) -> np.ndarray:
    """The importances of a tensor's weights, positive float64 of its shape, at least `FLOOR` of
    their mean; all 1 where all are 0. Raises `AttarError` for what can't be one."""
    if importance.shape != weight.shape:
        raise UsageError(
            f"the importance of {name} is of shape {tuple(importance.shape)}, its weights are of "
            f"{tuple(weight.shape)}"
        )
    found: np.ndarray = importance.detach().cpu().double().numpy()
    if not np.isfinite(found).all() or (found < 0).any():
        raise AttarError(
            f"the importance of {name} has negative, NaN or infinite numbers: leave it out, and "
            "its weights count alike"
        )
    mean = float(found.mean())
    return np.maximum(found / mean, FLOOR) if mean else np.ones_like(found)
