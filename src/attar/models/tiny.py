"""Students for small color images that answer in tens of microseconds on one CPU core."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from attar.errors import UsageError
from attar.models.base import models
from attar.models.blocks import conv_bn_relu, pooled_head


@models.register("cifar-tiny")
def cifar_tiny(
    channels: int,
    classes: int,
    *,
    widths: Sequence[int] = (16, 48, 96, 144),
    strides: Sequence[int] = (2, 2, 2, 1),
) -> nn.Module:
    """A fast student for 32x32 images: a plain stack of 3x3 convolutions, no shortcuts.

    widths, strides: one of each a layer; then the mean over the image and one linear layer. A
    runtime spends its time on large images, on few channels that leave vector registers empty, and
    on every operator, so the first layer is narrow, most layers halve the image, widths are
    multiples of 48 (16 for the first), and there is nothing but convolutions.
    """
    if len(widths) != len(strides) or not widths:
        raise UsageError(
            f"cifar-tiny takes as many strides as widths, a layer each; got {len(widths)} widths "
            f"and {len(strides)} strides"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after, stride) in enumerate(
        zip((channels, *widths), widths, strides, strict=False), start=1
    ):
        layers |= conv_bn_relu(i, before, after, stride=stride)
    return nn.Sequential(layers | pooled_head(widths[-1], classes))
