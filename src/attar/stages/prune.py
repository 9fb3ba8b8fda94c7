"""The stage that removes what matters least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from attar.data.base import Batch, Data
from attar.errors import UsageError
from attar.prune import (
    BlocksRemoved,
    Masked,
    Pruned,
    Widths,
    criteria,
    prune_blocks,
    prune_channels,
    prune_weights,
)
from attar.prune.channels import Prunable
from attar.prune.criteria import Call, Calls, Criterion
from attar.prune.naming import joined
from attar.prune.patterns import NM, Pattern, parsed_block, parsed_pattern
from attar.prune.penalty import GroupLasso, Growing, going, redone
from attar.prune.regrowth import Regrowing, with_masks
from attar.prune.weights import left_dense
from attar.stages.base import Context, Stage, stages
from attar.stages.prune_budget import Budgets, Planner, moved
from attar.stages.prune_schedule import (
    Cubic,
    Iterative,
    Regrow,
    Regularise,
    Rewind,
    Schedule,
    part,
    shares,
)
from attar.stages.recovery import Recovery
from attar.student import Student
from attar.tasks.base import Task
from attar.training.checkpoint import load_checkpoint_state, save_checkpoint
from attar.training.config import Training
from attar.training.evaluation import device_of, to_device

CANDIDATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
OBSERVED = 8
"""Batches of 128 that a criterion sees, where it needs data."""
ONE_BY_ONE = 256
"""Examples that one sees which takes them one by one."""

Ratio = Annotated[float, Field(gt=0, lt=1)]


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
    schedule: Schedule = "one-shot"
    """`{cubic: 4}` or `{iterative: 4}`: in four steps, each followed by its part of `recover`'s
    epochs. `{regrow: 0.3}`: single weights whose zeros move while `recover` trains. `{rewind: 3}`:
    lottery tickets, each round of which is `recover`'s training from early weights."""
    regularise: Regularise | None = None
    """Training before the cut, by `recover`'s settings, that makes small what is to go."""
    recover: Recovery | None = None
    """Fine-tuning against the teacher."""
    exclude: list[str] = Field(default_factory=list)
    """Layers to leave alone, by path; `*` stands for anything."""
    floor: int = Field(8, ge=1)
    """Fewest channels a layer keeps (weights a tensor keeps); narrow layers keep half."""
    round_to: int = Field(8, ge=1)
    """Layers of twice as many channels keep a multiple of it, which runs faster."""

    @property
    def files(self) -> list[Path]:
        plan = [self.plan] if self.plan is not None else []
        return plan + (self.recover.files if self.recover is not None else [])

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
        if self.precision == "int8" and self.size is None and self.latency_ms is None:
            raise ValueError(
                "precision says of which file size and latency_ms are: give one of them"
            )
        if not self.budgets and not (self.sensitivity and self.depth):
            unused = "depth" if self.sensitivity else "sensitivity"
            raise ValueError(
                f"{unused} is for a budget (macs, parameters, size or latency_ms): leave it out"
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
            "schedule": self.schedule != "one-shot",
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
        return self

    @model_validator(mode="after")
    def _scheduled(self) -> Prune:
        schedule = self.schedule
        stepped = isinstance(schedule, Iterative | Cubic | Rewind)
        if stepped and (self.recover is None or self.ratio is None):
            raise ValueError("a gradual schedule needs a ratio, and recover to train between steps")
        if isinstance(schedule, Regrow) and (self.recover is None or self.granularity != "weight"):
            raise ValueError("regrow is for granularity: weight, and needs recover to train in")
        if isinstance(schedule, Regrow) and self.block is not None:
            raise ValueError("regrow moves single weights, not blocks of them: leave block out")
        if isinstance(schedule, Rewind) and self.recover and schedule.to >= self.recover.epochs:
            raise ValueError(
                f"to: {schedule.to} is no epoch of recover's {self.recover.epochs}, which it goes "
                "back within"
            )
        return self

    @model_validator(mode="after")
    def _regularised(self) -> Prune:
        if self.regularise is None:
            return self
        if self.recover is None or self.schedule != "one-shot":
            raise ValueError("regularise trains as recover says, once: give recover, no schedule")
        if self.regularise.kind == "group-lasso" and self.granularity != "channel":
            raise ValueError("group-lasso makes groups of channels small: use kind: growing")
        return self

    @property
    def training_epochs(self) -> int:
        """How many epochs it trains, whatever is searched."""
        if self.recover is None:
            return 0
        times = 1 + self.schedule.rewind if isinstance(self.schedule, Rewind) else 1
        return self.recover.epochs * times + (self.regularise.epochs if self.regularise else 0)

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
        patterns = _patterns(student)
        if isinstance(self.schedule, Rewind):
            student = self._rewound(student, run, ratio)
        else:
            student = self._stepped(student, run, ratio)
        self._report_patterns(run, student, patterns)
        if self.granularity == "weight":
            run.found["weights"] = _weights(student)
        return student

    def _stepped(self, student: Student, run: Context, ratio: float | None) -> Student:
        """The student after each step's removal and the training that follows it."""
        start, heard = student, _Heard(run)
        steps = [None] if ratio is None else shares(self.schedule, ratio)
        for step, share in enumerate(steps):
            student, said = self._cut(student, run, share, start, heard.original)
            heard.report(said)
            if self.recover is not None:
                epochs = part(self.recover.epochs, step, len(steps))
                label = f"recover {step + 1} of {len(steps)}" if len(steps) > 1 else "recover"
                student = self._recovered(student, self.recover.of(epochs), run, label)
        return student

    def _cut(
        self,
        student: Student,
        run: Context,
        ratio: float | None,
        start: Student,
        original: dict[str, int],
    ) -> tuple[Student, Pruned | None]:
        """One removal, after the training that makes what goes small, where that is asked for."""
        if self.regularise is None or self.recover is None:
            return self._once(student, run, ratio, start, original)
        training, factor = self.recover.of(self.regularise.epochs), self.regularise.factor
        if self.regularise.kind == "group-lasso":
            graph = Prunable(student, _example(run, student), self.exclude).graph
            student = run.train(
                student,
                training,
                label="regularise",
                wrap=lambda inner: GroupLasso(inner, graph, strength=factor),
            )
            return self._once(student, run, ratio, start, original)
        chosen, said = self._once(student, run, ratio, start, original)
        known = {id(edit) for edit in student.edits}
        goes = going(student.module, [e for e in chosen.edits if id(e) not in known])
        steps = _steps(run, training)
        trained = run.train(
            student,
            training,
            label="regularise",
            wrap=lambda inner: Growing(inner, goes, strength=factor, steps=steps),
        )
        return redone(trained, chosen), said

    def _recovered(self, student: Student, training: Recovery, run: Context, label: str) -> Student:
        if not isinstance(self.schedule, Regrow):
            return training.recovered(student, run, label)
        (masked,) = (edit for edit in student.edits if isinstance(edit, Masked))
        changes = int(self.schedule.until * training.epochs * _steps(run, training))
        if changes <= self.schedule.every:
            raise UsageError(
                f"regrow: nothing would move: zeros stay from step {changes} on, and the first "
                f"change is at step {self.schedule.every}: give a smaller every, or more epochs"
            )
        moving = Regrowing(
            masked,
            share=self.schedule.regrow,
            every=self.schedule.every,
            until=self.schedule.until,
            steps=_steps(run, training),
            epochs=training.epochs,
        )
        trained = training.recovered(with_masks(student, moving), run, label, moving.start_epoch)
        return with_masks(trained, moving.settled(trained.module))

    def _rewound(self, student: Student, run: Context, ratio: float | None) -> Student:
        """Lottery tickets: the student that is left of the last round, trained."""
        assert isinstance(self.schedule, Rewind) and self.recover is not None and ratio is not None
        start, heard, early = student.copy(), _Heard(run), run.work / "early.pt"
        gone, back = shares(self.schedule, ratio), self.schedule.to

        def remember(module: nn.Module, epoch: int) -> None:
            if epoch == back:
                save_checkpoint(module.state_dict(), early)

        rounds = len(gone) + 1
        trained = self.recover.recovered(student, run, f"train 1 of {rounds}", remember)
        first = start.copy()
        first.module.load_state_dict(load_checkpoint_state(early) or {})
        for step, share in enumerate(gone):
            pruned, said = self._once(trained, run, share, start, heard.original)
            heard.report(said)
            ticket = redone(first, pruned)
            trained = self.recover.recovered(ticket, run, f"train {step + 2} of {rounds}")
        return trained

    def _once(
        self,
        student: Student,
        run: Context,
        ratio: float | None,
        start: Student,
        original: dict[str, int],
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
            _example(run, student),
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
        example = _example(run, student)
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
            trial, _ = self._once(student, run, ratio, student, {})
            if self.recover:
                short = self.recover.model_copy(update={"epochs": max(1, self.recover.epochs // 3)})
                trial = run.at(f"ratio-{ratio:g}").train(
                    trial, short, label=f"recover at {ratio:g}"
                )
            return trial.module

        found = search(run, "ratio", CANDIDATES, attempt)
        largest, run.found["tried"] = found
        return largest

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


class _Heard:
    """What a run keeps of the removals, as they come. original: widths before the first one."""

    def __init__(self, run: Context) -> None:
        self._run = run
        self.original: dict[str, int] = {}

    def report(self, said: Pruned | None) -> None:
        """Keeps what was done to channels, where it was channels; tells it the first time."""
        if said is None:
            return
        for message in said.notes() if not self.original else ():
            self._run.tell(_note(message))
        self.original = self.original or {k: before for k, (before, _) in said.widths.items()}
        self._run.found["channels"] = {
            layer: {"before": self.original[layer], "after": after}
            for layer, (_, after) in said.widths.items()
        }
        self._run.found["kept_whole"] = said.kept
        if said.blocks:
            self._run.found["blocks"] = said.blocks
        if said.undone:
            self._run.found["undone"] = said.undone


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


def _example(run: Context, student: Student) -> tuple[Tensor, ...]:
    device = device_of(student.module)
    return tuple(x.to(device) for x in run.task.example(run.data))


def _steps(run: Context, training: Training) -> int:
    """Steps of one epoch."""
    return max(1, len(run.data.train) // training.batch_size)


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


def _note(text: str) -> dict[str, Any]:
    return {"event": "note", "text": f"prune: {text}"}
