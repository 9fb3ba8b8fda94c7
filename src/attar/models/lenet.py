"""LeNets: small networks for handwritten digits, after LeCun et al. 1998, "Gradient-based learning
applied to document recognition"."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from attar.models.base import models
from attar.models.blocks import ImageSize, height_width


def _lenet(
    channels: int, classes: int, image_size: ImageSize, first: int, second: int, hidden: int
) -> nn.Sequential:
    """Two 5x5 convolutions, each pooled, then two linear layers."""
    height, width = (((side - 4) // 2 - 4) // 2 for side in height_width(image_size))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(second * height * width, hidden),
            relu3=nn.ReLU(),
            linear2=nn.Linear(hidden, classes),
        )
    )


@models.register("lenet5")
def lenet5(channels: int, classes: int, *, image_size: ImageSize = 28) -> nn.Module:
    """LeNet-5 as pruning papers use it: 431,080 parameters on MNIST (20 and 50 maps, 500 units)."""
    return _lenet(channels, classes, image_size, 20, 50, 500)


@models.register("lenet-wide")
def lenet_wide(channels: int, classes: int, *, image_size: ImageSize = 28) -> nn.Module:
    """LeNet-5's shape, wider: a teacher for 28x28 digits (32 and 64 maps, 512 units)."""
    return _lenet(channels, classes, image_size, 32, 64, 512)


@models.register("lenet-small")
def lenet_small(channels: int, classes: int, *, image_size: ImageSize = 28) -> nn.Module:
    """LeNet-5's shape, narrow: a student for 28x28 digits (8 and 16 maps, 64 units)."""
    return _lenet(channels, classes, image_size, 8, 16, 64)


@models.register("lenet300")
def lenet300(channels: int, classes: int, *, image_size: ImageSize = 28) -> nn.Module:
    """LeNet-300-100: three linear layers, 266,610 parameters on MNIST."""
    height, width = height_width(image_size)
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            linear1=nn.Linear(channels * height * width, 300),
            relu1=nn.ReLU(),
            linear2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            linear3=nn.Linear(100, classes),
        )
    )
