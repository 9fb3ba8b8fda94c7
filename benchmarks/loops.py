"""Loops over CIFAR-10-sized images that several benchmarks take turns with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from attar.data import Data
from attar.data.arrays import ArraySplit
from attar.data.augment import Augmentation
from attar.measure.intervals import Interval, ratio_interval

BATCH = 128
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CROPS_AND_FLIPS = [{"random_crop": {"size": 32, "padding": 4}}, "random_horizontal_flip"]


def random_images(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels for so many batches: only time is measured."""
    generator = torch.Generator().manual_seed(0)
    count = steps * BATCH
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


class Pictures(Dataset):
    """Images and labels one by one, transformed as a plain script does."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def loaded(images: torch.Tensor, labels: torch.Tensor) -> DataLoader:
    """What a plain script reads its batches from."""
    return DataLoader(Pictures(images, labels), BATCH, shuffle=True, num_workers=2, drop_last=True)


def in_memory(
    images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """Passes over the same batches as a competent person makes them: cropped and flipped as a
    whole, channels-last."""
    mean = torch.tensor(MEAN).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD).view(1, 3, 1, 1) * 255
    padded = nn.functional.pad(images, (4, 4, 4, 4))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)
        for places in torch.randperm(len(images)).split(BATCH):
            if len(places) < BATCH:
                return
            top, left = torch.randint(0, 9, (2, len(places)))
            crops = windows[places, :, top, left]
            flipped = torch.rand(len(places)) < 0.5
            crops[flipped] = crops[flipped].flip(-1)
            inputs = crops.float().sub_(mean).div_(std)
            yield inputs.contiguous(memory_format=torch.channels_last), labels[places]

    return batches


def as_data(images: torch.Tensor, labels: torch.Tensor) -> Data:
    """The same images as Attar's data, cropped and flipped; a batch of them to validate on."""
    few = torch.arange(BATCH)

    def split(name: str, rows: torch.Tensor | None = None) -> ArraySplit:
        augmentation = Augmentation(CROPS_AND_FLIPS, (3, 32, 32)) if rows is None else None
        return ArraySplit(
            name, images, labels, mean=MEAN, std=STD, rows=rows, augmentation=augmentation
        )

    return Data(
        name="random",
        train=split("train"),
        validation=split("validation", few),
        test=split("test", few),
        classes=tuple("0123456789"),
        shape=(3, 32, 32),
        preparation={},
    )


def take_turns(loops: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each one's figures, a round each, after one that isn't counted."""
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for turn in range(rounds):
        names = list(loops)
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            speeds[name].append(loops[name]())
    return speeds


def compared(
    speeds: dict[str, list[float]], to: list[str], of: str
) -> tuple[dict[str, Interval], list[list[str]]]:
    """`of` over each of `to`, and the table's rows."""
    over = {name: ratio_interval(np.array(speeds[of]), np.array(speeds[name])) for name in to}
    rows = [
        [
            name,
            f"{statistics.median(taken):.0f}",
            f"{over[name].value:.2f}" if name in over else "",
            f"{over[name].low:.2f} to {over[name].high:.2f}" if name in over else "",
        ]
        for name, taken in speeds.items()
    ]
    return over, rows
