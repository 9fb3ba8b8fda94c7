"""Which layers compute in int8 and which in float, for a limit on what is lost, or on the time.

What layers lose one by one (`sensitivity`) and how long each takes in either precision decide what
is tried: for a time, a solver gives the arrangement that should lose least. Losses of single layers
add up only roughly, and so do their times. So every arrangement is measured as a whole, its drop on
validation and its time in the runtime, and these figures choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from attar.errors import UsageError
from attar.measure.intervals import Interval
from attar.planning.solver import Cost, cost_of, solve
from attar.quantize.fallback import LIMIT, Bench, Decision, Ratio, decide
from attar.quantize.precision_plan import Asks, LayerPrecision, PrecisionPlan, Trial
from attar.quantize.sensitivity import Sensitivity

WALK = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""How much of the time that int8 saves is given back for float layers, step by step."""
HALVINGS = 3
"""How often the step between an arrangement that breaks a limit and one that keeps it is halved."""
ROUNDING = 1e-6
"""Microseconds by which sums of times may differ."""

Drop = Callable[[tuple[str, ...]], Ratio]
"""How much worse the metric is with these layers in float, with its interval."""


def plan(
    bench: Bench,
    losses: Sensitivity,
    drop: Drop,
    *,
    max_drop: float | None = None,
    latency: float | None = None,
    given: tuple[str, ...] = (),
    tell: Callable[[str], None] | None = None,
) -> PrecisionPlan:
    """The fastest arrangement whose drop on validation is at most `max_drop`; or, for `latency`,
    the one that should lose least of those measured to take at most that share of float's time.

    It begins with what `decide` finds for speed alone, so layers that lose time in int8 are in
    float already. For `max_drop`, more and more of the time saved is given back, until an
    arrangement keeps the limit; then it is halved how much. Everything stays float where none that
    keeps the limit is faster.

    bench: times arrangements and layers in the runtime. losses: of each layer. drop: measures how
    much worse an arrangement is than the network before quantization. given: layers that stay float
    whatever is measured. tell: hears each step as a sentence. Raises `UsageError` for a latency
    that the fastest arrangement doesn't keep, and for not just one of `max_drop` and `latency`.

    Example:
        >>> found = plan(bench, losses, drop, max_drop=0.002)  # doctest: +SKIP
        >>> found.float_layers                                 # doctest: +SKIP
        ('features.1.conv.0.0',)
    """
    if (max_drop is None) == (latency is None):
        raise UsageError("mixed precision is for max_drop or for latency_ms: give one of them")
    say = tell or (lambda _: None)
    decision = decide(bench, given, say)
    if max_drop is not None:
        search = _Search(bench, losses, drop, decision, "max_drop", max_drop, say)
        search.within_drop()
    else:
        assert latency is not None
        search = _Search(bench, losses, drop, decision, "latency", latency, say)
        search.within_latency()
    return search.plan(given)


@dataclass
class _Search:
    bench: Bench
    losses: Sensitivity
    drop: Drop
    decision: Decision
    asks: Asks
    limit: float
    say: Callable[[str], None]
    tried: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        fixed = self.decision.float_layers
        self.free = [
            one for one in self.losses.layers if one.layer and not _inside(one.layer, fixed)
        ]
        told = self.decision.times
        usual = float(np.mean([was - now for was, now in told.values()])) if told else 1.0
        times = [told.get(one.layer, (usual, 0.0)) for one in self.free]
        self.parts = [np.array([one.loss, 0.0]) for one in self.free]
        self.costs = [Cost(i, None, np.array([now, was])) for i, (was, now) in enumerate(times)]

    def within_drop(self) -> None:
        """Gives back time until the limit is kept, then halves the last step."""
        if self.decision.all_float or self.attempt(0.0).kept:
            return
        broken = 0.0
        for share in WALK:
            if self.attempt(share).kept:
                self.halve(broken, share)
                break
            broken = share

    def within_latency(self) -> None:
        """Gives back as much time as layers' times say, then halves towards the limit."""
        if self.decision.all_float or not self.attempt(0.0).kept:
            raise UsageError(
                f"mixed: in int8 the network takes {self.decision.ratio:.0%} of float's time at "
                f"best on this machine, more than the {self.limit:.0%} asked for"
            )
        fastest = self.tried[0]
        spare = (self.limit - fastest.ratio) / (1 - fastest.ratio)
        guess = min(spare, 1.0)
        kept = self.attempt(guess).kept
        self.halve(*((1.0, guess) if kept else (guess, 0.0)))

    def halve(self, broken: float, kept: float) -> None:
        """Narrows down between a share that breaks the limit and one that keeps it."""
        for _ in range(HALVINGS):
            middle = (broken + kept) / 2
            if self.attempt(middle).kept:
                kept = middle
            else:
                broken = middle

    def attempt(self, share: float) -> Trial:
        """Measures the arrangement that should lose least for a share of the saved time."""
        chosen = self.solved(share) if share else [0] * len(self.free)
        more = tuple(one.layer for one, i in zip(self.free, chosen, strict=True) if i)
        layers = (*self.decision.float_layers, *more)
        for trial in self.tried:
            if trial.float_layers == layers:
                return trial
        drop, ratio = self.drop(layers), self.bench.ratio(layers) if more else self.fastest
        lost = float(sum(loss[i] for loss, i in zip(self.parts, chosen, strict=True)))
        figures = (drop.value, drop.low, drop.high, ratio.value, ratio.low, ratio.high)
        kept = self.keeps(drop.value, ratio)
        self.tried.append(Trial(layers, share, lost, *figures, kept))
        self.say(
            f"{len(layers)} layers in float: the metric drops by {drop.value:.4f} ({drop.low:.4f} "
            f"to {drop.high:.4f}), {ratio.value:.2f} of float's time"
        )
        return self.tried[-1]

    @property
    def fastest(self) -> Ratio:
        """As `decide` measured it."""
        found = self.decision
        return Interval(found.ratio, found.low, found.high, "paired bootstrap")

    def solved(self, share: float) -> list[int]:
        """By free layer: 0 for int8, 1 for float."""
        least, most = (cost_of([i] * len(self.parts), self.costs) for i in (0, 1))
        cheapest = sum(min(cost.table) for cost in self.costs)
        return solve(
            self.parts, self.costs, max(least + share * (most - least), cheapest) + ROUNDING
        )

    def keeps(self, drop: float, ratio: Ratio) -> bool:
        if self.asks == "latency":
            return ratio.value <= self.limit
        return drop <= self.limit and ratio.value < 1 and ratio.high <= LIMIT

    def plan(self, given: tuple[str, ...]) -> PrecisionPlan:
        kept = [i for i, trial in enumerate(self.tried) if trial.kept]
        best: Callable[[Trial], float] = {
            "max_drop": lambda trial: trial.ratio,
            "latency": lambda trial: trial.loss,
        }[self.asks]
        chosen = min(kept, key=lambda i: best(self.tried[i]), default=None)
        layers = ("*",) if chosen is None else self.tried[chosen].float_layers
        why = self.why(chosen)
        self.say(why)
        return PrecisionPlan(
            self.asks,
            self.limit,
            self.losses.unit,
            self.losses.examples,
            self.rows(layers, given),
            self.tried,
            chosen,
            layers,
            why,
        )

    def why(self, chosen: int | None) -> str:
        """The choice in a sentence."""
        if self.decision.all_float:
            return f"everything stays float: {self.decision.why['*']}"
        if chosen is None:
            return (
                "everything stays float: no arrangement that is faster keeps the drop on "
                f"validation within {self.limit:g}"
            )
        trial = self.tried[chosen]
        aim = {"max_drop": "the fastest that keeps the drop", "latency": "what loses least"}
        count = len(trial.float_layers)
        stay = "1 layer stays" if count == 1 else f"{count} layers stay"
        return (
            f"{stay} float: {trial.ratio:.2f} of float's time, "
            f"{aim[self.asks]} of {len(self.tried)} tried"
        )

    def rows(self, layers: tuple[str, ...], given: tuple[str, ...]) -> list[LayerPrecision]:
        known = {one.layer: one for one in self.losses.layers}
        named = [layer for layer in given if layer not in known and layer != "*"]
        total = sum(one.loss for one in known.values()) or 1.0
        rows = []
        for layer in (*named, *known):
            stays = "*" in layers or _inside(layer, layers)
            loss = known.get(layer)
            was, now = self.decision.times.get(layer, (None, None))
            rows.append(
                LayerPrecision(
                    layer,
                    "float" if stays else "int8",
                    loss.loss if loss else None,
                    loss.error if loss else None,
                    was,
                    now,
                    self.reason(layer, layers, loss.loss / total if loss else 0.0),
                )
            )
        return rows

    def reason(self, layer: str, layers: tuple[str, ...], share: float) -> str:
        """Why a layer is what it is. share: of all layers' summed losses, its own."""
        said = next((why for kept, why in self.decision.why.items() if _inside(layer, (kept,))), "")
        if said or "*" in layers:
            return said or "with the whole network"
        was, now = self.decision.times.get(layer, (0.0, 0.0))
        saves = f"int8 saves {was - now:.0f} µs" if was else "its time isn't told"
        return f"{share:.0%} of what all layers lose in int8; {saves}"


def _inside(layer: str, paths: tuple[str, ...]) -> bool:
    """Whether a layer is one of these modules, or in one."""
    return any(path in ("*", layer) or layer.startswith(path + ".") for path in paths)
