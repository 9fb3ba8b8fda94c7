"""The stage that quantizes the network: what a recipe says of it."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from attar.errors import UsageError
from attar.quantize.cpu import WeightBits
from attar.quantize.ranges import ranges
from attar.registry import near
from attar.runtimes.base import Runtime
from attar.stages.base import Context, Stage, stages
from attar.stages.recovery import Recovery
from attar.student import Student
from attar.units import parse_amount, parse_share

SchemeName = Literal["int8", "int8-dynamic", "int8-weights", "int4-weights", "float16", "bfloat16"]
STATIC, ON_GRIDS = ("int8",), ("int8-weights", "int4-weights")
OF: dict[str, tuple[str, ...]] = {
    "calibration": STATIC,
    "observer": STATIC,
    "weight_bits": (*STATIC, "int8-dynamic"),
    "group": ON_GRIDS,
    "equalise": STATIC,
    "smooth": (*STATIC, "int8-dynamic"),
    "rounding": (*STATIC, *ON_GRIDS),
    "correct_biases": STATIC,
    "mixed": STATIC,
    "recover": (*STATIC, *ON_GRIDS),
    "freeze": STATIC,
    "steps": STATIC,
    "fallback": (*STATIC, "int8-dynamic"),
    "inside": STATIC,
}
"""By setting: the schemes that it is for. Those that aren't here are for all."""


class Mixed(BaseModel):
    """What layers that lose most are kept in float for: give one of the two."""

    model_config = ConfigDict(extra="forbid")

    max_drop: Annotated[float, BeforeValidator(parse_share)] | None = None
    """How much of the metric may be lost on validation, absolute: the fastest that keeps to it."""
    latency_ms: Annotated[float | str, BeforeValidator(parse_amount)] | None = None
    """Milliseconds of an answer, or a share of float's, as `80%`: what loses least within it."""

    @model_validator(mode="after")
    def _one(self) -> Mixed:
        if (self.max_drop is None) == (self.latency_ms is None):
            raise ValueError("give max_drop or latency_ms, one of them")
        return self


@stages.register("quantize")
class Quantize(Stage):
    """Computes in int8 where that is faster, or stores weights in fewer bits.

    `int8`: uint8 activations on grids chosen after training on a look at training examples, int8
    weights with a scale an output channel; made for the deploy runtime, so that it fuses into int8
    kernels completely. Layers that are measured to lose time compute in float, and if int8 is
    slower as a whole, everything does; their weights are stored in 8 bits all the same.
    `int8-dynamic`: linear layers in int8, their inputs' grids chosen in every call. `int8-weights`,
    `int4-weights`, `float16`, `bfloat16`: weights stored so, computed with in float.
    """

    name: ClassVar[str] = "quantize"
    not_after: ClassVar[dict[str, str]] = {
        "quantize": "it is quantized already; one quantize stage says all there is to say"
    }

    scheme: SchemeName = "int8"
    method: Literal["ptq", "qat"] = "ptq"
    """`ptq`: after training. `qat`: trained, as `recover` says, through the very graph that is
    exported, grids included."""
    calibration: int = Field(512, ge=1)
    """Training examples to look at, not augmented; memory doesn't grow with them."""
    observer: str = "mse"
    """How a grid's range is chosen from what was seen: `mse` (least squared error), `entropy`
    (least KL divergence), `percentile` (all but the outermost values), `moving-average` (of each
    batch's extremes) or `minmax`."""
    weight_bits: WeightBits | Literal["auto"] = "auto"
    """8, or 7 where 8-bit products overflow: x86 without VNNI. `auto` asks this machine; 7 is safe
    anywhere."""
    group: int | None = Field(None, ge=2)
    """How many weights of a row share a scale. Default: 32 for `int4-weights` after training, else
    all of them."""
    float_layers: list[str] = Field(default_factory=list)
    """Layers that compute in float, by path, with all inside them; `*` stands for anything."""
    equalise: bool = False
    """First make each channel's weights as large where it is made as where it is read
    (cross-layer equalisation)."""
    smooth: float | None = Field(None, ge=0, le=1)
    """First move outliers of linear layers' inputs into their weights (SmoothQuant): how much of
    the difficulty, such as 0.5."""
    rounding: Literal["nearest", "adaptive"] = "nearest"
    """`adaptive`: each weight up or down, so that its layer answers best (AdaRound)."""
    correct_biases: bool = False
    """At the end, give each layer the mean answer that it has in float."""
    mixed: Mixed | None = None
    """Keep layers in float that lose most: `{max_drop: 0.2%}` or `{latency_ms: 80%}`."""
    recover: Recovery | None = None
    """Training against the teacher. With `ptq` the weights are rounded to their grid in every step,
    before the activations' grids are chosen; with `qat`, activations too."""
    freeze: float = Field(0.3, ge=0, lt=1)
    """With `qat`: the share of the epochs after which batch norms are folded and frozen, and grids
    learned with the rest."""
    steps: Literal["learned", "fixed"] = "learned"
    """With `qat`: whether grids' steps are learned (LSQ)."""
    fallback: Literal["auto", "off"] = "auto"
    """`auto`: layers that lose time in int8 compute in float, as measured in the runtime. `off`:
    only `float_layers` do."""
    inside: bool = True
    """Look inside afterwards: the time of each operator, what stayed float and why, each layer's
    noise."""

    @property
    def measures_runtime(self) -> bool:
        return True

    def suits(self, runtime: type[Runtime]) -> None:
        runtime.require_scheme(self.scheme)

    @property
    def files(self) -> list[Path]:
        return self.recover.files if self.recover is not None else []

    @model_validator(mode="after")
    def _for_its_scheme(self) -> Quantize:
        ranges.get(self.observer)
        for field, schemes in OF.items():
            if self.scheme not in schemes and self._says(field):
                raise ValueError(
                    f"{field} is for scheme {' or '.join(schemes)}, not for {self.scheme}: "
                    "leave it out"
                )
        return self

    @model_validator(mode="after")
    def _trains(self) -> Quantize:
        if self.method == "qat":
            if self.scheme not in OF["recover"]:
                raise ValueError(f"method: qat is for scheme {' or '.join(OF['recover'])}")
            if self.recover is None:
                raise ValueError("method: qat trains: give recover, such as {epochs: 3}")
            if self.group is not None:
                raise ValueError("group is for method: ptq: training learns a scale a row")
            if self.rounding == "adaptive" or self.correct_biases:
                raise ValueError(
                    "rounding: adaptive and correct_biases are for method: ptq; training does it"
                )
            return self
        for field in ("freeze", "steps"):
            if self._says(field):
                raise ValueError(f"{field} is for method: qat")
        if self.recover is not None and self.scheme in ON_GRIDS:
            raise ValueError(f"{self.scheme} is trained with method: qat")
        return self

    @model_validator(mode="after")
    def _decides(self) -> Quantize:
        if self.mixed is not None and (self.fallback == "off" or "*" in self.float_layers):
            raise ValueError("mixed chooses what stays float: leave fallback and float_layers: '*'")
        return self

    def _says(self, field: str) -> bool:
        """Whether the recipe asks for something else than the default."""
        return bool(getattr(self, field) != type(self).model_fields[field].get_default())

    @property
    def training_epochs(self) -> int:
        """How many epochs it trains."""
        return self.recover.epochs if self.recover is not None else 0

    def apply(self, student: Student, run: Context) -> Student:
        from attar.stages.quantizing.static import StaticInt8
        from attar.stages.quantizing.weights import quantized_dynamically, quantized_weights

        layers = matching(self.float_layers, student)
        run.found["scheme"] = self.scheme
        if self.scheme == "int8":
            return StaticInt8(self, run).quantized(student, layers)
        if self.scheme == "int8-dynamic":
            return quantized_dynamically(self, student, layers, run)
        return quantized_weights(self, student, layers, run)


def matching(patterns: list[str], student: Student) -> tuple[str, ...]:
    """The modules that patterns name. Raises `UsageError` for one that names none."""
    if "*" in patterns:
        return ("*",)
    paths = [path for path, _ in student.module.named_modules() if path]
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(paths, pattern)
        if not names:
            raise UsageError(
                f"float_layers: the student has no layer {pattern!r}{near(pattern, paths)}"
            )
        found.update(dict.fromkeys(names))
    return tuple(found)
