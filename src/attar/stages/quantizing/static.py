"""How the quantize stage makes a static int8 network: decide what stays float, train, calibrate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attar.quantize.aware import quantize_aware
from attar.quantize.bench import RuntimeBench
from attar.quantize.bias_correction import correct_biases
from attar.quantize.clipping import fit, remarks
from attar.quantize.cpu import safe_on, weight_bits
from attar.quantize.edit import Scheme
from attar.quantize.equalising import equalise
from attar.quantize.fallback import telling
from attar.quantize.inside import look_inside
from attar.quantize.mixed import plan
from attar.quantize.on_grid import OnGrid
from attar.quantize.post_training import quantize, shared_grids
from attar.quantize.precision_plan import PrecisionPlan
from attar.quantize.rounding import round_adaptively
from attar.quantize.sensitivity import sensitivity
from attar.quantize.settling import settle_weights
from attar.quantize.smoothing import smooth
from attar.stages.base import Context
from attar.stages.quantizing import calibration, decided, runtime_bench, spread_over, traced
from attar.store import write_whole
from attar.student import Student
from attar.tasks.intervals import metric_drop
from attar.training.evaluation import statistics_of

if TYPE_CHECKING:
    from attar.stages.quantize import Mixed, Quantize

LOOKED_AT = 64
"""Validation examples on which noise and clipping are measured."""
SENSED = 512
"""Validation examples on which it is measured what each layer loses."""


class StaticInt8:
    """One application of the stage with scheme int8."""

    def __init__(self, stage: Quantize, run: Context) -> None:
        self.stage, self.run = stage, run
        self.traced = traced(run)
        self.scheme = Scheme(
            runtime=run.runtime,
            weight_bits=weight_bits(stage.weight_bits),
            observer=stage.observer,
            calibration=min(stage.calibration, len(run.data.train)),
        )
        self.why: dict[str, str] = {}
        self._made: dict[tuple[str, ...], Student] = {}

    def quantized(self, student: Student, given: tuple[str, ...]) -> Student:
        """The student in int8, but for what the recipe gives and measuring finds."""
        self.run.found.update(
            weight_bits=self.scheme.weight_bits,
            safe_on=safe_on(self.scheme.weight_bits),
            observer=self.stage.observer,
            calibration=self.scheme.calibration,
        )
        student = self._prepared(student)
        with runtime_bench(self.run, lambda layers: self._as_calibrated(student, layers)) as bench:
            layers = self._in_float(student, given, bench)
            result = self._computed(student, layers)
            if self.stage.inside:
                self._look(result, layers, given, bench)
        return settle_weights(result, **self.traced)

    def _prepared(self, student: Student) -> Student:
        """The student with weights that lie better on grids, its answers the same."""
        if self.stage.equalise:
            student, record = equalise(student, self._examples(), **self.traced)
            self.run.found["equalised"] = record
        if self.stage.smooth is not None:
            student, record = smooth(
                student, self._examples(), alpha=self.stage.smooth, **self.traced
            )
            self.run.found["smoothed"] = record
        return student

    def _in_float(
        self, student: Student, given: tuple[str, ...], bench: RuntimeBench
    ) -> tuple[str, ...]:
        """What stays float: as the recipe says, or as was measured."""
        if self.stage.mixed is not None:
            return self._planned(student, given, bench, self.stage.mixed)
        if self.stage.fallback == "off" or "*" in given:
            said = [{"layer": layer, "why": "the recipe says so"} for layer in given]
            self.run.found["float_layers"] = said
            return given
        decision = decided(bench, given, self.run)
        self.why = decision.why
        return decision.float_layers

    def _planned(
        self, student: Student, given: tuple[str, ...], bench: RuntimeBench, mixed: Mixed
    ) -> tuple[str, ...]:
        """As a plan of layers' precision says, which a killed stage goes on with."""
        file = self.run.work / "precision.json"
        if file.exists():
            found = PrecisionPlan.from_json(json.loads(file.read_text(encoding="utf-8")))
        else:
            found = self._plan(student, given, bench, mixed)
            write_whole(file, json.dumps(found.to_json()))
        self.run.found["precision"] = found.to_json()
        self.why = {one.layer: one.why for one in found.layers}
        return found.float_layers

    def _plan(
        self, student: Student, given: tuple[str, ...], bench: RuntimeBench, mixed: Mixed
    ) -> PrecisionPlan:
        task, validation = self.run.task, self.run.data.validation
        before = statistics_of(student.module, validation, task)
        losses = sensitivity(
            self._as_calibrated(student, ()),
            self._as_calibrated(student, ("*",)),
            spread_over(validation, SENSED),
            task,
            **self.traced,
        )
        return plan(
            bench,
            losses,
            lambda layers: metric_drop(task, before, bench.statistics(layers, validation, task)),
            max_drop=mixed.max_drop,
            latency=self._share(mixed.latency_ms, bench),
            given=given,
            tell=telling(self.run.tell),
        )

    def _share(self, latency: float | str | None, bench: RuntimeBench) -> float | None:
        """A latency as a share of float's."""
        if isinstance(latency, str):
            return float(latency.rstrip("%")) / 100
        return None if latency is None else latency / bench.milliseconds(("*",))

    def _computed(self, student: Student, layers: tuple[str, ...]) -> Student:
        """The student in int8 with these layers in float, trained as the recipe says."""
        stage, scheme, recover = self.stage, self.scheme_of(layers), self.stage.recover
        if stage.method == "qat" and recover is not None and not scheme.all_float:
            return quantize_aware(
                student,
                scheme,
                lambda wrap: recover.recovered(student, self.run, wrap=wrap),
                self._examples,
                freeze=stage.freeze,
                steps=stage.steps,
                **self.traced,
            )
        if recover is not None:
            shared = shared_grids(student)
            student = recover.recovered(
                student,
                self.run,
                wrap=lambda inner: OnGrid(inner, bits=scheme.weight_bits, per_tensor=shared),
            )
            self._made.clear()
        if scheme.all_float:
            return self._as_calibrated(student, layers)
        if stage.rounding == "adaptive":
            student, record = round_adaptively(student, scheme, self._examples(), **self.traced)
            self.run.found["rounded"] = record
            self._made.clear()
        result = self._as_calibrated(student, layers)
        if stage.correct_biases:
            result, record = correct_biases(result, self._examples(), **self.traced)
            self.run.found["corrected"] = record
        return result

    def _look(
        self,
        result: Student,
        layers: tuple[str, ...],
        given: tuple[str, ...],
        bench: RuntimeBench,
    ) -> None:
        """What is inside, for the report; and what calibration didn't see, told."""
        found = look_inside(bench, layers, self.why, self._looked_at(), given=given, student=result)
        if found:
            self.run.found["inside"] = found
        if "*" in layers:
            return
        seen = fit(result, self._examples(), **self.traced)
        for remark in remarks(fit(result, self._looked_at(), **self.traced), seen):
            self.run.tell({"event": "note", "text": f"quantize: {remark}"})
            self.run.found.setdefault("remarks", []).append(remark)

    def scheme_of(self, layers: tuple[str, ...]) -> Scheme:
        """The scheme with these layers in float."""
        return replace(self.scheme, float_layers=layers)

    def _as_calibrated(self, student: Student, layers: tuple[str, ...]) -> Student:
        """The student after a look at examples, made once for each arrangement."""
        if layers not in self._made:
            self._made[layers] = quantize(
                student, self.scheme_of(layers), self._examples(), **self.traced
            )
        return self._made[layers]

    def _examples(self) -> Iterator[tuple[Any, ...]]:
        """Training examples to calibrate on."""
        return calibration(self.run, self.scheme.calibration)

    def _looked_at(self) -> Iterator[tuple[Any, ...]]:
        """Validation examples to look at."""
        for batch in spread_over(self.run.data.validation, LOOKED_AT):
            yield self.run.task.arguments(batch)[0]
