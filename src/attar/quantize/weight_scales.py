"""Symmetric grids for weights: the step of each row or group, and the integers it makes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LIMITS = {4: (-8, 7), 7: (-64, 64), 8: (-127, 127)}
"""The integers of a weight of so many bits. Four bits use every one there is; eight leave out -128,
so that both sides are alike; seven go to ±64, which 8-bit products bear anywhere."""
SHARES = torch.linspace(0.55, 1.05, 21)
"""Where in reach of the outermost integer a searched grid may put the largest value."""


def step_sizes(
    weight: Tensor, bits: int, *, group: int | None = None, per_tensor: bool = False
) -> Tensor:
    """The scales of a weight's grid, (rows, groups), float32.

    A row is what the first dimension counts: an output channel, or a word of an embedding. Groups
    are `group` weights of a row that follow one another, the last one shorter where they don't
    come out even; rows no longer than a group, and `group=None`, have one scale. per_tensor: the
    same scale everywhere, so that equal weights stay equal.

    Eight and seven bits reach the largest value. Four bits are chosen for the least squared error:
    the largest value is tried at 21 places around each outermost integer (steps may be negative,
    which puts it on the longer side), each followed by the least-squares step for the integers so
    found.

    >>> step_sizes(torch.tensor([[1.27, -0.5], [0.0, 2.54]]), 8)
    tensor([[0.0100],
            [0.0200]])
    """
    values = weight.detach().float()
    groups = values.reshape(1, 1, -1) if per_tensor else grouped(values, group)
    low, high = LIMITS[bits]
    found = _searched(groups, low, high) if bits < 7 else groups.abs().amax(-1) / high
    tiny = torch.finfo(torch.float32).tiny
    found = torch.where(found.abs() > tiny, found, torch.ones_like(found))
    return found.expand(len(values), -1).contiguous()


def integers(weight: Tensor, scale: Tensor, bits: int, *, group: int | None = None) -> Tensor:
    """A weight on its grid: int8 (rows, groups, length), with zeros where the last group is
    shorter. scale: (rows, groups), as `step_sizes` gives it."""
    groups = grouped(weight.detach().float(), group if scale.shape[1] > 1 else None)
    return (groups / scale[..., None]).round().clamp(*LIMITS[bits]).to(torch.int8)


def spread(weight: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """Each weight's step, in the weight's shape. scale: (rows, groups), of `step_sizes`."""
    groups = grouped(weight.detach(), group if scale.shape[1] > 1 else None)
    each = scale[..., None].expand(groups.shape).flatten(1)
    return each[:, : weight[0].numel()].reshape(weight.shape)


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """A weight as (rows, groups, length), zeros behind a row whose length is no multiple."""
    rows = weight.flatten(1)
    length = min(group or rows.shape[1], rows.shape[1])
    return F.pad(rows, (0, -rows.shape[1] % length)).unflatten(1, (-1, length))


def _searched(groups: Tensor, low: int, high: int) -> Tensor:
    place = groups.abs().argmax(-1, keepdim=True)
    peak = groups.gather(-1, place)
    best = torch.full(groups.shape[:-1], torch.inf)
    chosen = torch.ones_like(best)
    for end in (low, high):
        for share in SHARES.tolist():
            step = peak / (end * share)
            for _ in range(2):
                on_grid = (groups / step).nan_to_num(0.0).round().clamp(low, high)
                error = (groups - on_grid * step).square().sum(-1)
                better = error < best
                best = torch.where(better, error, best)
                chosen = torch.where(better, step.squeeze(-1), chosen)
                square = on_grid.square().sum(-1, keepdim=True)
                step = (groups * on_grid).sum(-1, keepdim=True) / square.clamp_min(1)
    return chosen
