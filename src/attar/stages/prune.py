"""The stage that removes what matters least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from attar.data.base import Batch, Data
from attar.errors import UsageError
from attar.prune import (
    BlocksRemoved,
    Masked,
    Pruned,
    Widths,
    criteria,
    cubic,
    prune_blocks,
    prune_channels,
    prune_weights,
)
from attar.prune.criteria import Call, Calls, Criterion
from attar.prune.naming import joined
from attar.prune.patterns import NM, Pattern, parsed_block, parsed_pattern
from attar.prune.weights import left_dense
from attar.stages.base import Context, Stage, stages
from attar.stages.prune_budget import Budgets, Planner, moved
from attar.student import Student
from attar.tasks.base import Task
from attar.training.config import Training
from attar.training.evaluation import device_of, to_device

CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
OBSERVED = 8
"""Batches of 128 that a criterion sees, where it needs data."""
ONE_BY_ONE = 256
"""Examples that one sees which takes them one by one."""

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Cubic(BaseModel):
    """Gradual pruning: in this many steps, fast at first (Zhu & Gupta 2017)."""

    model_config = ConfigDict(extra="forbid")

    cubic: int = Field(ge=2)


@stages.register("prune")
class Prune(Budgets, Stage):
    """Removes the least important channels, physically and with all that is tied to them, or whole
    residual blocks, or sets single weights to zero.

    Channels and blocks make the model smaller and faster on any machine; every removal of channels
    is proven to answer as the network with those channels masked. Single weights stay as zeros,
    kept zero by every later stage: they compress, but on most machines they don't run faster.
    """

    name: ClassVar[str] = "prune"
    not_after: ClassVar[dict[str, str]] = {
        "quantize": "its scales were fitted to the channels and weights that pruning would remove",
        "share": "its codebooks were fitted to the weights that pruning would remove",
    }
    searched: ClassVar[tuple[str, ...]] = ("ratio",)

    granularity: Literal["channel", "block", "weight"] = "channel"
    criterion: str = "magnitude"
    """What is important, by name: `magnitude` (L1), `taylor`, … (docs/recipes.md has them all).
    Blocks go by how little answers move without them."""
    ratio: Ratio | Literal["auto"] | None = None
    """The share to remove; `auto`: the largest that keeps the budget's `max_drop` on validation."""
    threshold: float | None = Field(None, gt=0)
    """For `criterion: threshold`, instead of a ratio: what is smaller goes."""
    pattern: str | None = None
    """Of single weights, instead of a ratio: "2:4", of every 4 along the inputs at most 2 stay."""
    block: tuple[int, int] | None = None
    """Of single weights: whole blocks go, of so many rows and columns; the ratio counts them."""
    scope: Literal["local", "global"] = "local"
    """The same share of each layer, or of all together, wherever it matters least."""
    schedule: Literal["one-shot"] | Cubic = "one-shot"
    """`{cubic: 4}`: in four steps, each followed by its part of `recover`'s epochs."""
    recover: Training | None = None
    """Fine-tuning against the teacher."""
    exclude: list[str] = Field(default_factory=list)
    """Layers to leave alone, by path; `*` stands for anything."""
    floor: int = Field(8, ge=1)
    """Fewest channels a layer keeps (weights a tensor keeps); narrow layers keep half."""
    round_to: int = Field(8, ge=1)
    """Layers of twice as many channels keep a multiple of it, which runs faster."""

    @property
    def files(self) -> list[Path]:
        return [self.plan] if self.plan is not None else []

    @property
    def measures_runtime(self) -> bool:
        return self.latency_ms is not None or self.size is not None

    def _amounts(self) -> list[str]:
        """The keys that say how much goes."""
        given = ["ratio", "threshold", "pattern", "plan"]
        return [k for k in given if getattr(self, k) is not None] + [u for u, _ in self.budgets]

    @model_validator(mode="after")
    def _one_amount(self) -> Prune:
        amounts = self._amounts()
        planned = [k for k in amounts if k not in ("ratio", "threshold", "pattern")]
        if planned and len(amounts) > 1:
            raise ValueError(f"give one of {' and '.join(amounts)}: each says how much goes")
        if planned and self.granularity != "channel":
            raise ValueError(f"{planned[0]} is for granularity: channel")
        if planned and (self.scope == "global" or self.schedule != "one-shot"):
            raise ValueError(
                f"{planned[0]} says by itself what goes where: leave scope and schedule"
            )
        if self.plan is not None and not self.plan.is_file():
            raise ValueError(f"there is no plan {self.plan}")
        return self

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> str | None:
        return None if value is None else "{}:{}".format(*_said(parsed_pattern, value))

    @field_validator("block", mode="before")
    @classmethod
    def _block(cls, value: Any) -> tuple[int, int] | None:
        return None if value is None else _said(parsed_block, value)

    @model_validator(mode="after")
    def _structured(self) -> Prune:
        if self.pattern is None and self.block is None:
            return self
        if self.granularity != "weight":
            raise ValueError("pattern and block are for granularity: weight")
        if self.pattern is not None and self.block is not None:
            raise ValueError("give a pattern or a block, not both")
        if self.pattern is not None and (taken := self._beside_pattern()):
            raise ValueError(
                f"pattern {self.pattern} says how many weights of each group stay: "
                f"leave {taken} out"
            )
        return self

    def _beside_pattern(self) -> str:
        """What was asked for that a pattern leaves nothing to."""
        asked = {
            f"ratio: {self.ratio}": self.ratio is not None,
            "threshold": self.threshold is not None,
            "criterion: threshold": self.criterion == "threshold",
            "scope: global": self.scope == "global",
            "the gradual schedule": isinstance(self.schedule, Cubic),
        }
        return " and ".join(words for words, said in asked.items() if said)

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        by_threshold = self.criterion == "threshold"
        if by_threshold and (self.threshold is None or self.ratio is not None):
            raise ValueError("criterion: threshold takes a threshold and no ratio")
        if not by_threshold and self.threshold is not None:
            raise ValueError("threshold is for criterion: threshold")
        if not by_threshold and not self._amounts():
            raise ValueError(
                "give ratio, a number between 0 and 1 or auto, or what may be left: macs, "
                "parameters, size or latency_ms"
            )
        kind = criteria.get(self.criterion)
        if self.granularity == "block":
            self._of_blocks()
        elif self.granularity not in kind.granularities:
            raise ValueError(
                f"criterion: {self.criterion} scores {' and '.join(kind.granularities)}s, "
                f"not single {self.granularity}s"
            )
        if isinstance(self.schedule, Cubic) and (self.recover is None or by_threshold):
            raise ValueError("a gradual schedule needs a ratio, and recover to train between steps")
        return self

    def _of_blocks(self) -> None:
        if self.criterion != "magnitude" or self.threshold is not None or self.scope == "global":
            raise ValueError(
                "granularity: block takes blocks out by how little answers move without them: "
                "leave criterion, threshold and scope"
            )

    def apply(self, student: Student, run: Context) -> Student:
        ratio = self._largest(student, run) if self.ratio == "auto" else self.ratio
        if self.ratio == "auto" and ratio is None:
            run.tell(_note(f"even {CANDIDATES[0]:.0%} drops too much; nothing is pruned"))
            return student
        run.found["granularity"] = self.granularity
        if self.granularity != "block":
            run.found["criterion"] = self.criterion
        if ratio is not None:
            run.found["ratio"] = ratio
        start = student
        original: dict[str, int] = {}
        patterns = _patterns(student)
        for step, (share, training) in enumerate(rounds := self._rounds(ratio), start=1):
            student, said = self._once(student, run, share, start, original)
            if said is not None:
                original = original or {layer: before for layer, (before, _) in said.widths.items()}
                self._report(run, said, original, first=step == 1)
            if step == len(rounds):
                self._report_patterns(run, student, patterns)
            if training is not None:
                label = "recover" if len(rounds) == 1 else f"recover {step} of {len(rounds)}"
                student = run.train(student, training, label=label)
        if self.granularity == "weight":
            run.found["weights"] = _weights(student)
        return student

    def _rounds(self, ratio: float | None) -> list[tuple[float | None, Training | None]]:
        """The share pruned after each round, and the training that follows it."""
        if self.recover is None or ratio is None or not isinstance(self.schedule, Cubic):
            return [(ratio, self.recover)]
        shares = cubic(ratio, self.schedule.cubic)
        epochs = [_part(self.recover.epochs, step, len(shares)) for step in range(len(shares))]
        trainings = [self.recover.model_copy(update={"epochs": n}) for n in epochs]
        return list(zip(shares, trainings, strict=True))

    def _once(
        self,
        student: Student,
        run: Context,
        ratio: float | None,
        start: Student,
        original: dict[str, int] | None = None,
    ) -> tuple[Student, Pruned | None]:
        """One removal, where the stage began with `start`; what it did to channels, where it was
        channels."""
        if self.granularity == "block":
            assert ratio is not None
            return self._shallower(student, run, ratio, start), None
        criterion = criteria.get(self.criterion)()
        criterion.seed = run.seed
        device = device_of(student.module)
        calls = calls_of(run.task, run.data, run.seed, criterion, device)
        if self.granularity == "weight":
            pruned = prune_weights(
                student,
                criterion=criterion,
                ratio=ratio,
                threshold=self.threshold,
                pattern=self.pattern,
                block=self.block,
                scope=self.scope,
                floor=self.floor,
                exclude=self.exclude,
                calls=calls,
            )
            return pruned, None
        if self.budgets or self.plan is not None:
            planner = Planner(self, run, self.floor, self.exclude)
            return planner.prune(student, criterion, calls)
        return prune_channels(
            student,
            _example(run, device),
            criterion=criterion,
            ratio=ratio,
            threshold=self.threshold,
            scope=self.scope,
            widths=Widths(self.floor, self.round_to),
            exclude=self.exclude,
            original=original,
            calls=calls,
        )

    def _shallower(self, student: Student, run: Context, ratio: float, start: Student) -> Student:
        example = _example(run, device_of(student.module))
        before = _blocks_gone(student)[len(_blocks_gone(start)) :]
        shallow, gone = prune_blocks(
            student,
            example,
            ratio=ratio,
            lost=moved(run, student),
            exclude=self.exclude,
            before=len(before),
        )
        run.found["blocks"] = [*before, *gone]
        said = joined(gone) if gone else "none"
        run.tell(_note(f"blocks taken out, the least missed first: {said}"))
        return shallow

    def _largest(self, student: Student, run: Context) -> float | None:
        from attar.tuning.auto import search

        def attempt(ratio: float) -> nn.Module:
            trial, _ = self._once(student, run, ratio, student)
            if self.recover:
                short = self.recover.model_copy(update={"epochs": max(1, self.recover.epochs // 3)})
                trial = run.at(f"ratio-{ratio:g}").train(
                    trial, short, label=f"recover at {ratio:g}"
                )
            return trial.module

        found = search(run, "ratio", CANDIDATES, attempt)
        largest, run.found["tried"] = found
        return largest

    def _report(self, run: Context, said: Pruned, original: dict[str, int], *, first: bool) -> None:
        run.found["channels"] = {
            layer: {"before": original[layer], "after": after}
            for layer, (_, after) in said.widths.items()
        }
        run.found["kept_whole"] = said.kept
        if said.blocks:
            run.found["blocks"] = said.blocks
        if said.undone:
            run.found["undone"] = said.undone
        for message in said.notes() if first else ():
            run.tell(_note(message))

    def _report_patterns(self, run: Context, student: Student, before: dict[str, str]) -> None:
        """Tells which layers stayed dense, and which no longer keep to the pattern they had."""
        if self.pattern is not None or self.block is not None:
            left = left_dense(student, pattern=self.pattern, floor=self.floor, exclude=self.exclude)
            what = self.pattern or f"block {list(self.block or ())}"
            if left:
                run.found["kept_whole"] = left
            for reason in dict.fromkeys(left.values()):
                layers = joined([layer for layer, other in left.items() if other == reason])
                run.tell(_note(f"{what} leaves {layers} dense: {reason}"))
        after = _patterns(student)
        if lost := [layer for layer in before if layer not in after]:
            run.tell(_note(f"the pattern {before[lost[0]]} no longer holds in {joined(lost)}"))


def calls_of(
    task: Task, data: Data, seed: int, criterion: Criterion, device: torch.device
) -> Calls:
    """The training examples that a criterion which needs data sees, with the task's loss."""
    size, count = (1, ONE_BY_ONE) if criterion.by_example else (128, OBSERVED)

    def call(batch: Batch) -> Call:
        return Call(*task.arguments(batch), lambda output: task.loss(output, batch))

    def calls() -> Iterator[Call]:
        for batch in islice(data.train.batches(size, shuffle=True, seed=seed), count):
            yield call(to_device(batch, device))

    return calls


def _example(run: Context, device: Any) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in run.task.example(run.data))


def _blocks_gone(student: Student) -> list[str]:
    """The residual blocks that the student lost, in order."""
    return [path for e in student.edits if isinstance(e, BlocksRemoved) for path in e.wrapped]


def _weights(student: Student) -> dict[str, dict[str, Any]]:
    """By layer: how many weights there are, how many of them stay, and the pattern of these."""
    return {
        path.removesuffix(".weight"): {
            "weights": mask.numel(),
            "kept": int(mask.sum()),
            **_shown(edit.patterns.get(path)),
        }
        for edit in student.edits
        if isinstance(edit, Masked)
        for path, mask in edit.masks.items()
    }


def _shown(pattern: Pattern | None) -> dict[str, Any]:
    if pattern is None:
        return {}
    if isinstance(pattern, NM):
        return {"pattern": str(pattern)}
    return {"block": [pattern.rows, pattern.columns]}


def _patterns(student: Student) -> dict[str, str]:
    """The pattern that a layer's zeros keep to, by layer."""
    return {
        path.removesuffix(".weight"): str(pattern)
        for edit in student.edits
        if isinstance(edit, Masked)
        for path, pattern in edit.patterns.items()
    }


def _said(parse: Callable[[Any], tuple[int, int]], value: Any) -> tuple[int, int]:
    """The value read, or what is wrong with it as a recipe's error."""
    try:
        return parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from None


def _part(total: int, step: int, steps: int) -> int:
    """A step's part of all epochs, at least one; what is left over goes to the last steps."""
    return max(1, total * (step + 1) // steps - total * step // steps)


def _note(text: str) -> dict[str, Any]:
    return {"event": "note", "text": f"prune: {text}"}
