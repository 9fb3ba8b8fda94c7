"""The ResNets that He et al. made for CIFAR-10 (2015, "Deep Residual Learning for Image
Recognition", section 4.2), with parameter-free ("option A") shortcuts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import UsageError
from attar.models.base import models


class PadShortcut(nn.Module):
    """The parameter-free shortcut: every `stride`-th pixel, zero channels in front and behind.

    (N, C, H, W) → (N, before + C + after, ⌈H/stride⌉, ⌈W/stride⌉). `before` and `after` may be
    changed after channels on either side were removed.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.before = before
        self.after = after
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        front = (after - before) // 2
        self.shortcut = (
            nn.Identity()
            if stride == 1 and before == after
            else PadShortcut(front, after - before - front, stride)
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stem, three groups of blocks at `width`, 2·`width` and 4·`width`, a linear head.

    (N, channels, H, W) → logits (N, classes). `blocks`: how many in each of the three groups.
    `stem_stride` 2 halves the image at once: a quarter of the work, for students that must be fast.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int],
        channels: int,
        classes: int,
        width: int = 16,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._group(blocks[0], width, width, stride=1)
        self.layer2 = self._group(blocks[1], width, 2 * width, stride=2)
        self.layer3 = self._group(blocks[2], 2 * width, 4 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)

    def _group(self, blocks: int, before: int, after: int, stride: int) -> nn.Sequential:
        first = Block(before, after, stride)
        return nn.Sequential(first, *(Block(after, after, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))


@models.register("cifar-resnet")
def cifar_resnet(
    channels: int,
    classes: int,
    *,
    blocks: Sequence[int] = (3, 3, 3),
    width: int = 16,
    stem_stride: int = 1,
) -> CifarResNet:
    """A ResNet for small images with `blocks` in its three groups; `[3, 3, 3]` is ResNet-20.

    All three groups cost alike per block, but the first works on the largest images with the fewest
    channels: a student that must be fast saves there first.
    """
    return CifarResNet(three_groups(blocks, "cifar-resnet"), channels, classes, width, stem_stride)


def three_groups(blocks: Sequence[int], name: str) -> tuple[int, int, int]:
    """The numbers of blocks in a network's three groups. name: the network's, for messages. Raises
    `UsageError` for anything but three numbers above 0."""
    if len(blocks) != 3 or not all(isinstance(n, int) and n > 0 for n in blocks):
        raise UsageError(
            f"{name} takes three numbers of blocks, each at least 1, such as [1, 3, 3]; "
            f"got {list(blocks)}"
        )
    first, second, third = blocks
    return first, second, third


def _register(depth: int) -> None:
    def resnet(
        channels: int, classes: int, *, width: int = 16, stem_stride: int = 1
    ) -> CifarResNet:
        each = (depth - 2) // 6
        return CifarResNet((each, each, each), channels, classes, width, stem_stride)

    resnet.__doc__ = (
        f"ResNet-{depth} for small images (He et al. 2015), arguments `width` and `stem_stride`."
    )
    models.register(f"cifar-resnet{depth}")(resnet)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register(_depth)
