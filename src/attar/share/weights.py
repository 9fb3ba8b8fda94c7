"""Sharing a whole network's weights, with or without a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from attar.errors import UsageError
from attar.share.codebook import cluster
from attar.share.edit import Assignment, Shared


@dataclass(frozen=True)
class Sharing:
    """What was done to one tensor. distortion: mean squared error over the mean square."""

    values: int
    bits: int
    weights: int
    distortion: float


def shareable(module: nn.Module, exclude: Iterable[str] = ()) -> list[str]:
    """The paths of the parameters that sharing takes: all but vectors (biases, norms), empty ones
    and those whose path fits a pattern of `exclude` (`classifier.*`). Raises `UsageError` for a
    pattern that fits nothing."""
    weights = [n for n, p in module.named_parameters() if p.dim() > 1 and p.numel()]
    patterns = list(exclude)
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in weights):
            raise UsageError(
                f"exclude: {pattern!r} fits no weight of the network; it has " + ", ".join(weights)
            )
    return [name for name in weights if not any(_fits(name, p) for p in patterns)]


def share_weights(
    module: nn.Module, bits: int, exclude: Iterable[str] = ()
) -> tuple[Shared, dict[str, Sharing]]:
    """Gives every weight tensor of `module`, in place, at most 2**bits values of its own.

    bits: 1 to 8. Returns the edit that keeps it so and what was done, by path.

    Example:
        >>> edit, done = share_weights(network, bits=4)
        >>> edit.after_step(network)  # after every optimizer step of one's own loop
    """
    assignments: dict[str, Assignment] = {}
    done: dict[str, Sharing] = {}
    for path in shareable(module, exclude):
        weight = module.get_parameter(path)
        codebook = cluster(weight, 2**bits, name=path)
        with torch.no_grad():
            weight.copy_(codebook.values[codebook.indices.long()])
        assignments[path] = Assignment.of(codebook)
        size = len(codebook.values)
        done[path] = Sharing(size, assignments[path].bits, weight.numel(), codebook.distortion)
    return Shared(assignments), done


def _fits(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name.rpartition(".")[0], pattern)
