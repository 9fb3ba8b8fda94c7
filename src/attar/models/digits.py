"""Networks for scikit-learn's 8x8 digits: seconds to train on any machine."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from attar.models.base import models
from attar.models.blocks import ImageSize, height_width


def _digits(
    channels: int, classes: int, image_size: ImageSize, first: int, second: int, hidden: int
) -> nn.Sequential:
    """Two 3x3 convolutions, one pooling, two linear layers."""
    height, width = height_width(image_size)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(second * (height // 2) * (width // 2), hidden),
            relu3=nn.ReLU(),
            linear2=nn.Linear(hidden, classes),
        )
    )


@models.register("digits-wide")
def digits_wide(channels: int, classes: int, *, image_size: ImageSize = 8) -> nn.Module:
    """A teacher for 8x8 digits: 151,306 parameters (32 and 64 maps, 128 units)."""
    return _digits(channels, classes, image_size, 32, 64, 128)


@models.register("digits-small")
def digits_small(channels: int, classes: int, *, image_size: ImageSize = 8) -> nn.Module:
    """A student for 8x8 digits: 9,802 parameters (8 and 16 maps, 32 units)."""
    return _digits(channels, classes, image_size, 8, 16, 32)
