"""Rounding to a grid whose step is learned (LSQ: Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def on_learned_grid(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """`step · clip(round(x / step), low, high)`, with the gradients of LSQ (equations 2, 3 and 5):
    straight through for values inside the grid, none for those outside, and for the step

        `round(v) - v` inside, `low` or `high` outside, with `v = x / step`.

    x: any shape. step: positive, a scalar, or of a shape that `x` broadcasts with, one a channel.
    low, high: the grid's ends in steps from zero. Computed in float32, whatever `x` is.

    Example:
        >>> x, step = torch.tensor([0.6, 3.0]), torch.tensor(0.5, requires_grad=True)
        >>> on_learned_grid(x, step, -2, 2).sum().backward()
        >>> step.grad  # (1 - 1.2) + 2
        tensor(1.8000)
    """
    return _OnLearnedGrid.apply(x, step, low, high)  # type: ignore[no-any-return, no-untyped-call]


FINE = 32
"""Steps to either side from which on a weight's grid is fine."""


def grown(log_step: Tensor, values: int, largest: int, *, weight: bool = False) -> Tensor:
    """The step `exp(log_step)`, whose gradient reaches `log_step` so that plain gradient descent
    changes the step as LSQ does, to first order: as `∂L/∂step / √(values · largest)` (its section
    2.2). A step learned as its logarithm stays positive, and Adam, which gives every parameter
    updates of one size, changes all steps by the same share.

    On a fine grid, LSQ's factor is too large for weights: where few share a step (a depthwise
    convolution's nine), one update changes it many times over. There it is `9 / (values ·
    largest²)`, which lets a step change at the pace of its weights' size: a third of the last step
    is how large weights usually are, so that their squares sum to `values · (largest · step / 3)²`.
    At two bits the two factors are about the same.

    values: how many values share the step; largest: the grid's last step. weight: whether these
    are weights.
    """
    factor = 1 / math.sqrt(max(1, values) * max(1, largest))
    if weight and largest >= FINE:
        factor = min(factor, 9 / (max(1, values) * largest**2))
    return _Grown.apply(log_step, factor)  # type: ignore[no-any-return, no-untyped-call]


class _OnLearnedGrid(torch.autograd.Function):
    """Made of few passes over whole tensors without masks of booleans: on a CPU, these and
    PyTorch's own fake quantization take several times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        v = x.float() * (1.0 / step)
        rounded = v.round().clamp_(low, high).mul_(step).to(x.dtype)
        ctx.save_for_backward(v, rounded, step)
        ctx.ends = (low, high)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        v, rounded, step = ctx.saved_tensors
        grad = grads[0]
        # The gradient of clipping v: zero where v is at an end or beyond it.
        passed = torch.ops.aten.hardtanh_backward(grad.float(), v, *ctx.ends)
        of_step = None
        if ctx.needs_input_grad[1]:
            if step.dim():
                each = grad.float() * rounded / step - passed * v
                of_step = each.sum_to_size(step.shape)
            else:
                of_step = _inner(grad, rounded) / step - _inner(passed, v)
        return passed.to(grad.dtype), of_step, None, None


class _Grown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_step: Tensor, factor: float) -> Tensor:
        step = log_step.exp()
        ctx.save_for_backward(step)
        ctx.factor = factor
        return step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (step,) = ctx.saved_tensors
        return grads[0] * ctx.factor / step, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products, float32, in one pass where both lie in memory alike."""
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
        a, b = (t.permute(0, 2, 3, 1) for t in (a, b))
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())
