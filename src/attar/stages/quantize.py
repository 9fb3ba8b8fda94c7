"""The stage that makes the network compute in int8."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from attar.errors import UsageError
from attar.quantize.bench import RuntimeBench
from attar.quantize.cpu import WeightBits, safe_on, weight_bits
from attar.quantize.edit import Scheme
from attar.quantize.fallback import Decision, decide, telling
from attar.quantize.on_grid import OnGrid
from attar.quantize.post_training import quantize, shared_grids
from attar.quantize.ranges import ranges
from attar.registry import near
from attar.runtimes.base import runtimes
from attar.stages.base import Context, Stage, stages
from attar.student import Student
from attar.training.config import Training

CALIBRATION_BATCH = 64


@stages.register("quantize")
class Quantize(Stage):
    """Computes in int8 where that is faster: uint8 activations, int8 weights with a scale an output
    channel, calibrated after training on a look at training examples.

    The graph is made for the deploy runtime, so that it fuses into int8 kernels completely. Layers
    that are measured to lose compute in float, and if int8 is slower as a whole, everything does;
    their weights are stored in 8 bits all the same, which costs no time.
    """

    name: ClassVar[str] = "quantize"
    not_after: ClassVar[dict[str, str]] = {
        "quantize": "it is quantized already; one quantize stage says all there is to say"
    }

    scheme: Literal["int8"] = "int8"
    method: Literal["ptq"] = "ptq"
    """Post-training: no example is trained on."""
    calibration: int = Field(512, ge=1)
    """Training examples to look at, not augmented; memory doesn't grow with them."""
    observer: str = "mse"
    """How a grid's range is chosen from what was seen: `mse` (least squared error), `entropy`
    (least KL divergence), `percentile` (all but the outermost values) or `minmax`."""
    weight_bits: WeightBits | Literal["auto"] = "auto"
    """8, or 7 where 8-bit products overflow: x86 without VNNI. `auto` asks this machine; 7 is safe
    anywhere."""
    float_layers: list[str] = Field(default_factory=list)
    """Layers that compute in float, by path, with all inside them; `*` stands for anything."""
    recover: Training | None = None
    """Fine-tuning against the teacher with the weights rounded to their grid in every step, before
    the activations' grids are chosen; the network itself stays float."""
    fallback: Literal["auto", "off"] = "auto"
    """`auto`: layers that lose time in int8 compute in float, as measured in the runtime. `off`:
    only `float_layers` do."""

    @property
    def measures_runtime(self) -> bool:
        return True

    @model_validator(mode="after")
    def _consistent(self) -> Quantize:
        ranges.get(self.observer)
        return self

    def apply(self, student: Student, run: Context) -> Student:
        layers = _matching(self.float_layers, student)
        scheme = Scheme(
            runtime=run.runtime,
            weight_bits=weight_bits(self.weight_bits),
            float_layers=layers,
            observer=self.observer,
            calibration=min(self.calibration, len(run.data.train)),
        )
        made: dict[tuple[str, ...], Student] = {}

        def quantized(float_layers: tuple[str, ...]) -> Student:
            if float_layers not in made:
                arrangement = replace(scheme, float_layers=float_layers)
                made[float_layers] = self._quantized(student, arrangement, run)
            return made[float_layers]

        run.found.update(
            weight_bits=scheme.weight_bits,
            safe_on=safe_on(scheme.weight_bits),
            observer=self.observer,
            calibration=scheme.calibration,
        )
        if self.fallback == "off" or "*" in layers:
            said = [{"layer": layer, "why": "the recipe says so"} for layer in layers]
            run.found["float_layers"] = said
        else:
            decision = self._decided(quantized, layers, run)
            run.found.update(decision.found())
            layers = decision.float_layers
        if self.recover is None:
            return quantized(layers)
        recovered = self._recovered(student, self.recover, scheme.weight_bits, run)
        return self._quantized(recovered, replace(scheme, float_layers=layers), run)

    def _recovered(self, student: Student, training: Training, bits: int, run: Context) -> Student:
        shared = shared_grids(student)
        return run.train(
            student, training, wrap=lambda inner: OnGrid(inner, bits=bits, per_tensor=shared)
        )

    def _decided(
        self,
        quantized: Callable[[tuple[str, ...]], Student],
        layers: tuple[str, ...],
        run: Context,
    ) -> Decision:
        example = run.task.example(run.data)
        batch = next(iter(run.data.validation.batches(run.batch)))
        arguments, _ = run.task.arguments(batch)
        tell = telling(run.tell)
        with tempfile.TemporaryDirectory() as folder:
            bench = RuntimeBench(
                runtimes.get(run.runtime)(),
                quantized,
                Path(folder),
                example=example,
                dynamic_shapes=run.task.dynamic_shapes(example),
                inputs=tuple(x.numpy() for x in arguments),
                threads=run.threads,
            )
            decision = decide(bench, layers, tell)
        for layer in decision.float_layers:
            whole = layer == "*"
            tell(f"{'every layer' if whole else layer} stays float: {decision.why[layer]}")
        return decision

    def _quantized(self, student: Student, scheme: Scheme, run: Context) -> Student:
        def examples() -> Iterator[tuple[Any, ...]]:
            # Shuffled by the seed: a folder of images comes class by class.
            seen = 0
            size = min(CALIBRATION_BATCH, scheme.calibration)
            for batch in run.data.train.batches(size, shuffle=True, seed=run.seed):
                arguments, _ = run.task.arguments(batch)
                yield tuple(x[: scheme.calibration - seen] for x in arguments)
                seen += len(batch.indices)
                if seen >= scheme.calibration:
                    return

        example = run.task.example(run.data)
        shapes = run.task.dynamic_shapes(example)
        return quantize(student, scheme, examples(), example=example, dynamic_shapes=shapes)


def _matching(patterns: list[str], student: Student) -> tuple[str, ...]:
    """The modules that patterns name. Raises `UsageError` for one that names none."""
    if "*" in patterns:
        return ("*",)
    paths = [path for path, _ in student.module.named_modules() if path]
    found: dict[str, None] = {}
    for pattern in patterns:
        matching = fnmatch.filter(paths, pattern)
        if not matching:
            raise UsageError(
                f"float_layers: the student has no layer {pattern!r}{near(pattern, paths)}"
            )
        found.update(dict.fromkeys(matching))
    return tuple(found)
