"""The forms in which a tensor's elements are stored, whichever is smallest.

- constant: one element;
- planes: byte by byte;
- codebook: few values, and each element's index;
- sparse: whole slices of zeros left out, then where the other zeros are, then the rest in one of
  these forms;
- runs: few runs of elements (vectors) as a tensor of their own, and each run's index;
- rows: integers, and a step for each row, or for each group of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from attar.student.packed.ans import Reader, Writer
from attar.student.packed.codebook import LIMIT, Codebook, few_values
from attar.student.packed.damage import damaged
from attar.student.packed.elements import Elements, is_float, width_of
from attar.student.packed.models import Models, Symbols
from attar.student.packed.planes import read_planes, write_planes
from attar.student.packed.rows import Steps, groups_of, has_groups
from attar.student.packed.slices import kept_slices, read_slices, write_slices
from attar.student.packed.zeros import read_zeros, uneven, write_zeros

CONSTANT, PLANES, CODEBOOK, SPARSE, RUNS, ROWS = range(6)
FORMS = ("constant", "planes", "codebook", "sparse", "runs", "rows")
PLACES = 8
"""Forms that there is room for in the file."""
QUARTER = 2
"""Bits a byte: planes hardly ever come to less."""
FEW = 1 << 14


@dataclass(frozen=True)
class Block:
    """Elements to be stored. kind: their type. run: how many in a row are one of a few vectors.
    steps: what they may be multiples of."""

    kind: str
    bits: np.ndarray
    shape: tuple[int, ...]
    run: int = 1
    steps: Steps | None = None


def write_block(writer: Writer, block: Block, models: Models) -> str:
    """Notes the elements in the cheapest form, and returns its name. models: the tables so far."""
    if not block.bits.size:
        return "empty"
    best, form, known = min(_ways(writer, block, models), key=lambda way: way[0].bits)
    writer.adopt(best)
    models.known = known.known
    return FORMS[form]


def read_block(
    reader: Reader,
    kind: str,
    shape: tuple[int, ...],
    models: Models,
    outside: tuple[int, ...] = (),
    beside: list[Elements] | None = None,
) -> np.ndarray:
    """The elements' bits, in one row. outside: the forms that these are part of. beside: takes the
    steps that are stored with a tensor's integers; `None` for a part, which has none."""
    count = prod(shape)
    if not count:
        return np.empty(0, f"u{width_of(kind)}")
    form = reader.symbol("form", PLACES)
    if form >= len(FORMS) or form in outside or (form == SPARSE and not shape):
        raise damaged("its forms don't fit one another")
    if form == CONSTANT:
        return np.full(count, _read_constant(reader, kind))
    if form == PLANES:
        return read_planes(reader, kind, count, models)
    if form == SPARSE:
        return _read_sparse(reader, kind, shape, models)
    if form == RUNS:
        return _read_runs(reader, kind, count, models)
    if form == ROWS:
        if kind != "float32" or beside is None:
            raise damaged("its forms don't fit one another")
        return _read_rows(reader, shape, models, beside)
    codebook = Codebook.read(reader, kind)
    return models.read(reader, count, codebook.places, codebook.values)


def _ways(writer: Writer, block: Block, models: Models) -> Iterator[tuple[Writer, int, Models]]:
    def begun(form: int) -> tuple[Writer, int, Models]:
        fork = writer.fork()
        fork.symbol("form", form, PLACES)
        return fork, form, models.copy()

    bits = block.bits
    if (bits[:64] == bits[0]).all() and (bits == bits[0]).all():
        way = begun(CONSTANT)
        _write_constant(way[0], block.kind, int(bits[0]))
        yield way
        return
    if block.run > 1:
        way = begun(RUNS)
        if _write_runs(way[0], block, way[2]):
            yield way
    integers = block.steps.integers(bits, block.shape) if block.steps else None
    if block.steps and integers is not None:
        way = begun(ROWS)
        _write_rows(way[0], block, block.steps, integers, way[2])
        yield way
        if len(bits) > FEW and way[0].bits < QUARTER * bits.nbytes:
            return
    found = few_values(block.kind, bits)
    if _has_zeros(bits) and (found is None or len(bits) <= FEW or _has_structure(block)):
        way = begun(SPARSE)
        _write_sparse(way[0], block, way[2])
        yield way
    if found is not None:
        codebook, indices = found
        way = begun(CODEBOOK)
        codebook.write(way[0])
        way[2].write(way[0], Symbols.of(indices, codebook.places))
        yield way
        if len(bits) <= FEW and (wider := codebook.filled()):
            codebook, places = wider
            way = begun(CODEBOOK)
            codebook.write(way[0])
            way[2].write(way[0], Symbols.of(places[indices].astype(np.uint16), codebook.places))
            yield way
        if way[0].bits < QUARTER * bits.nbytes:
            return
    if found is None or len(bits) <= FEW:
        way = begun(PLANES)
        write_planes(way[0], block.kind, bits, way[2])
        yield way


# --- constant


def _write_constant(writer: Writer, kind: str, value: int) -> None:
    """One element: short where it is a small integer, or a float with few bits."""
    width = 8 * width_of(kind)
    if is_float(kind):
        zeros = (value & -value).bit_length() - 1 if value else width
        writer.symbol("zero bits", zeros, width + 1)
        writer.raw(value >> zeros, width - zeros)
        return
    length = value.bit_length()
    writer.symbol("integer bits", length, width + 1)
    writer.raw(value, length)


def _read_constant(reader: Reader, kind: str) -> np.generic:
    width = 8 * width_of(kind)
    if is_float(kind):
        zeros = reader.symbol("zero bits", width + 1)
        value = reader.raw(width - zeros) << zeros
    else:
        value = reader.raw(reader.symbol("integer bits", width + 1))
    found: np.generic = np.dtype(f"u{width_of(kind)}").type(value)
    return found


# --- sparse


def _has_zeros(bits: np.ndarray) -> bool:
    """Whether one element in ten or more is zero."""
    zeros = len(bits) - int(np.count_nonzero(bits))
    return 10 * zeros >= len(bits) > 1


def _has_structure(block: Block) -> bool:
    """Whether the zeros are somewhere rather than anywhere: else a codebook says them as well."""
    flags = (block.bits != 0).reshape(block.shape)
    return not all(kept.all() for kept in kept_slices(flags)) or uneven(flags)


def _write_sparse(writer: Writer, block: Block, models: Models) -> None:
    flags = (block.bits != 0).reshape(block.shape)
    kept = kept_slices(flags)
    write_slices(writer, kept, models)
    write_zeros(writer, flags[np.ix_(*kept)], models)
    rest = block.bits[block.bits != 0]
    write_block(writer, Block(block.kind, rest, rest.shape), models)


def _read_sparse(reader: Reader, kind: str, shape: tuple[int, ...], models: Models) -> np.ndarray:
    kept = read_slices(reader, shape, models)
    inner = read_zeros(reader, tuple(int(each.sum()) for each in kept), models)
    flags = np.zeros(shape, bool)
    flags[np.ix_(*kept)] = inner
    found = np.zeros(shape, f"u{width_of(kind)}")
    found[flags] = read_block(reader, kind, (int(flags.sum()),), models, (SPARSE, RUNS))
    return found.ravel()


# --- runs


def _write_runs(writer: Writer, block: Block, models: Models) -> bool:
    """Whether the elements are few different runs."""
    if block.bits.size % block.run:
        return False
    rows = np.ascontiguousarray(block.bits.reshape(-1, block.run))
    whole = rows.view(f"V{rows.strides[0]}").ravel()
    different, first, indices = np.unique(whole, return_index=True, return_inverse=True)
    if len(different) > LIMIT:
        return False
    writer.number("run", block.run)
    writer.number("codebook size", len(different) - 1)
    vectors = rows[first].ravel()
    write_block(writer, Block(block.kind, vectors, vectors.shape), models)
    models.write(writer, Symbols.of(indices.astype(np.uint16), np.arange(len(different))))
    return True


def _read_runs(reader: Reader, kind: str, count: int, models: Models) -> np.ndarray:
    run, size = reader.number("run"), reader.number("codebook size") + 1
    if not 0 < run <= count or count % run or size > min(LIMIT, count // run):
        raise damaged("its runs of weights don't fit their tensor")
    vectors = read_block(reader, kind, (size * run,), models, (RUNS,)).reshape(size, run)
    indices = models.read(reader, count // run, np.arange(size), np.arange(size))
    found: np.ndarray = vectors[indices].ravel()
    return found


# --- rows


def _write_rows(
    writer: Writer, block: Block, steps: Steps, integers: np.ndarray, models: Models
) -> None:
    writer.number("group", steps.length)
    flat = steps.steps.view(np.uint32).ravel()
    write_block(writer, Block(block.kind, flat, flat.shape), models)
    write_block(writer, Block(block.kind, integers.view(np.uint32), block.shape), models)


def _read_rows(
    reader: Reader, shape: tuple[int, ...], models: Models, beside: list[Elements]
) -> np.ndarray:
    length = reader.number("group")
    if not has_groups(shape, length):
        raise damaged("its groups of weights don't fit their tensor")
    groups = groups_of(shape, length)
    bits = read_block(reader, "float32", (prod(groups),), models, (RUNS,))
    beside.append(Elements("float32", groups, bits))
    integers = read_block(reader, "float32", shape, models, (RUNS,))
    steps = Steps(bits.view(np.float32).reshape(groups), length)
    return steps.values(integers.view(np.float32), shape)
