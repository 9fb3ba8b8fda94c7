"""The gate that every export passes: the same answers as PyTorch, within a stated bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attar.errors import ParityError


@dataclass(frozen=True)
class Bound:
    """How far an exported model may be from its reference.

    Differences are shares of the reference's scale, max(1, largest magnitude of the output).

    difference: the largest allowed anywhere; `None` where only the answers are held.
    tie: an example whose outputs differ by no more than this counts as agreeing, whatever its
        answer: its two best are then tied to within twice that.
    agreement: the smallest allowed share of agreeing examples. One example may always disagree,
        so that a small sample isn't failed by a single tie.
    """

    difference: float | None
    tie: float
    agreement: float


FLOAT = Bound(difference=1e-3, tie=1e-4, agreement=0.99)
"""Float networks: the same arithmetic in another order."""

QUANTIZED = Bound(difference=None, tie=0.01, agreement=0.99)
"""Integer networks against the network that simulates them in float: a value that falls beside a
rounding step may land on its other side, and one step moves everything after it. `tie` is somewhat
over two steps of 255 over the output's range."""


def bound_for(edits: Iterable[Any]) -> Bound:
    """What a student with these edits is held to: `QUANTIZED` where one rounds activations."""
    return QUANTIZED if any(edit.rounds == "activations" for edit in edits) else FLOAT


def check_parity(
    reference: np.ndarray | tuple[np.ndarray, ...],
    answers: np.ndarray | tuple[np.ndarray, ...],
    agreement: Callable[[Any, Any], np.ndarray],
    bound: Bound = FLOAT,
) -> dict[str, float | int]:
    """Compares an exported model's outputs with its reference's, batch first.

    agreement: per example, whether two outputs give the same answer (`Task.agreement`); it is
        handed the outputs as they are here: an array, or a tuple of several.
    Returns `max_abs_diff`, `agreement` (the plain share, ties not excused) and `n`, as the ledger
    has them. Raises `ParityError` when out of bound.

    Example:
        >>> same = lambda a, b: a.argmax(-1) == b.argmax(-1)
        >>> logits = np.array([[0.1, 2.0], [1.5, 0.3]])
        >>> check_parity(logits, logits, same)
        {'max_abs_diff': 0.0, 'agreement': 1.0, 'n': 2}
    """
    expected, found = _arrays(reference), _arrays(answers)
    _refuse_other_shapes(expected, found)
    n = len(expected[0])
    scale, apart = np.zeros(n), np.zeros(n)
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        distance = np.abs(a.astype(np.float64) - b.astype(np.float64)).reshape(n, -1)
        size = max(1.0, float(np.abs(a).max(initial=0.0)))
        worst = max(worst, float(distance.max(initial=0.0)))
        apart = np.maximum(apart, distance.max(axis=1, initial=0.0) / size)
        scale = np.maximum(scale, size)
    same = np.asarray(agreement(reference, answers), dtype=bool)
    found_figures = {"max_abs_diff": worst, "agreement": float(same.mean()), "n": n}
    if bound.difference is not None and apart.max() > bound.difference:
        raise ParityError(
            f"the exported model's outputs differ from PyTorch's by up to {worst:.3g} on {n} real "
            f"inputs, where {bound.difference * scale.max():.3g} is allowed"
        )
    disagreeing = int((~same & (apart > bound.tie)).sum())
    if disagreeing > max(1, (1 - bound.agreement) * n):
        raise ParityError(
            f"the exported model gives other answers than PyTorch on {disagreeing} of {n} real "
            f"inputs, where {1 - bound.agreement:.0%} is allowed"
        )
    return found_figures


def _arrays(outputs: np.ndarray | tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (np.asarray(outputs),)


def _refuse_other_shapes(expected: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...]) -> None:
    shapes = [x.shape for x in expected], [x.shape for x in found]
    if shapes[0] != shapes[1]:
        raise ParityError(
            f"the exported model's outputs have shapes {shapes[1]}, PyTorch's {shapes[0]}"
        )
    for a, b in zip(expected, found, strict=True):
        if np.isfinite(a).all() and not np.isfinite(b).all():
            raise ParityError("the exported model answers with infinities or NaN")
