"""The two networks of the article that Attar grew from, with layer sizes that fit, and a student
for the first."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from attar.models.base import models
from attar.models.blocks import ImageSize, conv_bn_relu, height_width, pooled_head


def _article(
    channels: int, classes: int, image_size: ImageSize, first: int, second: int, hidden: int
) -> nn.Sequential:
    """Two padded 3x3 convolutions, each pooled, then two linear layers."""
    height, width = height_width(image_size)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear1=nn.Linear(second * (height // 4) * (width // 4), hidden),
            relu3=nn.ReLU(),
            linear2=nn.Linear(hidden, classes),
        )
    )


@models.register("article-mnist")
def article_mnist(channels: int, classes: int, *, image_size: ImageSize = 28) -> nn.Module:
    """The article's network for MNIST: 421,642 parameters (32 and 64 maps, 128 units)."""
    return _article(channels, classes, image_size, 32, 64, 128)


@models.register("article-cifar10")
def article_cifar10(channels: int, classes: int, *, image_size: ImageSize = 32) -> nn.Module:
    """The article's network for CIFAR-10: 4.28 million parameters (64 and 128 maps, 512 units)."""
    return _article(channels, classes, image_size, 64, 128, 512)


@models.register("article-mnist-small")
def article_mnist_small(channels: int, classes: int, *, width: int = 16) -> nn.Module:
    """A fast student for 28x28 digits: three strided convolutions at width, 2·width, 2·width."""
    return nn.Sequential(
        conv_bn_relu(1, channels, width, stride=2)
        | conv_bn_relu(2, width, 2 * width, stride=2)
        | conv_bn_relu(3, 2 * width, 2 * width, stride=2)
        | pooled_head(2 * width, classes)
    )
