"""Removing what matters least: whole channels with everything tied to them, or single weights.

Works without a recipe: `prune_channels(student, (images,), criterion=Magnitude(), ratio=0.5)` gives
a narrower student, `prune_weights(student, criterion=Magnitude(), ratio=0.6)` a sparse one whose
`hooks()` keep its zeros in a training loop of one's own.
"""

from attar.prune.channels import Pruned, prune_channels
from attar.prune.criteria import Call, Criterion, criteria
from attar.prune.groups import ChannelGraph, Place, channel_graph
from attar.prune.removal import ChannelsRemoved, RemovalFailed
from attar.prune.schedule import cubic
from attar.prune.selection import Widths
from attar.prune.weights import Masked, prune_weights

__all__ = [
    "Call",
    "ChannelGraph",
    "ChannelsRemoved",
    "Criterion",
    "Masked",
    "Place",
    "Pruned",
    "RemovalFailed",
    "Widths",
    "channel_graph",
    "criteria",
    "cubic",
    "prune_channels",
    "prune_weights",
]
