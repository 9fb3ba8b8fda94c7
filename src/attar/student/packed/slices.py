"""Whole slices of zeros: rows, columns, filters, input pixels that have no weight."""

from __future__ import annotations

import numpy as np

from attar.student.packed.ans import Reader, Writer
from attar.student.packed.models import Models, Symbols

FLAG = np.array([0, 1], np.int64)


def kept_slices(flags: np.ndarray) -> list[np.ndarray]:
    """Along each axis, which slices have anything: bool, (size of the axis,). flags: true where an
    element isn't zero; at least one is."""
    axes = range(flags.ndim)
    around = [tuple(other for other in axes if other != axis) for axis in axes]
    return [np.asarray(flags.any(axis=others)) for others in around]


def write_slices(writer: Writer, kept: list[np.ndarray], models: Models) -> None:
    """For each axis whether any slice is left out, and which."""
    for each in kept:
        writer.symbol("slices", int(not each.all()), 2)
        if not each.all():
            models.write(writer, Symbols.of(each.astype(np.uint8), FLAG))


def read_slices(reader: Reader, shape: tuple[int, ...], models: Models) -> list[np.ndarray]:
    return [
        models.read(reader, size, FLAG, FLAG.astype(bool))
        if reader.symbol("slices", 2)
        else np.ones(size, bool)
        for size in shape
    ]
