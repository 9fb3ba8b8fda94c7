"""A small transformer for images (Dosovitskiy et al., ICLR 2021), of blocks of their own or of one
that is applied several times (ALBERT: Lan et al., ICLR 2020, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import UsageError
from attar.models.base import models
from attar.models.blocks import ImageSize, Repeated, height_width


class Attention(nn.Module):
    """Self-attention of `heads` heads: (N, L, width) → (N, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._by_head(layer(x)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class EncoderBlock(nn.Module):
    """Attention, then two linear layers, each after a layer norm and with a shortcut around it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, learned positions, encoder blocks, the mean over patches, a linear head.

    (N, channels, H, W) → logits (N, classes). `encoder` takes and gives
    (N, patches, width).
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: tuple[int, int],
        patch: int,
        width: int,
        encoder: nn.Module,
    ) -> None:
        super().__init__()
        patches = (size[0] // patch) * (size[1] // patch)
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, patches, width))
        self.encoder = encoder
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.encoder(x)).mean(1))


@models.register("vit-small")
def vit_small(
    channels: int,
    classes: int,
    *,
    image_size: ImageSize = 32,
    patch: int = 4,
    width: int = 96,
    heads: int = 3,
    blocks: int = 6,
    expansion: int = 2,
    reuse: bool = False,
) -> VisionTransformer:
    """A small image transformer; `reuse: true` applies one encoder block `blocks` times.

    With 32x32 images: 460,714 parameters, or 86,794 where the block is reused, for as much work.
    `patch` pixels a side become one of the transformer's inputs; the two linear layers of a block
    are `expansion` times as wide inside.
    """
    size = height_width(image_size)
    if any(side % patch for side in size):
        raise UsageError(
            f"vit-small: images of {size[0]}x{size[1]} don't divide into patch {patch}"
        )
    if width % heads:
        raise UsageError(f"vit-small: width {width} doesn't divide among {heads} heads")
    if blocks < 1:
        raise UsageError(f"vit-small: blocks is {blocks}: it needs at least 1")

    def block() -> nn.Module:
        return EncoderBlock(width, heads, expansion * width)

    encoder = Repeated(block(), blocks) if reuse else _stack(block, blocks)
    return VisionTransformer(channels, classes, size, patch, width, encoder)


def _stack(block: Callable[[], nn.Module], blocks: int) -> nn.Sequential:
    return nn.Sequential(*(block() for _ in range(blocks)))
