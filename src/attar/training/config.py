"""How a network is trained: what a recipe's `train`, `recover` and `distill` keys hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(BaseModel):
    """The update rule. `sgd` uses `momentum` (Nesterov); `adamw` ignores it."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(default=0.002, gt=0)
    momentum: Share = 0.9
    nesterov: bool = True
    weight_decay: float = Field(default=0.0005, ge=0)


class Schedule(BaseModel):
    """How the learning rate moves over the steps, after `warmup` (a share of all steps)."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["cosine", "constant", "steps", "linear"] = "cosine"
    warmup: Share = 0.05
    milestones: list[Share] = Field(default_factory=lambda: [0.5, 0.75])
    """For `steps`: where the rate falls, as shares of all steps."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """For `steps`: what it is multiplied by there."""


class Training(BaseModel):
    """One training: its length, batches, update rule and what keeps it stable."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(default=5, ge=1)
    batch_size: int = Field(default=128, ge=2)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    label_smoothing: Share = 0.0
    ema: Share = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none. The average is what is
    validated and kept."""
    clip: float | None = Field(default=None, gt=0)
    """Largest gradient norm; longer gradients are scaled down to it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU or a CPU that computes it natively, else float32."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights: the best on validation, or the last."""
