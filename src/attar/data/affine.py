"""torchvision's `RandomAffine` on whole batches: a tenth of the time of one image after another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from attar.data.augment import Shape, Transform

if TYPE_CHECKING:
    from torchvision.transforms import v2


class Affine(Transform):
    """Images turned, moved, scaled and sheared around their centre by random amounts.

    like: torchvision's transform, whose ranges, interpolation and fill are taken.
    """

    def __init__(self, like: v2.RandomAffine) -> None:
        self.degrees = like.degrees
        self.translate = like.translate or (0.0, 0.0)
        self.scale = like.scale or (1.0, 1.0)
        self.shear = [*(like.shear or ()), 0.0, 0.0, 0.0, 0.0][:4]
        self.mode = _name(like.interpolation)
        self.fill = float(like.fill)  # type: ignore[arg-type]

    @staticmethod
    def takes(like: v2.RandomAffine) -> bool:
        """Whether it is one that whole batches can be changed by."""
        return (
            like.center is None
            and isinstance(like.fill, int | float)
            and _name(like.interpolation) in ("nearest", "bilinear")
        )

    def draw(self, count: int, shape: Shape, generator: torch.Generator) -> Tensor:
        """A row: angle (radians), x and y (whole pixels), scale, x and y shear (radians)."""
        height, width = shape[1:]
        most = [self.translate[0] * width, self.translate[1] * height]
        ranges = [
            [math.radians(d) for d in self.degrees],
            *([-m, m] for m in most),
            list(self.scale),
            [math.radians(d) for d in self.shear[:2]],
            [math.radians(d) for d in self.shear[2:]],
        ]
        low, high = torch.tensor(ranges).T
        drawn = low + (high - low) * torch.rand(count, 6, generator=generator)
        drawn[:, 1:3] = drawn[:, 1:3].round()
        return drawn

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        pixels = images.float() - self.fill  # what comes from outside counts as zero
        grid = _sources(drawn, *images.shape[-2:])
        moved = grid_sample(pixels, grid, mode=self.mode, align_corners=False) + self.fill
        return moved if images.is_floating_point() else moved.round().to(images.dtype)


def _name(interpolation: Any) -> str:
    """torchvision's default is a name in some versions and an object in others."""
    return str(getattr(interpolation, "value", interpolation))


def _sources(drawn: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel comes from, (N, H, W, 2): x and y as shares of half the image from its
    centre. Images are sheared in x, then in y, scaled, turned and moved, so this undoes it."""
    angle, x, y, scale, shear_x, shear_y = drawn.T
    none, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = _matrices(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    sheared = _matrices(one, none, -shear_y.tan(), one) @ _matrices(one, -shear_x.tan(), none, one)
    back = torch.linalg.inv(scale[:, None, None] * turn @ sheared)
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in (height, width))
    places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(1, -1, 2)
    sources = (places - torch.stack([x, y], 1)[:, None]) @ back.mT
    return (sources / torch.tensor([width / 2, height / 2])).reshape(-1, height, width, 2)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[[a, b], [c, d]] for each, (N, 2, 2)."""
    return torch.stack([a, b, c, d], 1).reshape(-1, 2, 2)
