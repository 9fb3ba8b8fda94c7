"""What can be seen of a distillation once it has ended: did the teacher help, and why not?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.data.base import UNLABELLED, Batch, Data, Split
from attar.distill.criterion import Criterion
from attar.distill.findings import (
    SURE,
    Doubtful,
    Finding,
    Gain,
    Measured,
    OnBoth,
    Softness,
    findings,
)
from attar.distill.responses import SoftenedCriterion, standardized
from attar.distill.signal import Source
from attar.distill.teacher import Teacher
from attar.tasks.base import Task
from attar.tasks.intervals import metric_drop
from attar.training.evaluation import device_of, statistics_of, to_device

LOOKED_AT = 2048
"""Examples of a split, spread over it: shares are then known to about two points at worst."""
AT_ONCE = 256
FIRST_SHOWN = 10
"""Doubtful examples that are named."""
COLDEST, HOTTEST, HALVINGS = 0.01, 1000.0, 16
"""Between these a temperature is looked for; so many halvings find it to a thousandth."""
DIGITS = 6


def measure(
    student: nn.Module,
    *,
    task: Task,
    data: Data,
    teacher: Source | None = None,
    knows_validation: bool = True,
    criteria: Mapping[str, Criterion] | None = None,
    task_weight: float = 0.0,
    history: Sequence[Mapping[str, Any]] = (),
    alone: nn.Module | None = None,
) -> Measured:
    """Looks at up to 2,048 training examples, not augmented, and as many validation examples.

    teacher: who answers, to any example; with `knows_validation=False` (a table), to training
        examples alone. `None`: what is about a teacher stays unknown. criteria, task_weight: the
        loss's terms. history: the training's, a record an epoch (`attar.training.loop.train`).
    alone: the same student trained without a teacher; compared on the whole validation split.

    Examples without labels count only where no label is needed. Answers with
    other classes than the student's can't be compared: such a teacher is not looked at.

    Example:
        >>> measured = measure(net, task=task, data=data,
        ...                    teacher=Teacher(wide, task))  # doctest: +SKIP
        >>> [found.kind for found in findings(measured)]  # doctest: +SKIP
        ['overfits']
    """
    asked: dict[str, Source] = {"student": Teacher(student, task)}
    if teacher is not None:
        asked["teacher"] = teacher
    if alone is not None:
        asked["alone"] = Teacher(alone, task)
    device = device_of(student)
    train = _look(data.train, asked, task, device)
    if not knows_validation:
        asked.pop("teacher", None)
    validation = _look(data.validation, asked, task, device)

    def metric(who: str) -> OnBoth:
        return OnBoth(train.value(who, task), validation.value(who, task))

    logits = train.logits()
    return Measured(
        metric=task.metric.name,
        unit=task.metric.unit,
        higher_is_better=task.metric.higher_is_better,
        examples={"train": train.examples, "validation": validation.examples},
        student=metric("student"),
        teacher=metric("teacher"),
        alone=metric("alone"),
        agreement=OnBoth(train.agreement(), validation.agreement()),
        top=None if logits is None else _rounded(1 - off_top(logits)),
        entropy=None if logits is None else _rounded(_entropy(logits)),
        softened=[] if logits is None else list(_softened(criteria or {}, logits)),
        doubtful=_doubtful(train, task),
        weights={**{k: c.weight for k, c in (criteria or {}).items()}, "task": task_weight},
        teach_answers=[k for k, c in (criteria or {}).items() if c.beside_task < 1],
        loss=_lines(history, "terms"),
        gradients=_lines(history, "gradients"),
        gain=None if alone is None else _gain(student, alone, data.validation, task),
    )


def diagnosis(measured: Measured) -> dict[str, Any]:
    """Measurements and what they mean, as JSON: `{"measured": …, "findings": [{"kind", "says",
    "try"}, …]}`."""
    return {
        "measured": asdict(measured),
        "findings": [found.record() for found in findings(measured)],
    }


def off_top(logits: Tensor, temperature: float = 1.0) -> float:
    """The probability of all classes but the likeliest, softened, its mean over all positions of
    `logits` (…, classes).

    >>> round(off_top(torch.tensor([[0.0, 0.0, 0.0, 0.0]])), 6)
    0.75
    """
    return float(1 - (logits / temperature).softmax(-1).amax(-1).mean())


def temperature_at(logits: Tensor, share: float) -> float | None:
    """The temperature at which `off_top` is `share`: it rises with the temperature, so that halving
    finds it. `None` where none does between 0.01, the least that criteria take, and 1000.

    >>> round(temperature_at(torch.tensor([[2.0, 0.0]]), 1 / (1 + math.e)), 2)
    2.0
    """
    low, high = math.log(COLDEST), math.log(HOTTEST)
    if not off_top(logits, COLDEST) <= share <= off_top(logits, HOTTEST):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if off_top(logits, math.exp(middle)) < share:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


@dataclass
class _Seen:
    """What was answered to one split's examples, batch by batch."""

    examples: int = 0
    statistics: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By who answered, of labelled examples."""
    labelled: list[np.ndarray] = field(default_factory=list)
    """Their places in the split."""
    same: list[np.ndarray] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    """The teacher's logits."""

    def add(self, logits: Mapping[str, Tensor], batch: Batch, task: Task) -> None:
        own = logits["student"]
        known = {who: z for who, z in logits.items() if z.shape[1:] == own.shape[1:]}
        self.examples += len(own)
        if "teacher" in known:
            self.same.append(np.asarray(task.agreement(own, known["teacher"])))
            self.answers.append(known["teacher"].flatten(0, -2))
        has_label = _has_label(batch)
        if batch.targets is None or not has_label.any():
            return
        inputs, targets, indices = (
            t[has_label] for t in (batch.inputs, batch.targets, batch.indices)
        )
        self.labelled.append(indices.numpy())
        for who, z in known.items():
            found = task.statistics(z[has_label], Batch(inputs, targets, indices))
            self.statistics.setdefault(who, []).append(found)

    def all_statistics(self, who: str) -> np.ndarray | None:
        return np.concatenate(self.statistics[who]) if who in self.statistics else None

    def value(self, who: str, task: Task) -> float | None:
        statistics = self.all_statistics(who)
        return None if statistics is None else _rounded(task.value(statistics))

    def agreement(self) -> float | None:
        return _rounded(float(np.concatenate(self.same).mean())) if self.same else None

    def logits(self) -> Tensor | None:
        """(positions, classes); `None` without a teacher, and for answers that aren't classes."""
        if not self.answers or self.answers[0].shape[-1] < 2:
            return None
        return torch.cat(self.answers)


def _look(split: Split, asked: Mapping[str, Source], task: Task, device: torch.device) -> _Seen:
    seen = _Seen()
    for batch in _spread(split):
        shown = to_device(batch, device)
        logits = {who: one.signal(shown).logits.float().cpu() for who, one in asked.items()}
        seen.add(logits, batch, task)
    return seen


def _spread(split: Split) -> Iterator[Batch]:
    count = min(LOOKED_AT, len(split))
    places = torch.linspace(0, len(split) - 1, count, dtype=torch.float64).long().tolist()
    for start in range(0, count, AT_ONCE):
        yield split.pick(places[start : start + AT_ONCE])


def _has_label(batch: Batch) -> Tensor:
    """bool (N,)."""
    if batch.targets is None:
        return torch.zeros(len(batch.indices), dtype=torch.bool)
    if batch.targets.dim() == 1 and not batch.targets.is_floating_point():
        return batch.targets != UNLABELLED
    return torch.ones(len(batch.indices), dtype=torch.bool)


def _softened(criteria: Mapping[str, Criterion], logits: Tensor) -> Iterator[Softness]:
    for term, criterion in criteria.items():
        if not isinstance(criterion, SoftenedCriterion) or not criterion.asks_teacher:
            continue
        settings = criterion.settings
        footing = standardized(logits) if settings.standardize else logits
        off, classes = off_top(footing, settings.temperature), logits.shape[-1]
        evenness = _entropy(footing / settings.temperature) / math.log(classes)
        yield Softness(
            term=term,
            temperature=settings.temperature,
            top=_rounded(1 - off) or 0.0,
            off_top=_rounded(off) or 0.0,
            evenness=_rounded(evenness) or 0.0,
            tenth_at=_rounded(temperature_at(footing, 0.1)),
            halfway_at=_rounded(temperature_at(footing, (1 - 1 / classes) / 2)),
        )


def _entropy(logits: Tensor) -> float:
    """In nats, its mean over positions."""
    return float(torch.special.entr(logits.softmax(-1)).sum(-1).mean())


def _doubtful(seen: _Seen, task: Task) -> Doubtful | None:
    statistics = seen.all_statistics("teacher")
    verdicts = None if statistics is None else task.verdicts(statistics)
    if verdicts is None:
        return None
    sure = verdicts.confidence >= SURE
    against = sure & ~verdicts.right
    places = np.concatenate(seen.labelled)[against]
    return Doubtful(
        count=int(against.sum()),
        examples=len(sure),
        expected=round(float((1 - verdicts.confidence)[sure].sum()), DIGITS),
        first=[int(place) for place in places[:FIRST_SHOWN]],
    )


def _gain(student: nn.Module, alone: nn.Module, validation: Split, task: Task) -> Gain:
    without, taught = (statistics_of(net, validation, task) for net in (alone, student))
    drop = metric_drop(task, without, taught)
    return Gain(
        value=_rounded(-drop.value) or 0.0,
        low=_rounded(-drop.high) or 0.0,
        high=_rounded(-drop.low) or 0.0,
        method=drop.method,
        taught=_rounded(task.value(taught)) or 0.0,
        alone=_rounded(task.value(without)) or 0.0,
        examples=len(taught),
    )


def _lines(history: Iterable[Mapping[str, Any]], key: str) -> dict[str, list[float | None]]:
    """A figure an epoch by term: `None` where an epoch has none."""
    records = [record.get(key) or {} for record in history]
    terms = dict.fromkeys(term for record in records for term in record)
    return {term: [_rounded(record.get(term)) for record in records] for term in terms}


def _rounded(value: float | None) -> float | None:
    """To six significant digits; `None` for what is no number, which JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


__all__ = ["Finding", "Measured", "diagnosis", "findings", "measure", "off_top", "temperature_at"]
