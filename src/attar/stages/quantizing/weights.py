"""How the quantize stage makes networks whose weights alone lie on grids, or whose inputs' grids
are chosen in every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from attar.errors import UsageError
from attar.quantize.cpu import safe_on, weight_bits
from attar.quantize.dynamic import quantize_dynamically
from attar.quantize.on_grid import OnLearnedGrid
from attar.quantize.post_training import shared_grids
from attar.quantize.rounding import round_weights
from attar.quantize.settling import settle_weights
from attar.quantize.smoothing import smooth
from attar.quantize.weight_only import BITS, Kernel, Precision, WeightsQuantized, quantize_weights
from attar.quantize.weight_scales import LIMITS, spread
from attar.runtimes.base import runtimes
from attar.runtimes.onnx_weights import BLOCKS
from attar.runtimes.target import Target
from attar.stages.base import Context
from attar.stages.quantizing import calibration, decided, runtime_bench, traced
from attar.student import Student

if TYPE_CHECKING:
    from attar.stages.quantize import Quantize

GROUP = 32
"""How many 4-bit weights share a scale, where nothing else is said and they aren't trained."""
LOOKED_AT = 1024
"""Training examples that rounding and smoothing look at."""


def quantized_weights(
    stage: Quantize, student: Student, float_layers: tuple[str, ...], run: Context
) -> Student:
    """The student with its weights in fewer bits, computed with in float."""
    runtimes.get(run.runtime).require_scheme(stage.scheme)
    if "*" in float_layers:
        raise UsageError(f"float_layers: '*' leaves nothing for scheme {stage.scheme}")
    precision, group = cast(Precision, stage.scheme.removesuffix("-weights")), stage.group
    if group is None and precision == "int4" and stage.method == "ptq":
        group = GROUP
    common: dict[str, Any] = {
        **traced(run),
        "runtime": run.runtime,
        "group": group,
        "float_layers": float_layers,
    }
    bits, grids = BITS[precision], None
    result = quantize_weights(student, precision, **common)
    if stage.method == "qat":
        student, grids = _trained(stage, student, result, bits, run)
        result = quantize_weights(student, precision, grids=grids, **common)
    if stage.rounding == "adaptive":
        grids = result.edits[-1].tensors()
        steps = {
            path: (spread(student.module.get_parameter(path), scale, group), LIMITS[bits])
            for path, scale in grids.items()
        }
        examples = calibration(run, LOOKED_AT)
        student, run.found["rounded"] = round_weights(student, steps, examples, **traced(run))
        result = quantize_weights(student, precision, grids=grids, **common)
    run.found["bits"] = bits
    if group not in BLOCKS or precision != "int4" or run.runtime != "onnxruntime":
        return result
    integers = quantize_weights(student, precision, grids=grids, kernel="matmulnbits", **common)
    return _faster({"expanded": result, "matmulnbits": integers}, run)


def _trained(
    stage: Quantize, student: Student, stored: Student, bits: int, run: Context
) -> tuple[Student, dict[str, Tensor]]:
    """The student trained with its weights on grids of so many bits, and the grids' steps. stored:
    the same, stored without training."""
    assert stage.recover is not None
    (edit,) = (e for e in stored.edits if isinstance(e, WeightsQuantized))
    trained, objective = stage.recover.through(
        student,
        run,
        lambda inner: OnLearnedGrid(
            inner,
            student.module,
            bits=bits,
            weights=edit.weights,
            per_tensor=shared_grids(student),
        ),
    )
    return trained, objective.scales()


def _faster(students: dict[Kernel, Student], run: Context) -> Student:
    """Of files of the same weights, the one that answers faster here."""
    example, batch = run.task.example(run.data), next(iter(run.data.validation.batches(run.batch)))
    arguments, _ = run.task.arguments(batch)
    manifest = run.task.describe(run.data)
    target = Target(
        runtimes.get(run.runtime)(),
        example,
        run.task.dynamic_shapes(example),
        ([i["name"] for i in manifest["inputs"]], [o["name"] for o in manifest["outputs"]]),
        tuple(x.numpy() for x in arguments),
        run.threads,
    )
    times = {kernel: target.latency_ms(student) for kernel, student in students.items()}
    kernel = min(times, key=times.__getitem__)
    run.found["kernel"] = {"chosen": kernel, **{f"{k}_ms": ms for k, ms in times.items()}}
    return students[kernel]


def quantized_dynamically(
    stage: Quantize, student: Student, float_layers: tuple[str, ...], run: Context
) -> Student:
    """The student with linear layers in int8 where that is measured to be faster; else with its
    weights stored in 8 bits."""
    runtimes.get(run.runtime).require_scheme(stage.scheme)
    bits, how = weight_bits(stage.weight_bits), traced(run)
    run.found.update(weight_bits=bits, safe_on=safe_on(bits))
    if stage.smooth is not None:
        examples = calibration(run, LOOKED_AT)
        student, record = smooth(student, examples, alpha=stage.smooth, **how)
        run.found["smoothed"] = record

    def settled(layers: tuple[str, ...]) -> Student:
        found = quantized(layers)
        return found if "*" in layers else settle_weights(found, **how)

    def quantized(layers: tuple[str, ...]) -> Student:
        if "*" in layers:
            return quantize_weights(student, "int8", runtime=run.runtime, **how)
        return quantize_dynamically(
            student, runtime=run.runtime, weight_bits=bits, float_layers=layers, **how
        )

    if stage.fallback == "off" or "*" in float_layers:
        return settled(float_layers)
    with runtime_bench(run, quantized) as bench:
        decision = decided(bench, float_layers, run)
    return settled(decision.float_layers)
