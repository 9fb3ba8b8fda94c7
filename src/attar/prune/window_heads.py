"""torchvision's attention within windows, with heads that can be removed (see `attar.prune.heads`).

Sources of the methods: Liu et al. 2021, "Swin Transformer" (windows, shifts, positions); Liu et al.
2022, "Swin Transformer V2" (scores by angle); Tu et al. 2022, "MaxViT".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


class WindowHeads(ShiftedWindowAttention):
    """`ShiftedWindowAttention` with heads of a fixed width, as many as its weights have."""

    head_dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Images, channels last: (batch, height, width, channels)."""
        batch, height, width, _ = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        tall, wide = x.shape[1] // rows, x.shape[2] // columns
        shifts = [
            0 if size >= extent else shift
            for shift, size, extent in zip(
                self.shift_size, self.window_size, x.shape[1:3], strict=True
            )
        ]
        if any(shifts):
            x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
        x = x.unflatten(2, (wide, columns)).unflatten(1, (tall, rows)).transpose(2, 3)
        x = self._attended(x.flatten(3, 4).flatten(0, 2), tall, wide, shifts)
        x = x.view(batch, tall, wide, rows, columns, -1).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if any(shifts):
            x = torch.roll(x, (shifts[0], shifts[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _attended(self, x: Tensor, tall: int, wide: int, shifts: list[int]) -> Tensor:
        """Attention within windows: (windows, positions, channels)."""
        qkv = F.linear(x, self.qkv.weight, self._bias())
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shifts):
            mask = self._apart(tall, wide, shifts, x)
            scores = scores.unflatten(0, (-1, tall * wide)) + mask[:, None]
            scores = scores.flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        mixed = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return F.dropout(mixed, self.dropout, self.training)

    def _bias(self) -> Tensor | None:
        return self.qkv.bias

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)

    def get_relative_position_bias(self) -> Tensor:
        """What to add by how far apart two positions are: (1, heads, positions, positions)."""
        return self._spread(self.relative_position_bias_table)

    def _spread(self, table: Tensor) -> Tensor:
        area = self.window_size[0] * self.window_size[1]
        return table[self.relative_position_index].view(area, area, -1).permute(2, 0, 1)[None]

    def _apart(self, tall: int, wide: int, shifts: list[int], x: Tensor) -> Tensor:
        """−100 between positions that only the shift brought into one window: (windows,
        positions, positions)."""
        parts = []
        for size, shift, count in zip(self.window_size, shifts, (tall, wide), strict=True):
            place = torch.arange(size * count, device=x.device)
            end = size * count
            area = (place >= end - size).int() + (place >= end - shift).int()
            parts.append(area * (shift > 0))
        areas = parts[0][:, None] * 3 + parts[1]
        areas = areas.view(tall, self.window_size[0], wide, self.window_size[1])
        areas = areas.transpose(1, 2).reshape(tall * wide, -1)
        return (areas[:, None] != areas[:, :, None]).to(x.dtype) * -100.0


class CosineWindowHeads(WindowHeads, ShiftedWindowAttentionV2):
    """`ShiftedWindowAttentionV2`, likewise: scores by angle, positions by a small network."""

    def _bias(self) -> Tensor | None:
        if self.qkv.bias is None:
            return None
        q, k, v = self.qkv.bias.chunk(3)
        return torch.cat([q, torch.zeros_like(k), v])

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        angles = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return angles * self.logit_scale.clamp(max=math.log(100)).exp()

    def get_relative_position_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return 16 * self._spread(table).sigmoid()


class GridHeads(RelativePositionalMultiHeadAttention):
    """`RelativePositionalMultiHeadAttention`, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, windows, positions, channels)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.unbind(0)
        scores = q @ (k * self.scale_factor).transpose(-2, -1)
        weights = (scores + self.get_relative_positional_bias()).softmax(-1)
        return self.merge((weights @ v).transpose(2, 3).flatten(3))


FREED: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: WindowHeads,
    ShiftedWindowAttentionV2: CosineWindowHeads,
    RelativePositionalMultiHeadAttention: GridHeads,
}
"""The classes for torchvision's, by theirs."""
