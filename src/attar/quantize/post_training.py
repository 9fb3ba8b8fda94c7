"""Post-training quantization: grids chosen from a look at examples, no training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attar.quantize.edit import Grids, Quantized, Scheme
from attar.student import Student
from attar.student.fingerprint import weights_sha256


def quantize(
    student: Student,
    scheme: Scheme,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> Student:
    """The student with a `Quantized` edit, calibrated on `examples`.

    examples: argument tuples, batch first, seen once in order; memory doesn't grow with them.
    example, dynamic_shapes: what the network is traced with (`Task.example`). Weights that share a
    codebook get one scale a tensor, so that equal ones stay equal.

    Raises `DataError` for examples with NaN or infinity, or for none; `ExportError` for a network
    that can't be traced.

    Example:
        >>> batches = ((b.inputs,) for b in split.batches(64))       # doctest: +SKIP
        >>> small = quantize(                                        # doctest: +SKIP
        ...     student, Scheme(), batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    seen = [example] if scheme.all_float else examples  # weights alone need no look at data
    grids = _grids(student, scheme, seen, example, dynamic_shapes)
    return student.edited(Quantized(scheme, grids, weights_sha256(student.module)))


def _grids(
    student: Student,
    scheme: Scheme,
    examples: Iterable[tuple[Any, ...]],
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> Grids:
    from attar.quantize.calibration import look, settle
    from attar.quantize.pt2e import grids_of, prepare

    prepared = prepare(student.module, example, dynamic_shapes, scheme)
    look(prepared, examples)
    paths = shared_grids(student)
    settle(prepared, {p: student.module.get_parameter(p).detach().cpu() for p in paths})
    return {key: (grid.scale, grid.zero_point) for key, grid in grids_of(prepared).items()}


def shared_grids(student: Student) -> set[str]:
    """The weights, by path, that get one scale a tensor: their equal values must stay equal."""
    return {path for edit in student.edits for path in getattr(edit, "per_tensor_weights", set)()}
