"""How pruning and training go together, as a recipe writes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from attar.prune.schedule import cubic, linear, survivors


class _Schedule(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Iterative(_Schedule):
    """In this many steps of the same size, with training after each (Han et al. 2015)."""

    iterative: int = Field(ge=2)


class Cubic(_Schedule):
    """In this many steps, fast at first (Zhu & Gupta 2017)."""

    cubic: int = Field(ge=2)


class Regrow(_Schedule):
    """All at once; then, as it trains, zeros move to where gradients want weights (RigL, Evci et
    al. 2020)."""

    regrow: Annotated[float, Field(gt=0, lt=1)]
    """The share of the weights left that move at first; it falls to nothing."""
    every: int = Field(100, ge=1)
    """Steps from one move to the next."""
    until: Annotated[float, Field(gt=0, le=1)] = 0.75
    """The share of all steps after which nothing moves."""


class Rewind(_Schedule):
    """Trained, pruned by as much again of what is left, and trained again from the weights of an
    early epoch (lottery tickets; Frankle et al. 2020)."""

    rewind: int = Field(ge=1)
    """How many times."""
    to: int = Field(1, ge=0)
    """Epochs after which the weights were what it goes back to; 0: those that came in."""


_KINDS: dict[str, type[_Schedule]] = {
    "iterative": Iterative,
    "cubic": Cubic,
    "regrow": Regrow,
    "rewind": Rewind,
}


def _kind(value: Any) -> str | None:
    """Which of the schedules a recipe means."""
    if value == "one-shot":
        return "one-shot"
    if isinstance(value, dict):
        return next((name for name in _KINDS if name in value), None)
    return next((name for name, kind in _KINDS.items() if isinstance(value, kind)), None)


Schedule = Annotated[
    Annotated[Literal["one-shot"], Tag("one-shot")]
    | Annotated[Iterative, Tag("iterative")]
    | Annotated[Cubic, Tag("cubic")]
    | Annotated[Regrow, Tag("regrow")]
    | Annotated[Rewind, Tag("rewind")],
    Discriminator(
        _kind,
        custom_error_type="schedule",
        custom_error_message=(
            "one-shot, {iterative: steps}, {cubic: steps}, {regrow: share} or {rewind: rounds}"
        ),
    ),
]


class Regularise(BaseModel):
    """Training before the cut, with a penalty that makes small what is to go."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["growing", "group-lasso"] = "growing"
    """`growing`: on what the criterion has chosen, more and more (GReg, Wang et al. 2021).
    `group-lasso`: on all groups of channels, which leaves it to the training which become small
    (Wen et al. 2016)."""
    epochs: int = Field(ge=1)
    strength: float | None = Field(None, gt=0)
    """Of the penalty. Default: 1 for `growing`, which it grows to; 0.005 for `group-lasso`."""

    @property
    def factor(self) -> float:
        """The strength that was given, or its default."""
        return self.strength or {"growing": 1.0, "group-lasso": 0.005}[self.kind]


def shares(schedule: Any, ratio: float) -> list[float]:
    """The share that is gone after each step."""
    if isinstance(schedule, Iterative):
        return linear(ratio, schedule.iterative)
    if isinstance(schedule, Cubic):
        return cubic(ratio, schedule.cubic)
    if isinstance(schedule, Rewind):
        return survivors(ratio, schedule.rewind)
    return [ratio]


def part(total: int, step: int, steps: int) -> int:
    """A step's part of all epochs, at least one; what is left over goes to the last steps."""
    return max(1, total * (step + 1) // steps - total * step // steps)
