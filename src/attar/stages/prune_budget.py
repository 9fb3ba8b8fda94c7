"""The budgets that pruning can be given instead of a ratio, as a recipe writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator
from torch import Tensor, nn

from attar.distill.divergence import divergence
from attar.measure.cost import macs, parameters
from attar.planning.layers import LayerTimes, Shape
from attar.prune import Pruned, Widths
from attar.prune.budgets import Budget, Unit, prune_to_budget, shown
from attar.prune.costs import Prices
from attar.prune.criteria import Calls, Criterion
from attar.prune.plan import Plan, prune_by_plan, readable
from attar.quantize.edit import Scheme
from attar.quantize.post_training import quantize
from attar.runtimes.base import runtimes
from attar.runtimes.target import Target
from attar.stages.base import Context
from attar.store import write_whole
from attar.student import Student
from attar.training.evaluation import device_of, evaluating, to_device
from attar.units import parse_amount, parse_bytes

CALIBRATED = 32
"""Training examples that grids are chosen from where an int8 file is measured."""
LAYERS = {
    "macs": "macs_of_layers",
    "parameters": "parameters_of_tensors",
    "size": "parameters_of_tensors",
    "latency_ms": "microseconds_of_layers",
}
"""What a run calls the costs that a plan went by."""
SEEN = 512
"""Validation examples on which it is measured what a part of the network loses; of a large network
fewer, so that all take no more than `SEEN_MACS` multiply-accumulates, but at least `SEEN_LEAST`."""
SEEN_MACS = 256e9
SEEN_LEAST = 128


Amount = Annotated[float | str, BeforeValidator(parse_amount)]
Bytes = Annotated[float | str, BeforeValidator(parse_bytes)]


class Budgets(BaseModel):
    """What a pruned network may cost, and a plan made for that before."""

    macs: Amount | None = None
    """Multiply-accumulates that may be left of one example's forward pass, or a share: `50%`."""
    parameters: Amount | None = None
    """Parameters that may be left, or a share."""
    size: Bytes | None = None
    """Bytes of the exported float file (`200KB`), or a share."""
    latency_ms: Amount | None = None
    """Milliseconds of one answer of the exported float file in the deploy runtime, or a share."""
    precision: Literal["float32", "int8"] = "float32"
    """Of which file `size` and `latency_ms` are: `int8` for what `quantize` will make of it."""
    sensitivity: bool = True
    """Whether what each part of the network loses is measured on validation; else its channels'
    scores are summed, and whole blocks stay."""
    depth: bool = True
    """Whether whole residual blocks may go, where that costs least."""
    plan: Path | None = None
    """A `plan.json` of an earlier run, as it was or edited, instead of a budget or a ratio."""

    @property
    def budgets(self) -> list[tuple[Unit, float | str]]:
        """What was given, by unit."""
        units: tuple[Unit, ...] = ("macs", "parameters", "size", "latency_ms")
        amounts: list[tuple[Unit, float | str | None]] = [(u, getattr(self, u)) for u in units]
        return [(unit, amount) for unit, amount in amounts if amount is not None]


class Planner:
    """Prunes a student to a budget, or by a plan, within a run.

    floor, exclude: as in `prune_channels`.
    """

    def __init__(self, settings: Budgets, run: Context, floor: int, exclude: list[str]) -> None:
        self._settings, self._run, self._exclude = settings, run, exclude
        self._widths = Widths(floor, round_to=1)
        self._example = run.task.example(run.data)

    def prune(self, student: Student, criterion: Criterion, calls: Calls) -> tuple[Student, Pruned]:
        """The narrower student; the plan goes to the run's findings."""
        example, begun = _on(self._example, student), self._run.work / "plan.json"
        # what an interrupted stage chose by times must not be chosen anew: it was trained since
        given = self._settings.plan or (begun if begun.exists() else None)
        if given is not None:
            plan = Plan.read(given)
            narrow, pruned = prune_by_plan(student, example, plan, self._exclude)
        else:
            narrow, pruned, plan = prune_to_budget(
                student,
                example,
                criterion=criterion,
                budget=self._budget(student),
                widths=self._widths,
                exclude=self._exclude,
                calls=calls,
                lost=moved(self._run, student) if self._settings.sensitivity else None,
                depth=self._settings.depth,
            )
            self._run.work.mkdir(parents=True, exist_ok=True)
            write_whole(begun, readable(plan.to_json()))
            amounts = (plan.before, plan.after, plan.limit)
            self._tell("{} {} → {}, of {}".format(plan.unit, *map(shown, amounts)))
        limit = int(plan.limit) if plan.unit != "latency_ms" else plan.limit
        kept = {"before": plan.before, "limit": limit, "after": plan.after}
        self._run.found.update({plan.unit: kept, "plan": plan.to_json()})
        if plan.costs:
            self._run.found[LAYERS[plan.unit]] = {
                layer: {"before": before, "after": after}
                for layer, (before, after) in plan.costs.items()
            }
        return narrow, pruned

    def _budget(self, student: Student) -> Budget:
        (unit, amount), *_ = self._settings.budgets
        measure: Callable[[Student], float] = {
            "macs": self._macs,
            "parameters": lambda s: parameters(s.module),
            "size": lambda s: self._target.bytes(self._deployed(s)),
            "latency_ms": lambda s: self._target.latency_ms(self._deployed(s)),
        }[unit]
        if isinstance(amount, str):
            amount = float(amount.removesuffix("%")) / 100 * measure(student)
        price: Prices | None = None
        if unit == "macs":
            price = _macs_of
        elif unit == "latency_ms":
            run = self._run
            int8 = self._settings.precision == "int8"
            times = LayerTimes(run.runtime, run.threads, tell=self._measuring, int8=int8)
            price = times.microseconds
        asked = _on(self._asked, student) if unit == "latency_ms" else None
        return Budget(unit, amount, measure, price, asked)

    def _deployed(self, student: Student) -> Student:
        """The student whose file is measured: quantized, on a look at a few examples, where that is
        what counts."""
        if self._settings.precision == "float32":
            return student
        task, train = self._run.task, self._run.data.train
        seen = train.pick(range(min(CALIBRATED, len(train))))
        scheme = Scheme(runtime=self._run.runtime, calibration=len(seen.inputs))
        shapes = task.dynamic_shapes(self._example)
        examples = [task.arguments(seen)[0]]
        return quantize(student, scheme, examples, example=self._example, dynamic_shapes=shapes)

    @cached_property
    def _asked(self) -> tuple[Tensor, ...]:
        """Inputs as the model is deployed to answer them."""
        batch = next(iter(self._run.data.validation.batches(self._run.batch)))
        found: tuple[Tensor, ...] = self._run.task.arguments(batch)[0]
        return found

    def _macs(self, student: Student) -> float:
        return macs(student.module, _on(self._example, student))

    @cached_property
    def _target(self) -> Target:
        task, data = self._run.task, self._run.data
        described = task.describe(data)
        inputs, outputs = ([one["name"] for one in described[k]] for k in ("inputs", "outputs"))
        return Target(
            runtimes.get(self._run.runtime)(),
            self._example,
            task.dynamic_shapes(self._example),
            (inputs, outputs),
            tuple(x.numpy() for x in self._asked),
            self._run.threads,
        )

    def _measuring(self, layers: int) -> None:
        self._tell(f"times {layers} layers in {self._run.runtime}, once on this machine")

    def _tell(self, text: str) -> None:
        self._run.tell({"event": "note", "text": f"prune: {text}"})


def _on(example: tuple[Tensor, ...], student: Student) -> tuple[Tensor, ...]:
    """An example where the student's network is."""
    return tuple(x.to(device_of(student.module)) for x in example)


def _macs_of(shapes: Iterable[Shape]) -> dict[Shape, float]:
    return {shape: float(shape.macs) for shape in shapes}


def moved(run: Context, student: Student) -> Callable[[nn.Module], float]:
    """How far a network's answers are from the student's on a part of the validation split: the
    mean divergence of one's probabilities from the other's, in nats."""
    task, device, split = run.task, device_of(student.module), run.data.validation
    each = macs(student.module, _on(task.example(run.data), student))
    count = min(SEEN, max(SEEN_LEAST, int(SEEN_MACS / max(each, 1))))
    batches = [
        task.arguments(to_device(batch, device))
        for batch in islice(split.batches(128, shuffle=True, seed=run.seed), count // 128)
    ]

    def answers(module: nn.Module) -> Tensor:
        with evaluating(module):
            given = [task.logits(module(*args, **kwargs)) for args, kwargs in batches]
        return torch.cat(given).float().log_softmax(-1)

    whole = answers(student.module)
    return lambda module: float(divergence(whole, answers(module)))
