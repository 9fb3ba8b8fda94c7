"""What is changed in a network, its answers left alone, so that more of its channels can go."""

from __future__ import annotations

from typing import Any

from torch import nn

from attar.prune.folding import WeightsFolded, with_plain_weights
from attar.prune.heads import HeadsFreed, with_free_heads

Preparation = WeightsFolded | HeadsFreed


def prepared(module: nn.Module, example: tuple[Any, ...]) -> tuple[nn.Module, list[Preparation]]:
    """A network of the same answers whose computed weights are plain ones and whose attention takes
    any number of heads, and what that took; itself where it took nothing."""
    module, folded = with_plain_weights(module, example)
    module, freed = with_free_heads(module, example)
    return module, [folded, freed]
