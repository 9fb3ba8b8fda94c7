"""Hugging Face data sets: Parquet files as the hub stores them, or a name on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from attar.data.base import UNLABELLED
from attar.data.config import DataConfig
from attar.data.decoding import Encoded, decoded, file_stamp
from attar.data.images import open_image
from attar.data.parts import Examples, Parts, Source, location, numbered, sources
from attar.errors import DataError, UsageError
from attar.registry import near

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
ROWS = 1024


@dataclass(frozen=True)
class Table:
    """One split: its schema, its rows a few at a time, and what changes when they do."""

    name: str
    schema: pa.Schema
    rows: int
    batches: Callable[[list[str]], Iterable[pa.RecordBatch]]
    key: Any


@sources.register("huggingface")
class HuggingFace(Source):
    """Parquet files as on the Hugging Face hub (`path`), or a hub data set (`name`)."""

    takes = frozenset({"path", "name", "columns", "arguments"})

    def load(self, config: DataConfig) -> Parts:
        if (config.path is None) == (config.name is None):
            raise UsageError(
                "the data source 'huggingface' needs either `path`, a Parquet file or a folder of "
                "them, or `name`, a data set on the hub"
            )
        if config.name is not None:
            name, tables = config.name, _from_hub(config.name, config.arguments)
        else:
            if config.arguments:
                raise UsageError("local Parquet files take no `arguments`; those are for the hub")
            path = location(config.path, "path")
            name, tables = path.resolve().stem, _from_files(path)
        if "train" not in tables:
            raise DataError(f"{name} has no train split, only {', '.join(tables) or 'nothing'}")
        return _parts(name, tables, config)


def _parts(name: str, tables: dict[str, Table], config: DataConfig) -> Parts:
    image, label = (find(tables["train"], config) for find in (_image_column, _label_column))
    raw = {split: _column(table, label) for split, table in tables.items()}
    labels, classes = numbered(np.concatenate(list(raw.values())), f"column {label!r} of {name}")
    classes = _class_names(tables["train"].schema, label) or classes
    parts: dict[str, Examples] = {}
    start = 0
    for split, table in tables.items():
        own = labels[start : start + table.rows]
        parts[split] = _read(table, image, own, config)
        start += table.rows
    return Parts.of(name, classes, parts)


def _read(table: Table, column: str, labels: np.ndarray, config: DataConfig) -> Examples:
    def items() -> Iterator[Encoded]:
        row = 0
        for batch in table.batches([column]):
            for value in batch.column(0):
                name = f"in row {row} of {table.name}"
                yield Encoded(name, partial(_open, value, name, int(labels[row])))
                row += 1

    if not table.rows:
        raise DataError(f"{table.name} has no rows")
    images = decoded(items, table.rows, config, [table.key, column]).images
    return Examples(images, labels)  # which number a name has is not the table's alone to say


def _open(value: pa.Scalar, name: str, label: int) -> tuple[Image.Image, int]:
    content = value.as_py()
    if isinstance(content, dict):
        content = content.get("bytes")
    if not isinstance(content, bytes):
        raise DataError(f"the image {name} is not in the table: only encoded images are read")
    return open_image(content, name), label


def images_of_rows(path: Path, config: DataConfig) -> np.ndarray:
    """The images of a Parquet file, or of all in a folder, whatever splits they belong to."""
    table = _table(_parquet_files(path), path if path.is_dir() else path.parent)
    labels = np.full(table.rows, UNLABELLED, np.int64)
    return _read(table, _image_column(table, config), labels, config).images


def _image_column(table: Table, config: DataConfig) -> str:
    given = config.columns.image if config.columns else None
    return _column_of("image", given, "Image", ("image", "img"), table)


def _label_column(table: Table, config: DataConfig) -> str:
    given = config.columns.label if config.columns else None
    return _column_of("label", given, "ClassLabel", ("label", "labels"), table)


def _column_of(
    what: str, given: str | None, kind: str, usual: tuple[str, ...], table: Table
) -> str:
    """A column as given, as the schema says, or by a usual name."""
    features = _features(table.schema)
    marked = [name for name, feature in features.items() if feature.get("_type") == kind]
    column = given or _only(what, marked, usual, table)
    if column not in table.schema.names:
        raise DataError(f"{table.name} has no column {column!r}{near(column, table.schema.names)}")
    return column


def _only(what: str, marked: list[str], usual: tuple[str, ...], table: Table) -> str:
    names = marked or [n for n in usual if n in table.schema.names]
    if len(names) != 1:
        raise UsageError(
            f"which column of {table.name} holds the {what} is not clear (it has "
            f"{', '.join(table.schema.names)}): say so by `columns: {{{what}: …}}`"
        )
    return names[0]


def _column(table: Table, label: str) -> np.ndarray:
    values = [b.column(0).to_numpy(zero_copy_only=False) for b in table.batches([label])]
    return np.concatenate(values) if values else np.empty(0, np.int64)


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    return tuple(_features(schema).get(label, {}).get("names") or ())


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The columns' meanings, which `datasets` writes into the schema's metadata."""
    try:
        record = json.loads((schema.metadata or {})[b"huggingface"])
        features = record["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {n: f for n, f in features.items() if isinstance(f, dict)}


def _from_files(path: Path) -> dict[str, Table]:
    """Splits by file name (`train-00000-of-00002.parquet`) or folder (`train/0.parquet`)."""
    files = _parquet_files(path)
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of(file) if len(files) > 1 else "train", []).append(file)
    root = path if path.is_dir() else path.parent
    return {split: _table(group, root) for split, group in groups.items()}


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} has no .parquet files")
    return files


def _split_of(file: Path) -> str:
    for word in (re.split(r"[-_.]", file.name)[0], file.parent.name):
        if word.lower() in SPLITS:
            return SPLITS[word.lower()]
    raise DataError(
        f"{file} belongs to no split: its name, or its folder's, starts with none of "
        "train, validation and test"
    )


def _table(files: list[Path], root: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = [pq.ParquetFile(file) for file in files]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"can't read {files[0].parent} as Parquet: {error}") from None

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for file in opened:
            yield from file.iter_batches(ROWS, columns=columns)

    rows = sum(file.metadata.num_rows for file in opened)
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    key = [str(root.resolve()), [file_stamp(file, root) for file in files]]
    return Table(name, opened[0].schema_arrow, rows, batches, key)


def _from_hub(name: str, arguments: dict[str, Any]) -> dict[str, Table]:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"reading {name} from the hub needs the `datasets` extra: pip install attar[datasets]; "
            "Parquet files on disk are read without it, by `path`"
        ) from None
    try:
        found = datasets.load_dataset(name, **arguments)
    except Exception as error:  # a remote service has many ways to fail
        raise DataError(f"can't load {name} from the hub: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{name} came without splits: leave `split` out of `arguments`")
    return {SPLITS[s]: _hub_table(f"{name}/{s}", d) for s, d in found.items() if s in SPLITS}


def _hub_table(name: str, dataset: Any) -> Table:
    table = dataset.data.table

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        yield from table.select(columns).to_batches(max_chunksize=ROWS)

    return Table(name, table.schema, table.num_rows, batches, dataset._fingerprint)
