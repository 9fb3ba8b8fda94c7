"""What measurements of a distillation mean: sentences with figures, and what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import mean, median

from attar import numbers

FOLLOWS = 0.9
"""A student that gives its teacher's answer to fewer of the examples it was taught on does not
follow it: a network that can learns these far better than new ones."""
AHEAD = 0.05
"""A teacher that is right on so many more training examples knows what the student can't."""
FALLING = 0.1
"""A loss that fell by this share from the training's third quarter to its last has not settled:
schedules end in small steps, which by themselves gain a few percent."""
FEWEST_EPOCHS = 4
"""Fewer have no quarters to compare."""
APART = 0.05
"""From training examples to new ones, a student may lose this much; more is learnt by heart."""
BY_HEART = 0.999
"""A teacher so often right on its training examples repeats their labels, wrong ones too."""
BY_HEART_COSTS = 0.02
"""What a teacher that knows its examples by heart must lose on new ones for that to matter."""
SURE = 0.9
"""The probability from which a teacher's answer against a label counts as evidence."""
NOISE = 0.01
"""Fewer such examples are the strange ones that every set has."""
FEWEST_NOISY = 3
UNEXPECTED = 2.0
"""A sure teacher errs at times: so many times more often than its own certainty allows."""
NEARLY_ONE_HOT = 0.01
"""With less of the mass off the likeliest class, a target says what the label says."""
NEARLY_EVEN = 0.98
"""From this share of the largest entropy on, softened probabilities are logits in all but name
(Hinton et al. 2015, section 2.1), and the loss attends to the many that mean nothing."""
BALANCE = 20.0
"""A term whose gradient is so many times smaller than the largest is lost in it: another batch
changes the larger one by more."""
BROUGHT_TO = 10.0
"""How many times smaller it may be and still be heard; what the suggested weight makes of it."""


@dataclass(frozen=True)
class OnBoth:
    """One figure on training and on validation examples; `None` where it can't be known."""

    train: float | None = None
    validation: float | None = None


@dataclass(frozen=True)
class Softness:
    """A criterion's targets on training examples: means over them.

    top, off_top: the softened probability of the likeliest class, and of all others together.
    evenness: entropy over the largest there can be, 0 to 1. tenth_at, halfway_at: temperatures at
    which `off_top` is 0.1, and half of what it would be for even probabilities.
    """

    term: str
    temperature: float
    top: float
    off_top: float
    evenness: float
    tenth_at: float | None = None
    halfway_at: float | None = None


@dataclass(frozen=True)
class Doubtful:
    """Training examples for which the teacher is sure (`SURE`) of another class than the label.

    expected: how many its own probabilities allow. first: places of the first ones in the split.
    """

    count: int
    examples: int
    expected: float
    first: list[int]


@dataclass(frozen=True)
class Gain:
    """By how much the metric on validation is better with the teacher than without, paired by
    example, with its 95 % interval; what both reach, and on how many examples."""

    value: float
    low: float
    high: float
    method: str
    taught: float
    alone: float
    examples: int


@dataclass(frozen=True)
class Measured:
    """What is known of a distillation once it has ended.

    metric, unit, higher_is_better: the task's. examples: how many were looked at, by split.
    student, teacher, alone: the metric of each; `alone` is the same student without a teacher.
    agreement: the share of examples to which student and teacher give the same answer. top,
    entropy: the teacher's at temperature 1, means over training examples. weights: of the loss's
    terms. teach_answers: those that teach what labels teach, beside which these may weigh little.
    loss, gradients: a figure an epoch, by term, as `training.loop` records them.
    """

    metric: str
    unit: str
    higher_is_better: bool = True
    examples: dict[str, int] = field(default_factory=dict)
    student: OnBoth = OnBoth()
    teacher: OnBoth = OnBoth()
    alone: OnBoth = OnBoth()
    agreement: OnBoth = OnBoth()
    top: float | None = None
    entropy: float | None = None
    softened: list[Softness] = field(default_factory=list)
    doubtful: Doubtful | None = None
    weights: dict[str, float] = field(default_factory=dict)
    teach_answers: list[str] = field(default_factory=list)
    loss: dict[str, list[float | None]] = field(default_factory=dict)
    gradients: dict[str, list[float | None]] = field(default_factory=dict)
    gain: Gain | None = None

    @property
    def is_share(self) -> bool:
        """Whether the metric is a share of right answers, which thresholds are meant for."""
        return self.unit == "fraction" and self.higher_is_better

    def better_by(self, one: float | None, other: float | None) -> float | None:
        """By how much `one` is the better value of the metric; `None` where either is unknown."""
        if one is None or other is None:
            return None
        return one - other if self.higher_is_better else other - one

    def shown(self, value: float | None) -> str:
        return numbers.metric(value, self.unit)


@dataclass(frozen=True)
class Finding:
    """One thing that was seen. says: a sentence or two with figures. try_: what to do about it;
    empty where nothing needs to be done."""

    kind: str
    says: str
    try_: str = ""

    def record(self) -> dict[str, str]:
        """As JSON."""
        return {"kind": self.kind, "says": self.says, "try": self.try_}


def findings(measured: Measured) -> list[Finding]:
    """What was seen, most important first: whether the teacher helped, where that was measured,
    then what may be the cause, then what else is worth knowing.

    Kinds: `helped`, `no-difference`, `harmed`; `teacher-no-better`; `capacity-gap`, `underfits` or
    `overfits`; `temperature-low` or `temperature-high`; `unbalanced`; `memorised` or `label-noise`.
    Never two of those joined by *or*, for the same term in the case of temperatures.

    Example:
        >>> [found] = findings(Measured("accuracy", "fraction", gain=Gain(
        ...     0.02, 0.011, 0.03, "paired Agresti-Min", 0.96, 0.94, 2000)))
        >>> found.kind
        'helped'
        >>> found.says
        'The teacher helped: accuracy on 2,000 validation examples is 96.00 % with it and 94.00 % \
without, 2.00 points better (95 % interval 1.10 to 3.00).'
    """
    parts = (_no_better, _fit, _temperatures, _balance, _knowledge)
    causes = list(chain.from_iterable(part(measured) for part in parts))
    return [*_verdict(measured, causes), *causes]


def _verdict(m: Measured, causes: Sequence[Finding]) -> Iterator[Finding]:
    gain = m.gain
    if gain is None:
        return
    both = (
        f"{m.metric} on {gain.examples:,} validation examples is {m.shown(gain.taught)} with it "
        f"and {m.shown(gain.alone)} without"
    )
    spanned = "95 % interval " + numbers.span(
        {"low": gain.low, "high": gain.high}, numbers.difference, m.unit
    )
    points = numbers.points(m.unit)
    size = f"{numbers.difference(abs(gain.value), m.unit)}{points}"
    reasons = "What else was found may be the cause." if causes else "No cause was found. "
    if gain.low > 0:
        yield Finding("helped", f"The teacher helped: {both}, {size} better ({spanned}).")
    elif gain.high < 0:
        yield Finding(
            "harmed",
            f"The teacher did harm: {both}, {size} worse ({spanned}).",
            reasons if causes else f"{reasons}Try other criteria: attar compare.",
        )
    else:
        yield Finding(
            "no-difference",
            f"No help was shown: {both}. The difference is "
            f"{numbers.difference(gain.value, m.unit)}{points}, and its {spanned} has room for "
            "none.",
            reasons
            if causes
            else f"{reasons}A small help needs more seeds to be seen (attar compare), or more "
            "validation examples.",
        )


def _no_better(m: Measured) -> Iterator[Finding]:
    if not _is_no_better(m):
        return
    alone = m.alone.validation is not None
    rival = m.alone.validation if alone else m.student.validation
    yield Finding(
        "teacher-no-better",
        f"The teacher is no better than its student{' alone' if alone else ''}: {m.metric} on "
        f"validation is {m.shown(m.teacher.validation)} for the teacher and {m.shown(rival)} for "
        "the student.",
        "Take a stronger teacher."
        if alone
        else "Say diagnose: true to learn whether the student would have got there alone; for more "
        "than this, take a stronger teacher.",
    )


def _is_no_better(m: Measured) -> bool:
    rival = m.alone.validation if m.alone.validation is not None else m.student.validation
    ahead = m.better_by(m.teacher.validation, rival)
    return ahead is not None and ahead <= 0


def _fit(m: Measured) -> Iterator[Finding]:
    """How the student learnt: too far behind, not long enough, or by heart."""
    agreed = m.agreement.train
    if agreed is not None and agreed < FOLLOWS:
        if _is_ahead(m) and not _is_no_better(m):
            yield _behind(m, agreed)
        return
    lost = m.better_by(m.student.train, m.student.validation) if m.is_share else None
    strayed = None
    if agreed is not None and m.agreement.validation is not None:
        strayed = agreed - m.agreement.validation
    if max(lost or 0.0, strayed or 0.0) >= APART:
        yield Finding(
            "overfits",
            f"The student learns the training examples by heart: {_both(m, m.student)}"
            + (f", and its teacher's answer {_agreements(m)}." if strayed is not None else "."),
            "Augment the examples (data.augment), so that the teacher is asked about new ones in "
            "every epoch; with views, keep more of them.",
        )


def _is_ahead(m: Measured) -> bool:
    ahead = m.better_by(m.teacher.train, m.student.train)
    return ahead is None or ahead >= (AHEAD if m.is_share else 0.0)


def _behind(m: Measured, agreed: float) -> Finding:
    epochs = max((len(line) for line in m.loss.values()), default=0)
    fell = _fell(m)
    seen = (
        f"even on training examples the student gives its teacher's answer to only {_share(agreed)}"
        f"{_compared(m)}"
    )
    if 0 < epochs < FEWEST_EPOCHS or (fell is not None and fell >= FALLING):
        why = (
            f"its loss was still falling, by {100 * fell:.0f} % from the third quarter to the last"
            if fell is not None
            else "a few epochs are little"
        )
        return Finding(
            "underfits",
            f"The student had not finished learning after {_epochs(epochs)}: {seen}; {why}.",
            f"Train longer, such as epochs: {2 * epochs}, before anything else is changed.",
        )
    return Finding(
        "capacity-gap",
        f"The teacher is too far ahead: {seen}, and training no longer brings it closer.",
        "Give the student more width or depth, or put a network of a size between as its teacher "
        "(distill.teacher), itself distilled from this one.",
    )


def _fell(m: Measured) -> float | None:
    """By which share the loss fell from the third quarter of the epochs to the last."""
    sums = [
        sum(v for v in values if v is not None)
        for values in zip(*m.loss.values(), strict=False)
        if any(v is not None for v in values)
    ]
    if len(sums) < FEWEST_EPOCHS:
        return None
    quarter = len(sums) // 4
    before, after = mean(sums[-2 * quarter : -quarter]), mean(sums[-quarter:])
    return (before - after) / abs(before) if before else 0.0


def _temperatures(m: Measured) -> Iterator[Finding]:
    for one in m.softened:
        if not m.weights.get(one.term, 1.0):
            continue
        if _is_cold(one):
            yield Finding(
                "temperature-low",
                f"At temperature {one.temperature:g} the targets of {one.term} are nearly one-hot: "
                f"all classes but the likeliest share {_share(one.off_top)} of the probability, so "
                "they say little that labels don't.",
                f"Try temperature: {_round(one.tenth_at)}, at which they share a tenth."
                if one.tenth_at is not None
                else "Try a higher temperature.",
            )
        elif _is_off(one):
            yield Finding(
                "temperature-high",
                f"At temperature {one.temperature:g} the targets of {one.term} are nearly even: "
                f"the likeliest class gets {_share(one.top)}, and their entropy is "
                f"{_share(one.evenness)} of the largest possible. Classes that the teacher rules "
                "out weigh as much in them as those it hesitates between.",
                f"Try temperature: {_round(one.halfway_at)}, at which they are halfway to even."
                if one.halfway_at is not None
                else "Try a lower temperature.",
            )


def _is_cold(one: Softness) -> bool:
    return one.off_top < NEARLY_ONE_HOT


def _is_off(one: Softness) -> bool:
    """Whether the temperature is too low or too high."""
    return _is_cold(one) or one.evenness > NEARLY_EVEN


def _balance(m: Measured) -> Iterator[Finding]:
    """Terms whose gradients are lost in the largest one's; medians over the epochs."""
    norms = {
        term: median(known)
        for term, line in m.gradients.items()
        if m.weights.get(term, 1.0) and (known := [v for v in line if v is not None])
    }
    if len(norms) < 2 or not max(norms.values()):
        return
    largest = max(norms, key=lambda term: norms[term])
    small = [term for term in norms if BALANCE * norms[term] < norms[largest]]
    if largest in m.teach_answers:  # its targets hold the labels: their own term may be faint
        small = [term for term in small if term != "task"]
    # their weight is to be looked at once the temperature is right
    small = [term for term in small if term not in {one.term for one in m.softened if _is_off(one)}]
    heard = sorted(norms[term] for term in small if norms[term])
    if len(small) > 1 and len(small) == len(norms) - 1 and heard:
        yield _drowns(m, largest, norms[largest], heard[-1])
        small = [term for term in small if not norms[term]]
    for term in small:
        yield _unheard(m, term, norms[term], largest, norms[largest])


def _drowns(m: Measured, largest: str, norm: float, second: float) -> Finding:
    return Finding(
        "unbalanced",
        f"{largest} drowns every other term: its gradient's norm is {_norm(norm)}, and the next "
        f"largest is {_norm(second)}, {norm / second:.0f} times smaller (medians over the epochs).",
        _weighed(m, largest, BROUGHT_TO * second / norm, "makes it ten times the next"),
    )


def _unheard(m: Measured, term: str, norm: float, largest: str, most: float) -> Finding:
    if not norm:
        return Finding(
            "unbalanced",
            f"{term} changes nothing in the student: its gradient is 0.",
            "See whether its layers come before what the student is trained by, or leave it out.",
        )
    return Finding(
        "unbalanced",
        f"{term} is hardly heard: its gradient's norm is {_norm(norm)}, {most / norm:.0f} times "
        f"smaller than that of {largest}, {_norm(most)} (medians over the epochs).",
        _weighed(m, term, most / norm / BROUGHT_TO, f"brings it to a tenth of {largest}"),
    )


def _weighed(m: Measured, term: str, factor: float, so_that: str) -> str:
    """The weight that is `factor` times the present one."""
    key = "task_weight" if term == "task" else f"the weight of {term}"
    now = m.weights.get(term)
    if now is None:
        return f"Multiply {key} by {_round(factor)}, which {so_that}."
    return f"Try {_round(now * factor)} for {key} (now {now:g}), which {so_that}."


def _knowledge(m: Measured) -> Iterator[Finding]:
    """What the teacher's answers to training examples are worth."""
    train, validation = m.teacher.train, m.teacher.validation
    if m.is_share and train is not None and train >= BY_HEART:
        if validation is not None and train - validation >= BY_HEART_COSTS:
            yield Finding(
                "memorised",
                f"The teacher knows the training examples by heart: {_both(m, m.teacher)}. There "
                "its answers are the labels again"
                + (f", {_share(m.top)} sure on average." if m.top is not None else "."),
                "Ask it about what it hasn't seen: augment the examples (data.augment), or train "
                "it for fewer epochs.",
            )
        return
    doubtful = m.doubtful
    if doubtful is None or doubtful.count < FEWEST_NOISY:
        return
    expected = max(NOISE * doubtful.examples, UNEXPECTED * doubtful.expected)
    if doubtful.count >= expected:
        yield Finding(
            "label-noise",
            f"{doubtful.count:,} of {doubtful.examples:,} training examples looked at may have a "
            f"wrong label: the teacher is at least {100 * SURE:g} % sure of another class; by its "
            f"own probabilities it would err on {doubtful.expected:.1f}. The first are "
            f"{', '.join(map(str, doubtful.first))} (places in the training split, from 0).",
            f"Look at these examples, and let labels weigh less than {m.weights['task']:g} "
            "(task_weight)."
            if m.weights.get("task")
            else "Look at these examples.",
        )


def _both(m: Measured, of: OnBoth) -> str:
    return (
        f"{m.metric} is {m.shown(of.train)} on training examples and {m.shown(of.validation)} on "
        "validation"
    )


def _agreements(m: Measured) -> str:
    return f"is given to {_share(m.agreement.train)} and {_share(m.agreement.validation)}"


def _compared(m: Measured) -> str:
    if m.teacher.train is None or m.student.train is None:
        return ""
    return f" ({m.metric} there: {m.shown(m.teacher.train)} and {m.shown(m.student.train)})"


def _share(value: float | None) -> str:
    """A share in %, digits as it needs: small ones are not 0."""
    if value is None:
        return numbers.ABSENT
    return f"{100 * value:.2g} %" if value < 0.01 else f"{100 * value:.1f} %"


def _norm(value: float) -> str:
    return f"{value:,.0f}" if 10 <= value < 1e6 else f"{value:.2g}"


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _round(value: float | None) -> str:
    """Two significant digits: a suggestion is no more exact."""
    if value is None or not math.isfinite(value):
        return numbers.ABSENT
    return f"{float(f'{value:.2g}'):g}"
