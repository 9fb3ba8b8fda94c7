"""Students for small color images that answer in tens of microseconds on one CPU core."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from attar.models.base import models
from attar.models.blocks import conv_bn_relu, pooled_head


@models.register("cifar-tiny")
def cifar_tiny(
    channels: int, classes: int, *, width: int = 16, middle: int = 1, stem_kernel: int = 3
) -> nn.Module:
    """A fast student for 32x32 images: a plain stack of strided convolutions, no shortcuts.

    Every layer but the middle ones halves the image, so that a runtime's fixed cost per operator
    and its memory traffic stay small: (width, 16x16), (2·width, 8x8), `middle` times
    (2·width, 8x8), (4·width, 4x4), the mean over the image, one linear layer. Widths that are
    multiples of 8 fill the vector registers of CPUs.

    width: maps of the first layer. middle: layers at 8x8 after the first there; the cheapest way
    to more accuracy. stem_kernel: pixels across in the first layer's kernel (3, or 4 to 6).
    """
    layers: OrderedDict[str, nn.Module] = conv_bn_relu(1, channels, width, stem_kernel, stride=2)
    layers |= conv_bn_relu(2, width, 2 * width, stride=2)
    for i in range(middle):
        layers |= conv_bn_relu(3 + i, 2 * width, 2 * width)
    layers |= conv_bn_relu(3 + middle, 2 * width, 4 * width, stride=2)
    return nn.Sequential(layers | pooled_head(4 * width, classes))
