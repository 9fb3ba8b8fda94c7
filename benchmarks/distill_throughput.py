"""Images per second of distilling a ResNet-56 into a ResNet-20, beside loops that others use.

KD at temperature 4, batches of 128 CIFAR-10-sized images with random crops and flips:

- plain: what most scripts do: a live float32 teacher, default memory layout, torchvision transforms
  per image in DataLoader workers;
- tuned: by hand: channels-last, bfloat16 where the processor computes it natively (the teacher's
  weights too), data in memory, crops and flips by batch, the fused optimizer;
- torchdistill: its distillation box with its KDLoss, on the plain loop's data. Where it isn't
  installed (`pip install --no-deps torchdistill`), it is left out and so are its figures;
- attar live: a teacher in its fastest form that answers alike;
- attar stored: the teacher's answers to ten augmentations of each image, asked for once.

Images are random: only time is measured. All take turns; medians over rounds. Asking for the
answers is timed too, and `stored_total_over_plain` spreads it over a run of 60 epochs: it is the
plain loop's time for these over that of 60 stored epochs and the asking together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude, options, show
from loops import BATCH, as_data, compared, in_memory, loaded, random_images, take_turns
from torch import nn
from torch.nn import functional as F

from attar.distill.criteria.kd import KD
from attar.distill.objective import DistillObjective
from attar.distill.signal import Source
from attar.distill.teaching import teaching
from attar.models import ModelSpec, build
from attar.store import Store
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.precision import computes_bfloat16

TEMPERATURE, TASK_WEIGHT, KD_WEIGHT = 4.0, 0.1, 0.9
VIEWS, EPOCHS = 10, 60
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
GOALS: dict[str, tuple[str, float]] = {
    "live_over_plain": (">=", 2.0),
    "live_over_tuned": (">=", 1.2),
    "stored_over_plain": (">=", 4.0),
    "stored_over_torchdistill": (">=", 4.0),
    "stored_total_over_plain": (">=", 3.0),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec(model=f"cifar-{name}", channels=3, classes=10))


def soft_loss(own: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    own, wanted = own.float(), wanted.float()
    soft = F.kl_div(
        F.log_softmax(own / TEMPERATURE, 1),
        F.softmax(wanted / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return KD_WEIGHT * TEMPERATURE**2 * soft + TASK_WEIGHT * F.cross_entropy(own, labels)


def plain(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    teacher, student = network("resnet56").eval(), network("resnet20").train()
    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    loader = loaded(images, labels)

    def epoch() -> float:
        started, seen = time.perf_counter(), 0
        for inputs, targets in loader:
            with torch.no_grad():
                wanted = teacher(inputs)
            loss = soft_loss(student(inputs), wanted, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(inputs)
        return seen / (time.perf_counter() - started)

    return epoch


def tuned(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    half = computes_bfloat16()
    layout = torch.channels_last
    teacher = network("resnet56").eval().to(memory_format=layout)
    teacher = teacher.bfloat16() if half else teacher
    student = network("resnet20").train().to(memory_format=layout)
    optimizer = torch.optim.SGD(student.parameters(), **SGD, fused=True)
    batches = in_memory(images, labels)

    def epoch() -> float:
        started, seen = time.perf_counter(), 0
        for inputs, targets in batches():
            with torch.no_grad():
                wanted = teacher(inputs.bfloat16() if half else inputs)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                own = student(inputs)
            soft_loss(own, wanted, targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen += len(inputs)
        return seen / (time.perf_counter() - started)

    return epoch


def others(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float] | None:
    """torchdistill's loop, as its examples have it."""
    try:
        import torchdistill.core.interfaces  # fills its registries
        import torchdistill.losses
        import torchdistill.optim  # noqa: F401
        from torchdistill.core.distillation import get_distillation_box
    except ImportError:
        print("torchdistill is not installed: pip install --no-deps torchdistill")
        return None
    loader = {"dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler}}
    loader["kwargs"] = {"batch_size": BATCH, "num_workers": 2, "drop_last": True}
    paths = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "linear"), ("io", "output"))
    }
    hooked = {
        "forward_proc": "forward_batch_only",
        "sequential": [],
        "forward_hook": {"input": [], "output": ["linear"]},
    }
    box = get_distillation_box(
        network("resnet56"),
        network("resnet20"),
        {"train": loaded(images, labels).dataset},
        {
            "num_epochs": 1,
            "train_data_loader": loader,
            "teacher": {**hooked, "requires_grad": False},
            "student": {**hooked, "requires_grad": True},
            "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {
                    "sub_terms": {
                        "kd": {
                            "criterion": {
                                "key": "KDLoss",
                                "kwargs": {
                                    **paths,
                                    "temperature": TEMPERATURE,
                                    "alpha": TASK_WEIGHT,
                                },
                            },
                            "weight": 1.0,
                        }
                    }
                },
            },
        },
        torch.device("cpu"),
        None,
        False,
        1,
    )

    def epoch() -> float:
        started, seen = time.perf_counter(), 0
        box.student_model.train()
        box.teacher_model.eval()
        box.pre_epoch_process(epoch=0)
        for inputs, targets, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(inputs, targets, supplement)
            box.post_forward_process(loss=loss)
            seen += len(inputs)
        return seen / (time.perf_counter() - started)

    return epoch


def ours(
    images: torch.Tensor, labels: torch.Tensor, store: Path, views: int | None
) -> tuple[Callable[[], float], float]:
    """Attar's loop, live or stored, and the seconds that asking for stored answers took."""
    task, student = ImageClassification(), network("resnet20")
    training = Training.model_validate(
        {
            "epochs": 2,  # the first only warms up what the other loops keep from round to round
            "batch_size": BATCH,
            "optimizer": {"name": "sgd", **SGD},
            "schedule": {"name": "constant", "warmup": 0},
        }
    )
    asked = partial(
        teaching,
        network("resnet56").eval(),
        task=task,
        data=as_data(images, labels),
        label="distill",
        seed=0,
        store=Store(store),
        views=views,
    )
    started = time.perf_counter()
    # as for a run of 60 epochs on CIFAR-10, so that it looks for its fastest form
    source, data = asked(
        training=training.model_copy(update={"epochs": EPOCHS * 45_000 // len(images)})
    )
    seconds = time.perf_counter() - started
    source = Settled(source)

    def epoch() -> float:
        objective = DistillObjective(
            task,
            source,
            {"kd": KD(temperature=TEMPERATURE, weight=KD_WEIGHT)},
            task_weight=TASK_WEIGHT,
        )
        history = train(student, data=data, task=task, training=training, objective=objective)
        return len(images) // BATCH * BATCH / history[-1]["seconds"]

    return epoch, seconds


class Settled:
    """A source that chooses its form once, however often a training begins anew."""

    def __init__(self, source: Source) -> None:
        self._source, self._done = source, False
        self.signal, self.start_epoch = source.signal, source.start_epoch

    @property
    def choice(self) -> Any:
        return self._source.choice

    def settle(self, batch: Any) -> None:
        if not self._done:
            self._source.settle(batch)
            self._done = True


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    steps, rounds = (5, 3) if arguments.quick else (24, 5)
    images, labels = random_images(steps)
    with tempfile.TemporaryDirectory() as folder:
        live, _ = ours(images, labels, Path(folder), None)
        stored, asking = ours(images, labels, Path(folder), VIEWS)
        loops = {"plain": plain(images, labels), "tuned": tuned(images, labels)}
        theirs = others(images, labels)
        loops |= {"torchdistill": theirs} if theirs else {}
        speeds = take_turns({**loops, "attar live": live, "attar stored": stored}, rounds)
    columns = ["images/s", "over it", "95 % interval"]
    native = f"bfloat16 {'on' if computes_bfloat16() else 'not native here'}"
    title = f"ResNet-56 → ResNet-20, batch {BATCH}, {native}"
    figures = {}
    for of in ("live", "stored"):
        over, rows = compared(
            {k: v for k, v in speeds.items() if k in (*loops, f"attar {of}")},
            list(loops),
            f"attar {of}",
        )
        show(f"{title}: attar {of}", ["loop", *columns], rows)
        figures |= {f"{of}_over_{name}": round(one.value, 3) for name, one in over.items()}
    figures["stored_total_over_plain"] = round(total(speeds, asking, len(images)), 3)
    figures["asking_images_per_second"] = round(VIEWS * len(images) / asking)
    goals = {name: goal for name, goal in GOALS.items() if name in figures}
    conclude("distill_throughput", arguments, figures, goals, bfloat16=computes_bfloat16())


def total(speeds: dict[str, list[float]], asking: float, images: int) -> float:
    """The plain loop's seconds for a whole run over those of the stored one, asking included."""
    plain_seconds, stored_seconds = (
        EPOCHS * images / float(np.median(speeds[name])) for name in ("plain", "attar stored")
    )
    return plain_seconds / (stored_seconds + asking)


if __name__ == "__main__":
    main()
