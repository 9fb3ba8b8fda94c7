"""A plan of which layers compute in int8: what was measured, what was chosen, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from attar.errors import UsageError
from attar.registry import near

SCHEMA = 1
Asks = Literal["max_drop", "latency"]


@dataclass(frozen=True)
class LayerPrecision:
    """One layer of a plan.

    loss, error: as of `LayerLoss`. float_us, int8_us: its time in either precision, microseconds.
    Each is `None` where it wasn't measured.
    """

    layer: str
    precision: Literal["int8", "float"]
    loss: float | None
    error: float | None
    float_us: float | None
    int8_us: float | None
    why: str


@dataclass(frozen=True)
class Trial:
    """An arrangement measured as a whole.

    share: of the time that int8 saves, how much the solver was free to give back. loss: the sum of
    its int8 layers' losses. drop, low, high: how much worse the metric is on validation. ratio,
    ratio_low, ratio_high: its latency over all in float. kept: whether it keeps the limit and is
    faster than float.
    """

    float_layers: tuple[str, ...]
    share: float
    loss: float
    drop: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    kept: bool


@dataclass(frozen=True)
class PrecisionPlan:
    """What stays float, and on what that was decided.

    asks, limit: `max_drop`, in the metric's unit, or `latency`, a share of float's. unit: of
    losses. examples: how many losses were measured on. tried: in that order. chosen: which of them;
    `None` where the whole network stays float. float_layers: module paths; `("*",)` for the whole.
    """

    asks: Asks
    limit: float
    unit: str
    examples: int
    layers: list[LayerPrecision]
    tried: list[Trial]
    chosen: int | None
    float_layers: tuple[str, ...]
    why: str

    def to_json(self) -> dict[str, Any]:
        """As the report and `from_json` read it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PrecisionPlan:
        """Raises `UsageError` for what is no plan."""
        try:
            fields = dict(record)
            if (schema := fields.pop("schema")) != SCHEMA:
                raise ValueError(f"schema {schema} is not {SCHEMA}")
            fields["layers"] = [LayerPrecision(**one) for one in fields["layers"]]
            fields["tried"] = [
                Trial(**{**one, "float_layers": tuple(one["float_layers"])})
                for one in fields["tried"]
            ]
            fields["float_layers"] = tuple(fields["float_layers"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"this is no plan of layers' precision: {error!r}") from None

    def for_network(self, module: nn.Module) -> tuple[str, ...]:
        """What this plan leaves in float of a network; nothing is measured. Raises `UsageError` for
        a network that lacks a layer of it."""
        paths = [path for path, _ in module.named_modules()]
        for layer in (one.layer for one in self.layers):
            if layer not in paths:
                raise UsageError(
                    f"the plan is of a network with a layer {layer}, which this one lacks"
                    f"{near(layer, paths)}"
                )
        return self.float_layers
