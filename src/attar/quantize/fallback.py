"""Which layers stay float because int8 loses there: measured in the runtime, decided, measured
again. No layer is left in int8 on faith, and none is taken out on a profile's word alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from attar.events import Listener, silent

LIMIT = 1.0
"""int8 over float: the most its latency's upper bound may be. What exceeds it stays float."""
WORTH = 0.98
"""How much faster leaving layers in float must make the whole to be done."""
LEAST_LOSS = (2.0, 0.1)
"""What counts as losing: microseconds, and the share of the layer's time in float."""


class Ratio(Protocol):
    """An estimate with its interval, as `attar.measure.intervals.Interval`."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Bench(Protocol):
    """What the decision asks of a runtime."""

    def ratio(self, float_layers: tuple[str, ...]) -> Ratio:
        """The latency with these layers in float and all else in int8, over all in float."""
        ...

    def times(self, float_layers: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        """By layer still in int8: its time in float and as it is, in microseconds."""
        ...


@dataclass
class Decision:
    """What stays float, why, and what it was decided on.

    float_layers: module paths; `("*",)` for the whole network. ratio, low, high: latency over all
    in float, of the best that int8 took part in. tried: every arrangement that was measured. times:
    by layer in float and in int8, microseconds, where no more than what was given stays float.
    """

    float_layers: tuple[str, ...]
    why: dict[str, str]
    ratio: float
    low: float
    high: float
    tried: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def all_float(self) -> bool:
        """Whether nothing is in int8."""
        return "*" in self.float_layers

    def found(self) -> dict[str, Any]:
        """As JSON for the report."""
        kept = [{"layer": layer, "why": self.why[layer]} for layer in self.float_layers]
        record = asdict(self)
        del record["why"], record["times"]
        return {"int8_over_float": record, "float_layers": kept}


def decide(
    bench: Bench, given: tuple[str, ...] = (), tell: Callable[[str], None] | None = None
) -> Decision:
    """Leaves layers in float where they lose, all of them at first, else the one that loses most;
    keeps an arrangement only where the whole is measured to be faster; and takes nothing into int8
    if even the best arrangement is slower than float.

    given: layers that stay float whatever is measured. tell: hears each step as a sentence.
    """
    say = tell or (lambda _: None)
    why = dict.fromkeys(given, "the recipe says so")
    tried: list[dict[str, Any]] = []

    def measured(layers: tuple[str, ...]) -> Ratio:
        ratio = bench.ratio(layers)
        shown = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        tried.append({"float_layers": ", ".join(layers) or "none", **shown})
        say(
            f"int8 takes {ratio.value:.2f} of float's time ({ratio.low:.2f} to {ratio.high:.2f})"
            + (f" with {len(layers)} layers in float" if layers else "")
        )
        return ratio

    best, ratio = given, measured(given)
    times = bench.times(best)
    for losing in _arrangements(times):
        layers = (*best, *losing)
        trial = measured(layers)
        if trial.value < WORTH * ratio.value:
            best, ratio = layers, trial
            why.update(losing)
            break
    figures = (ratio.value, ratio.low, ratio.high)
    if ratio.high > LIMIT:
        reason = (
            f"int8 is not faster here: {ratio.value:.2f} of float's time, up to {ratio.high:.2f}"
        )
        return Decision(("*",), {"*": reason}, *figures, tried, times)
    return Decision(best, why, *figures, tried, times)


def _arrangements(times: dict[str, tuple[float, float]]) -> list[dict[str, str]]:
    """What to try in float, with the reason for each layer."""
    micros, share = LEAST_LOSS
    losses = {
        layer: now - was
        for layer, (was, now) in times.items()
        if now - was > max(micros, share * was)
    }
    if not losses or len(losses) == len(times):  # nothing to win, or no int8 left: `LIMIT` decides
        return []
    said = {
        layer: f"{times[layer][1]:.0f} µs in int8, {times[layer][0]:.0f} µs in float"
        for layer in sorted(losses, key=lambda layer: -losses[layer])
    }
    worst = next(iter(said))
    return [said] if len(said) == 1 else [said, {worst: said[worst]}]


def telling(tell: Listener = silent) -> Callable[[str], None]:
    """Sentences as `note` events."""
    return lambda text: tell({"event": "note", "text": f"quantize: {text}"})
