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

import time
from collections.abc import Callable

import torch
from common import conclude, options, show
from loops import BATCH, as_data, compared, in_memory, loaded, random_images, take_turns
from torch import nn

from attar.models import ModelSpec, build
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective
from attar.training.precision import computes_bfloat16


def network() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec(model="cifar-resnet20", channels=3, classes=10))


def plain(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = loaded(images, labels)

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
    batches = in_memory(images, labels)

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
    data = as_data(images, labels)
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


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    steps, rounds = (6, 3) if arguments.quick else (20, 7)
    images, labels = random_images(steps)
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
