"""How a quantized student's grids fit examples: what is clipped, constant or dead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from attar.errors import DataError
from attar.quantize.bias_correction import quantization_of
from attar.quantize.observers import Grid, PerChannelWeight
from attar.student import Student

WORTH_SAYING = 0.01
"""The share of a tensor's values, beyond those that calibration let go, whose clipping is told."""


@dataclass(frozen=True)
class Fit:
    """How grids fit examples.

    clipped: by activation's key, the share of the float network's values that lie further than half
    a step outside its grid. constant: the activations that are one value throughout. dead: by
    weight's key, how many output channels are all zeros, where there are any.
    """

    clipped: dict[str, float]
    constant: list[str]
    dead: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    student: Student,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> Fit:
    """How the grids of a quantized student fit examples, of calibration or others.

    examples: argument tuples, batch first, seen once; memory doesn't grow with them. Raises
    `UsageError` for a student that isn't quantized, `DataError` for no examples.

    Example:
        >>> found = fit(  # doctest: +SKIP
        ...     student, batches, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
        >>> found.clipped["layer1.0:relu"]  # doctest: +SKIP
        0.0004
    """
    edit = quantization_of(student)
    prepared = edit.prepared(student.module, example, dynamic_shapes, corrected=False)
    watching = _Watching(prepared)
    seen = False
    with torch.no_grad():
        for arguments in examples:
            watching.run(*arguments)
            seen = True
    if not seen:
        raise DataError("how the grids fit is seen on examples, and there are none")
    return watching.found()


def clipped(
    student: Student,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> dict[str, float]:
    """`Fit.clipped` alone: by activation, the share of values outside its grid."""
    return fit(student, examples, example=example, dynamic_shapes=dynamic_shapes).clipped


def remarks(others: Fit, calibration: Fit | None = None) -> list[str]:
    """What is worth saying of other examples' fit, a sentence each, the most clipped first.

    calibration: the fit of what the grids were chosen on, of which some choices clip a part; a
    constant activation or dead channel is told once.

    Example:
        >>> remarks(Fit({"conv:relu": 0.12}, [], {}))
        ['the calibration data look different from these at conv:relu: 12 % of values are clipped']
    """
    usual = calibration.clipped if calibration else {}
    beyond = {k: v for k, v in others.clipped.items() if v - usual.get(k, 0.0) > WORTH_SAYING}
    said = [
        f"the calibration data look different from these at {key}: {100 * beyond[key]:.0f} % of "
        "values are clipped" + (f" ({100 * usual[key]:.1f} % there)" if key in usual else "")
        for key in sorted(beyond, key=lambda key: -beyond[key])
    ]
    said += [f"{key} is one value whatever the example" for key in others.constant]
    return said + [
        f"{count} of the output channels of {key.removesuffix('/weight')} have weights of zero"
        for key, count in others.dead.items()
    ]


class _Watching(Interpreter):
    """Runs a prepared graph in float, and compares what passes its observers with their grids."""

    def __init__(self, prepared: GraphModule) -> None:
        super().__init__(prepared)
        self._outside: dict[str, int] = {}
        self._values: dict[str, int] = {}
        self._ends: dict[str, tuple[float, float]] = {}
        self._dead: dict[str, int] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        observer = self.fetch_attr(target)
        if isinstance(observer, PerChannelWeight):
            flat = args[0].transpose(0, observer.ch_axis).flatten(1)
            self._dead[observer.key] = int((flat == 0).all(1).sum())
        elif isinstance(observer, Grid):
            self._see(observer, args[0])
        return args[0]

    def found(self) -> Fit:
        """What was seen."""
        return Fit(
            {key: self._outside[key] / self._values[key] for key in self._values},
            [key for key, (low, high) in self._ends.items() if low == high],
            {key: count for key, count in self._dead.items() if count},
        )

    def _see(self, grid: Grid, x: Tensor) -> None:
        zero, step = int(grid.zero_point), float(grid.scale)
        least = (grid.quant_min - zero - 0.5) * step
        most = (grid.quant_max - zero + 0.5) * step
        outside = int(((x < least) | (x > most)).sum())
        self._outside[grid.key] = self._outside.get(grid.key, 0) + outside
        self._values[grid.key] = self._values.get(grid.key, 0) + x.numel()
        low, high = (float(end) for end in torch.aminmax(x))
        was = self._ends.get(grid.key, (low, high))
        self._ends[grid.key] = (min(was[0], low), max(was[1], high))
