"""Removing what matters least: whole channels with everything tied to them, or single weights.

Works without a recipe: `prune_channels(student, (images,), criterion=Magnitude(), ratio=0.5)` gives
a narrower student and `prune_to_budget` one that keeps a budget;
`prune_weights(student, criterion=Magnitude(), ratio=0.6)` a sparse one whose `hooks()` keep its
zeros in a training loop of one's own.
"""

from attar.prune.blocks import BlocksRemoved, prune_blocks, residual_blocks, without_blocks
from attar.prune.budgets import Budget, prune_to_budget
from attar.prune.channels import Pruned, prune_channels
from attar.prune.criteria import Call, Criterion, criteria
from attar.prune.groups import ChannelGraph, Place, channel_graph
from attar.prune.plan import Plan, prune_by_plan
from attar.prune.removal import ChannelsRemoved, RemovalFailed
from attar.prune.schedule import cubic
from attar.prune.selection import Widths
from attar.prune.weights import Masked, left_dense, prune_weights

__all__ = [
    "BlocksRemoved",
    "Budget",
    "Call",
    "ChannelGraph",
    "ChannelsRemoved",
    "Criterion",
    "Masked",
    "Place",
    "Plan",
    "Pruned",
    "RemovalFailed",
    "Widths",
    "channel_graph",
    "criteria",
    "cubic",
    "left_dense",
    "prune_blocks",
    "prune_by_plan",
    "prune_channels",
    "prune_to_budget",
    "prune_weights",
    "residual_blocks",
    "without_blocks",
]
