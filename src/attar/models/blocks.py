"""Pieces that several of Attar's own networks are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

ImageSize = int | Sequence[int]
"""Pixels: one number for a square image, or (height, width)."""


def height_width(image_size: ImageSize) -> tuple[int, int]:
    """(height, width) in pixels."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def conv_bn_relu(
    i: int, before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> OrderedDict[str, nn.Module]:
    """Convolution, batch norm and ReLU, named `conv{i}`, `bn{i}`, `relu{i}`.

    Padding keeps the image's size, divided by the stride.
    """
    padding = (kernel - stride + 1) // 2
    return OrderedDict(
        {
            f"conv{i}": nn.Conv2d(
                before, after, kernel, stride, padding, groups=groups, bias=False
            ),
            f"bn{i}": nn.BatchNorm2d(after),
            f"relu{i}": nn.ReLU(),
        }
    )


def pooled_head(features: int, classes: int) -> OrderedDict[str, nn.Module]:
    """The mean over the image, then one linear layer: takes images of any size."""
    return OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(features, classes)
    )


class Repeated(nn.Module):
    """One module applied `times` times in a row, its weights counted and stored once.

    Its output is the last application's. A criterion that wants an inner layer takes this module's
    output; the layers inside run more than once, so which of their outputs is meant is open.
    """

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.block = block
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.block(x)
        return x

    def extra_repr(self) -> str:
        return f"times={self.times}"
