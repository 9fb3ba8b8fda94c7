"""Networks of nothing but convolutions and one linear layer, for files of a few kilobytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from attar.errors import UsageError
from attar.models.base import models
from attar.models.blocks import ImageSize, height_width


@models.register("plain-cnn")
def plain_cnn(
    channels: int,
    classes: int,
    *,
    image_size: ImageSize = 28,
    widths: Sequence[int] = (10, 16, 20),
    kernel: int = 3,
    pooled: int = 3,
) -> nn.Module:
    """A student whose weights are all there is to store: no norms, no shortcuts.

    widths: output channels of each convolution, padded to keep the image's size, followed by ReLU.
    kernel: their side, odd. pooled: after how many of them, from the first on, the image is halved
    by taking maxima. Then one linear layer over all that is left.
    """
    if not widths or kernel % 2 == 0 or not 0 <= pooled <= len(widths):
        raise UsageError(
            "plain-cnn takes at least one width, an odd kernel, and at most as many poolings as "
            f"widths; got widths {list(widths)}, kernel {kernel}, pooled {pooled}"
        )
    height, width = (side >> pooled for side in height_width(image_size))
    if min(height, width) < 1:
        raise UsageError(f"plain-cnn: images of {image_size} can't be halved {pooled} times")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (before, after) in enumerate(zip((channels, *widths), widths, strict=False), start=1):
        layers[f"conv{i}"] = nn.Conv2d(before, after, kernel, padding=kernel // 2)
        layers[f"relu{i}"] = nn.ReLU()
        if i <= pooled:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(widths[-1] * height * width, classes)
    return nn.Sequential(layers)
