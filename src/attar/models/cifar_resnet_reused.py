"""A CIFAR ResNet whose groups apply one block several times, as ALBERT does with a transformer's
layer (Lan et al., ICLR 2020, section 3.1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from attar.errors import UsageError
from attar.models.base import models
from attar.models.cifar_resnet import Block, CifarResNet, three_groups

Norms = Literal["own", "shared"]


class ReusedBlock(nn.Module):
    """A residual block applied `times` times: two 3x3 convolutions, each stored once.

    (N, width, H, W) → the same shape. norms: `own`, batch norms for every application (their
    inputs' statistics differ), or `shared`, the same ones for all.
    """

    def __init__(self, width: int, times: int, norms: Norms) -> None:
        super().__init__()
        self.times = times
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        each = times if norms == "own" else 1
        self.bn1 = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(each))
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(each))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.times):
            bn1, bn2 = self.bn1[i % len(self.bn1)], self.bn2[i % len(self.bn2)]
            y = self.relu(bn1(self.conv1(x)))
            x = self.relu(bn2(self.conv2(y)) + x)
        return x

    def extra_repr(self) -> str:
        return f"times={self.times}"


class CifarResNetReused(CifarResNet):
    """`CifarResNet` whose groups are a block that sets the width and one that is reused.

    The paths of the stem, the groups and the head are those of `CifarResNet`; inside a group,
    `first` sets the width and halves the image, and `again` is applied for the others.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int],
        channels: int,
        classes: int,
        width: int = 16,
        stem_stride: int = 1,
        norms: Norms = "own",
    ) -> None:
        self._norms = norms
        super().__init__(blocks, channels, classes, width, stem_stride)

    def _group(self, blocks: int, before: int, after: int, stride: int) -> nn.Sequential:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        again = blocks
        if stride > 1 or before != after:
            layers["first"], again = Block(before, after, stride), blocks - 1
        if again:
            layers["again"] = ReusedBlock(after, again, self._norms)
        return nn.Sequential(layers)


@models.register("cifar-resnet-reused")
def cifar_resnet_reused(
    channels: int,
    classes: int,
    *,
    blocks: Sequence[int] = (3, 3, 3),
    width: int = 16,
    stem_stride: int = 1,
    norms: Norms = "own",
) -> CifarResNetReused:
    """A CIFAR ResNet with one block a group used again: weights of 5 blocks, however deep.

    It computes as much as `cifar-resnet` with the same `blocks`; the first blocks of the second and
    third group set the width and are their own. `norms`: batch norms for each application (`own`)
    or one pair for all (`shared`).
    """
    if norms not in ("own", "shared"):
        raise UsageError(f"cifar-resnet-reused: norms is {norms!r}: own or shared")
    groups = three_groups(blocks, "cifar-resnet-reused")
    return CifarResNetReused(groups, channels, classes, width, stem_stride, norms)
