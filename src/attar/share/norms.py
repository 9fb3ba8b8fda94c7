"""Batch norms on grids: four numbers a channel that would otherwise cost 32 bits each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

OCTAVE = 4
"""Steps in which a variance is doubled."""


@torch.no_grad()
def round_norms(module: nn.Module, bits: int = 8) -> list[str]:
    """Rounds the batch norms of `module` in place; gives the paths of those that were.

    Running means and variances are rounded coarsely (a quarter of the means' deviation; a quarter
    of an octave), and weight and bias take up what that changes, so that the norm computes the same
    in eval mode and nearly the same when it is trained on. Then these two are rounded, to steps
    that make a normal variable cost about `bits` bits. Norms without statistics or without weights
    are left alone.

    Example:
        >>> norm = nn.BatchNorm2d(16).eval()
        >>> round_norms(norm)
        ['']
    """
    done = []
    for path, norm in module.named_modules():
        if isinstance(norm, _BatchNorm) and norm.affine and norm.running_var is not None:
            _round(norm, bits)
            done.append(path)
    return done


def _round(norm: _BatchNorm, bits: int) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    kept_mean = on_grid(mean, 4)
    kept_variance = torch.exp2((OCTAVE * variance.double().log2()).round() / OCTAVE)
    kept_variance = kept_variance.where(variance > 0, 0).float()
    before = norm.weight.double() / (variance.double() + norm.eps).sqrt()
    weight = before * (kept_variance.double() + norm.eps).sqrt()
    bias = norm.bias.double() + before * (kept_mean.double() - mean.double())
    mean.copy_(kept_mean)
    variance.copy_(kept_variance)
    norm.weight.copy_(on_grid(weight, 2 ** (bits - 2)))
    norm.bias.copy_(on_grid(bias, 2 ** (bits - 2)))


def on_grid(values: Tensor, steps: float) -> Tensor:
    """Values rounded to a grid with so many steps in their root mean square, float32; the step has
    eight leading bits, as a file stores it.

    >>> on_grid(torch.tensor([1.0, -1.0, 0.7]), 2).tolist()  # steps of 0.455
    [0.91015625, -0.91015625, 0.91015625]
    """
    step = (values.double().square().mean().sqrt() / steps).bfloat16().float()
    if not step > 0:
        return values.float()
    return (values.float() / step).round() * step + 0.0  # no -0.0, which would cost a bit
