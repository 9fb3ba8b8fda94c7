"""How hard each loss term pulls at a network: the norms of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


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
