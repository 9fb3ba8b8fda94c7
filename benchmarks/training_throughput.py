"""Images per second of Attar's training loop beside two loops written by hand.

ResNet-20, batches of 128 CIFAR-10-sized images with random crops and flips:

- plain: what most scripts do: float32, default memory layout, torchvision transforms per image in
  DataLoader workers;
- tuned: the best a competent person does by hand: channels-last, bfloat16 where the processor
  computes it natively, data in memory, crops and flips by batch, the fused optimizer.

Images are random: only time is measured. The three take turns; medians over rounds. Then the step
by itself, on one batch that is ready: as in the plain loop, as in the tuned one, and the latter
compiled by `torch.compile`, which shows how much faster a loop of steps could be at best.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from common import conclude, options, show
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from attar.data import Data
from attar.data.arrays import ArraySplit
from attar.data.augment import Augmentation
from attar.measure.intervals import Interval, ratio_interval
from attar.models import ModelSpec, build
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective
from attar.training.precision import computes_bfloat16

BATCH = 128
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CROPS_AND_FLIPS = [{"random_crop": {"size": 32, "padding": 4}}, "random_horizontal_flip"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec(model="cifar-resnet20", channels=3, classes=10))


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


def plain(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        Pictures(images, labels), BATCH, shuffle=True, num_workers=2, drop_last=True
    )

    def epoch() -> float:
        started, seen = time.perf_counter(), 0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            seen += len(inputs)
        return seen / (time.perf_counter() - started)

    return epoch


def tuned(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    model = network().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True
    )
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

    def epoch() -> float:
        started, seen = time.perf_counter(), 0
        for inputs, targets in batches():
            with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16()):
                loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += len(inputs)
        return seen / (time.perf_counter() - started)

    return epoch


def ours(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    model = network()
    task = ImageClassification()
    few = torch.arange(BATCH)

    def split(name: str, rows: torch.Tensor | None = None) -> ArraySplit:
        augmentation = Augmentation(CROPS_AND_FLIPS, (3, 32, 32)) if rows is None else None
        return ArraySplit(
            name, images, labels, mean=MEAN, std=STD, rows=rows, augmentation=augmentation
        )

    data = Data(
        name="random",
        train=split("train"),
        validation=split("validation", few),
        test=split("test", few),
        classes=tuple("0123456789"),
        shape=(3, 32, 32),
        preparation={},
    )
    training = Training.model_validate(
        {
            "epochs": 2,  # the first only warms up what the other loops keep from round to round
            "batch_size": BATCH,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "schedule": {"name": "constant", "warmup": 0},
        }
    )

    def epoch() -> float:
        history = train(
            model, data=data, task=task, training=training, objective=TaskObjective(task)
        )
        return len(images) // BATCH * BATCH / history[-1]["seconds"]

    return epoch


def step(
    images: torch.Tensor, labels: torch.Tensor, *, tuned: bool, compiled: bool = False
) -> Callable[[], float]:
    """Optimizer steps on the first batch, as many as there are batches: images per second."""
    inputs = images[:BATCH].float().div(255)
    model = network().train()
    if tuned:
        layout = torch.channels_last
        inputs, model = inputs.contiguous(memory_format=layout), model.to(memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=tuned
    )
    forward = torch.compile(model, dynamic=False) if compiled else model
    half = tuned and computes_bfloat16()

    def several() -> float:
        started = time.perf_counter()
        for _ in range(len(images) // BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(forward(inputs), labels[:BATCH])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return len(images) // BATCH * BATCH / (time.perf_counter() - started)

    return several


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


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    steps, rounds = (6, 3) if arguments.quick else (20, 7)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (steps * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator
    )
    labels = torch.randint(0, 10, (steps * BATCH,), generator=generator)
    loops = {
        "plain loop": plain(images, labels),
        "tuned by hand": tuned(images, labels),
        "attar": ours(images, labels),
    }
    over, rows = compared(take_turns(loops, rounds), ["plain loop", "tuned by hand"], "attar")
    native = f"bfloat16 {'on' if computes_bfloat16() else 'not native here'}"
    columns = ["images/s", "over it", "95 % interval"]
    show(f"ResNet-20, batch {BATCH}, {native}", ["loop", *columns], rows)
    steps_alone = {
        "plain": step(images, labels, tuned=False),
        "tuned": step(images, labels, tuned=True),
        "compiled": step(images, labels, tuned=True, compiled=True),
    }
    alone, rows = compared(take_turns(steps_alone, rounds), ["plain", "tuned"], "compiled")
    show("The step alone, without data", ["step", *columns], rows)
    goals: dict[str, tuple[str, float]] = {"over_tuned": (">=", 0.98)}
    if computes_bfloat16():
        goals["over_plain"] = (">=", 3.0)
    conclude(
        "training_throughput",
        arguments,
        {
            "over_plain": round(over["plain loop"].value, 3),
            "over_tuned": round(over["tuned by hand"].value, 3),
            "step_compiled_over_plain": round(alone["plain"].value, 3),
            "step_compiled_over_tuned": round(alone["tuned"].value, 3),
        },
        goals,
        bfloat16=computes_bfloat16(),
    )


if __name__ == "__main__":
    main()
