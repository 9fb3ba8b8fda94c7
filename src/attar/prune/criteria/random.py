"""No importance at all: what every criterion must beat."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import torch
from torch import Tensor

from attar.prune.criteria.base import Criterion, criteria


@criteria.register("random")
class Random(Criterion):
    """Keeps weights or channels at random, the baseline: scores are uniform draws from [0, 1).

    A tensor's draws depend on `seed` (a recipe's in a run), its path and its shape alone, not on
    what was scored before. Source: Blalock et al. 2020, "What is the State of Neural Network
    Pruning?", which asks for it as a baseline.
    """

    sides: ClassVar[tuple[str, ...]] = ("out",)

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{path}/{dim}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        shape = weight.shape if dim is None else weight.shape[dim : dim + 1]
        return torch.rand(shape, generator=generator).to(weight.device)
