"""Gradients to look at: how hard each loss term pulls at a network, what a loss says of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from attar.errors import UsageError


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode, all of whose floating-point parameters have gradients: what is done to
    it, the network itself isn't told."""
    network = copy.deepcopy(module).eval()
    for weight in network.parameters():
        weight.requires_grad_(weight.is_floating_point())
    return network


def loss_gradients(
    loss: Callable[[], Tensor], weights: Sequence[nn.Parameter], asker: str
) -> list[Tensor]:
    """The gradient of a loss by each of `weights`; zeros where it doesn't depend on one.

    loss: computes it, a tensor of one number. asker: what errors call the one who asks. The random
    state stays as it was: some networks draw even in eval mode. Raises `UsageError` for a loss that
    isn't one finite number, or depends on no weight.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0]))
        >>> loss_gradients(lambda: weight.square().sum(), [weight], "this example")
        [tensor([6.])]
    """
    devices = sorted({w.device for w in weights if w.device.type != "cpu"}, key=str)
    kind = devices[0].type if devices else "cpu"
    with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad():
        found = loss()
        _check(found, asker)
        return list(
            torch.autograd.grad(found.sum(), weights, allow_unused=True, materialize_grads=True)
        )


def _check(loss: Tensor, asker: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UsageError(f"{asker} scores by the gradient of a loss, which must be one number")
    if not loss.requires_grad:
        raise UsageError(f"{asker}: the loss doesn't depend on any weight by a gradient")
    if not bool(torch.isfinite(loss)):
        raise UsageError(
            f"{asker}: the loss of a batch is {float(loss.detach())}: nothing can be scored"
        )


def term_norms(
    terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """The L2 norm of each term's gradient with respect to all `parameters` together.

    terms: scalars by name, their graph not yet freed; it is left for the backward that follows, and
    so is every `.grad`. A term that doesn't depend on the parameters has norm 0. Norms are float32
    scalars on the parameters' device: nothing is waited for. Empty where the terms' graph can't be
    gone through twice, as some compiled networks' can't.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> terms = {"half": weight.square().sum() / 2, "none": torch.ones(())}
        >>> {name: float(norm) for name, norm in term_norms(terms, [weight]).items()}
        {'half': 5.0, 'none': 0.0}
    """
    try:
        return {name: _norm(term, parameters) for name, term in terms.items()}
    except RuntimeError:  # figures to look at must not end a training
        return {}


def _norm(term: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    if not term.requires_grad:
        return term.new_zeros((), dtype=torch.float32)
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    norms = [grad.float().norm() for grad in found if grad is not None]
    return torch.stack(norms).norm() if norms else term.new_zeros((), dtype=torch.float32)
