"""Bias correction: what rounding shifts in a layer's mean answers goes back into its bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attar.errors import DataError, UsageError
from attar.quantize.edit import Quantized
from attar.runtimes.aten import operator
from attar.student import Student


def correct_biases(
    student: Student,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> tuple[Student, dict[str, Any]]:
    """The quantized student with each layer's mean answer as in float, and what was done.

    For each output channel, the mean over examples and positions of the float layer's answer minus
    the quantized layer's is added to its bias (before any ReLU). Both networks run together over
    the examples, once: a batch's shift is taken out before the next layer sees it, so that a later
    layer isn't corrected for what an earlier one's correction has mended, and the correction is
    the mean over batches, weighed by their size. Memory doesn't grow with the examples.

    An earlier correction is replaced.

    examples: argument tuples, batch first; those of the calibration will do. The record: `layers`,
    how many were corrected, `largest`, the largest shift of any, as a share of the layer's mean
    magnitude, and `where`, its key. Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2
    (empirical; there on one batch).

    Raises `UsageError` for a student that isn't quantized, `DataError` for no examples.

    Example:
        >>> student, record = correct_biases(  # doctest: +SKIP
        ...     student, batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    from attar.quantize.side_by_side import SideBySide

    edit = quantization_of(student)
    prepared = edit.prepared(student.module, example, dynamic_shapes, corrected=False)
    shifts = _Shifts()
    both = SideBySide(prepared, shifts.taken_out)
    with torch.no_grad():
        for arguments in examples:
            shifts.weight = len(arguments[0])
            both.run(*arguments)
    if not shifts.weight:
        raise DataError("bias correction needs examples, and there are none")
    corrected = Quantized(edit.scheme, edit.grids, edit.weights_sha256, shifts.means())
    edits = [corrected if e is edit else e for e in student.edits]
    return Student(student.module, student.spec, edits), shifts.record()


def quantization_of(student: Student) -> Quantized:
    """The edit that made the student int8. Raises `UsageError` where there is none."""
    for edit in reversed(student.edits):
        if isinstance(edit, Quantized):
            return edit
    raise UsageError("the student is not quantized: call `quantize` first")


class _Shifts:
    """Sums over batches of what each layer's mean answer is off by, a channel."""

    def __init__(self) -> None:
        self.weight = 0
        self._sums: dict[str, Tensor] = {}
        self._magnitudes: dict[str, float] = {}
        self._weights: dict[str, int] = {}

    def taken_out(self, layer: Any) -> Tensor:
        """The quantized layer's answer with the float one's means."""
        channel = -1 if operator(layer.node) == "linear" else 1
        in_float, quantized = layer.answers.in_float, layer.answers.quantized
        shift = _means(in_float, channel) - _means(quantized, channel)
        self._add(layer.key, shift, float(in_float.abs().double().mean()))
        shape = [1] * quantized.dim()
        shape[channel] = -1
        return quantized + shift.to(quantized.dtype).reshape(shape)

    def means(self) -> dict[str, Tensor]:
        """The mean shifts by layer, float32 (channels,)."""
        return {key: (total / self._weights[key]).float() for key, total in self._sums.items()}

    def record(self) -> dict[str, Any]:
        """As JSON for the report."""
        shares = {
            key: float(shift.abs().max()) * self._weights[key] / (self._magnitudes[key] or 1.0)
            for key, shift in self.means().items()
        }
        where = max(shares, key=lambda key: shares[key], default=None)
        return {
            "layers": len(shares),
            "largest": round(shares[where], 6) if where is not None else 0.0,
            "where": where,
        }

    def _add(self, key: str, shift: Tensor, magnitude: float) -> None:
        self._sums[key] = self._sums.get(key, 0) + self.weight * shift
        self._magnitudes[key] = self._magnitudes.get(key, 0.0) + self.weight * magnitude
        self._weights[key] = self._weights.get(key, 0) + self.weight


def _means(answers: Tensor, channel: int) -> Tensor:
    """The means over all but the channels, float64 (channels,)."""
    return answers.double().transpose(0, channel).flatten(1).mean(1)
