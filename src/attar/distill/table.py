"""Soft labels that others made, in a file: a teacher without a network."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.data.base import Batch, Data
from attar.distill.signal import Signal
from attar.errors import DataError

PROBABILITIES, LOGITS, EXAMPLE, CLASSES = "probabilities", "logits", "example", "classes"
OFF_BY = 1e-3
"""How far an example's probabilities may be from 1 together; what is rounded in a file is."""
LEAST = 1e-7
"""A probability of 0 has no logit: this one is taken."""


class Table:
    """A table of soft labels as a source of signals: a row for each training example, the same for
    every augmentation of it. There are no inner layers.

    The file is one of

    - `.npz`: `probabilities` or `logits` (n, classes); `example` (n,) where the rows aren't the
      training part's in its order; `classes`, names, where their order isn't the data's;
    - `.parquet` or `.csv`: a column of probabilities for each class, by its name; `example` as
      above.

    An example's number is its place in the data's own training part, from 0, before anything is
    taken from it for validation or a subset. What is said of examples that aren't trained on is
    passed over.

    Raises `DataError` for a file that can't be read, classes that aren't the data's, probabilities
    that are negative or don't sum to 1 (within 0.001, then they are made to), examples that don't
    exist, come twice, or are missing.

    Example:
        >>> table = Table(Path("soft.npz"), data)  # doctest: +SKIP
        >>> table.signal(batch).logits.softmax(-1).sum(-1)  # doctest: +SKIP
        tensor([1., 1., ...])
    """

    choice = MappingProxyType({"form": "table"})

    def __init__(self, path: Path, data: Data) -> None:
        columns = _read(path, data)
        logits = _logits(path, columns, data)
        examples = np.asarray(columns.get(EXAMPLE, np.arange(len(logits))))
        places = _places(data)
        self._logits = logits[_rows(path, len(logits), examples, places, _known(data))]

    def signal(self, batch: Batch) -> Signal:
        """The table's rows for these examples, as logits."""
        return Signal(self._logits[batch.indices.cpu()].to(batch.inputs.device))

    def settle(self, batch: Batch) -> None:
        """Nothing to choose."""

    def start_epoch(self, epoch: int) -> None:
        """Every epoch has the same answers."""


def _read(path: Path, data: Data) -> dict[str, Any]:
    """The file's columns by name; a table's classes side by side as `probabilities`."""
    if not path.is_file():
        raise DataError(f"there is no table of soft labels {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix in (".parquet", ".csv"):
            return _from_table(path, data)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader say
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the table of soft labels {path} can't be read: {reason}") from None
    raise DataError(
        f"soft labels are read from .npz, .parquet and .csv, and {path} is none of them"
    )


def _from_table(path: Path, data: Data) -> dict[str, Any]:
    import pyarrow.csv
    import pyarrow.parquet

    read = pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.parquet.read_table
    table = read(path)
    missing = [name for name in data.classes if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path} has no column {missing[0]!r}: it needs one of probabilities for each class "
            f"({', '.join(map(repr, data.classes[:4]))}{', …' if len(data.classes) > 4 else ''})"
        )
    columns = [table.column(name).to_numpy().astype(np.float64) for name in data.classes]
    found: dict[str, Any] = {PROBABILITIES: np.stack(columns, 1)}
    if EXAMPLE in table.column_names:
        found[EXAMPLE] = table.column(EXAMPLE).to_numpy()
    return found


def _logits(path: Path, columns: dict[str, Any], data: Data) -> Tensor:
    """(n, classes), float32, classes in the data's order."""
    given = [name for name in (PROBABILITIES, LOGITS) if name in columns]
    if len(given) != 1:
        raise DataError(f"{path} must hold either `probabilities` or `logits` (n, classes)")
    values = np.asarray(columns[given[0]], np.float64)
    count = len(data.classes)
    if values.ndim != 2 or values.shape[1] != count:
        raise DataError(
            f"{path} has {given[0]} of shape {values.shape} and the data have {count} classes: "
            f"(examples, {count}) was expected"
        )
    values = values[:, _order(path, columns, data)]
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise DataError(f"{path} has infinities or NaN, first in row {row}")
    if given[0] == PROBABILITIES:
        values = np.log(np.maximum(_distributions(path, values), LEAST))
    return torch.from_numpy(values.astype(np.float32))


def _order(path: Path, columns: dict[str, Any], data: Data) -> list[int]:
    """Where each of the data's classes stands among the file's."""
    if CLASSES not in columns:
        return list(range(len(data.classes)))
    names = [str(name) for name in columns[CLASSES]]
    if sorted(names) != sorted(data.classes):
        raise DataError(
            f"{path} is about the classes {', '.join(names)}, and the data have "
            f"{', '.join(data.classes)}"
        )
    return [names.index(name) for name in data.classes]


def _distributions(path: Path, values: np.ndarray) -> np.ndarray:
    total = values.sum(1, keepdims=True)
    wrong = np.flatnonzero((np.abs(total[:, 0] - 1) > OFF_BY) | (values < 0).any(1))
    if len(wrong):
        row = int(wrong[0])
        said = (
            f"has the probability {values[row].min():.4g}"
            if (values[row] < 0).any()
            else f"sums to {total[row, 0]:.4g}"
        )
        raise DataError(
            f"{path}: row {row} {said}, and so do {len(wrong) - 1:,} others: each row must be a "
            "distribution over the classes; call them `logits` if they are"
        )
    return values / total


def _places(data: Data) -> np.ndarray:
    """The numbers of the examples that are trained on, in the training split's order."""
    rows = getattr(data.train, "rows", None)
    return np.arange(len(data.train)) if rows is None else rows.numpy()


def _known(data: Data) -> int:
    """How many examples the data's own training part has."""
    images = getattr(data.train, "images", None)
    return len(data.train) if images is None else len(images)


def _rows(
    path: Path, rows: int, examples: np.ndarray, places: np.ndarray, known: int
) -> np.ndarray:
    """The table's row, of `rows`, for each place."""
    if examples.ndim != 1 or not np.array_equal(examples, examples.astype(np.int64)):
        raise DataError(f"{path}: `example` must hold whole numbers, the examples' places from 0")
    if len(examples) != rows:
        raise DataError(
            f"{path} has {rows:,} rows of soft labels and names {len(examples):,} examples"
        )
    examples = examples.astype(np.int64)
    unknown = examples[(examples < 0) | (examples >= known)]
    if len(unknown):
        raise DataError(
            f"{path} names the example {unknown[0]}, and the training part has {known:,} "
            f"(0 to {known - 1}); {len(unknown):,} such"
        )
    row_of = np.full(known, -1, np.int64)
    row_of[examples] = np.arange(len(examples))
    if len(np.unique(examples)) < len(examples):
        twice = examples[row_of[examples] != np.arange(len(examples))][0]
        raise DataError(f"{path} names the example {twice} more than once")
    missing = places[row_of[places] < 0]
    if len(missing):
        raise DataError(
            f"{path} has no soft labels for {len(missing):,} of the {len(places):,} training "
            f"examples (the first is {missing[0]})"
        )
    return row_of[places]
