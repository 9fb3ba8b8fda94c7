"""Symbols and their tables in a row, as bytes: asymmetric numeral systems, by `constriction`.

The coder is a stack (Duda, arXiv:1311.2540): a writer notes what is to be coded, and codes it last
to first, so that a reader goes first to last. Its state starts at zero, so a stream costs no more
than its symbols, rounded up to whole bytes. A stream ends once it has `BLOCK` symbols, whence a
large file is read in little memory; a small one is a single stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import constriction
import numpy as np

from attar.student.packed.damage import damaged
from attar.student.packed.tables import Table, bits_of, cost, paired, table_of

BLOCK = 1 << 20
PIECE = 1 << 16
"""Symbols that are coded at once: they stay in the processor's cache."""
GROUPED_FROM = 1 << 14
"""From so many symbols on, those of small alphabets are coded two or four at a time."""
PAIRED_UP_TO = 64
"""Symbols of an alphabet that is coded in pairs: the pairs' table still is in the processor's
nearest cache."""
RAW_BITS = 16
TRIPLE = 3
"""Plain bytes that are coded at once."""

_Coder = constriction.stream.stack.AnsCoder
_model = constriction.stream.model


def model_of(table: Table) -> Any:
    """constriction's model with exactly these frequencies: it adds one to each and scales the rest
    to what is left, by one here."""
    return _model.Categorical((table - 1).astype(np.float64), perfect=False)


def group_of(size: int, count: int) -> int:
    """How many symbols of an alphabet are coded as one."""
    if count < GROUPED_FROM or size > PAIRED_UP_TO:
        return 1
    return 4 if size <= 4 else 2


def grouped(table: Table, group: int) -> Table:
    """The table of `group` (1, 2 or 4) symbols as one."""
    for _ in range(group.bit_length() - 1):
        table = paired(table)
    return table


@dataclass(frozen=True)
class _Op:
    """Symbols to be coded: how many, and what does it."""

    count: int
    encode: Callable[[Any], None]


class Adaptive:
    """Counts of a small alphabet's symbols so far, from one each."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def table(self) -> Table:
        return table_of(np.array(self.counts))

    def saw(self, symbol: int) -> None:
        self.counts[symbol] += 2 + len(self.counts) // 4

    def bits(self, symbol: int) -> float:
        """What a symbol costs now."""
        return log2(sum(self.counts) / self.counts[symbol])

    def copy(self) -> Adaptive:
        return Adaptive(self.counts.copy())


class Shelf:
    """The adaptive alphabets that a stream uses, by name."""

    def __init__(self) -> None:
        self._alphabets: dict[tuple[str, int], Adaptive] = {}

    def get(self, name: str, size: int) -> Adaptive:
        return self._alphabets.setdefault((name, size), Adaptive([1] * size))

    def copy(self) -> Shelf:
        shelf = Shelf()
        shelf._alphabets = {key: one.copy() for key, one in self._alphabets.items()}
        return shelf


class Writer:
    """Notes symbols; `bits` is what they cost. `fork` tries one way of writing something, `adopt`
    takes the cheapest."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        self.shelf = shelf or Shelf()
        self.bits = 0.0
        self._ops: list[_Op] = []

    def fork(self) -> Writer:
        return Writer(self.shelf.copy())

    def clone(self) -> Writer:
        """A writer that has noted the same."""
        clone = self.fork()
        clone._ops, clone.bits = self._ops.copy(), self.bits
        return clone

    def adopt(self, fork: Writer) -> None:
        self._ops += fork._ops
        self.bits += fork.bits
        self.shelf = fork.shelf

    def uniform(self, value: int, size: int) -> None:
        """One of `size` (at most 2 ** 16) equally probable symbols."""
        if size > 1:
            self._ops.append(_Op(1, lambda coder: coder.encode_reverse(value, _uniform(size))))
            self.bits += log2(size)

    def raw(self, value: int, bits: int) -> None:
        """An integer's bits as they are, the lowest 16 first."""
        for shift in range(0, bits, RAW_BITS):
            width = min(RAW_BITS, bits - shift)
            self.uniform(value >> shift & (1 << width) - 1, 1 << width)

    def symbol(self, name: str, value: int, size: int) -> None:
        """A symbol of an alphabet that learns."""
        alphabet = self.shelf.get(name, size)
        now = alphabet.copy()
        self._ops.append(_Op(1, lambda coder: coder.encode_reverse(value, model_of(now.table()))))
        self.bits += alphabet.bits(value)
        alphabet.saw(value)

    def number(self, name: str, value: int) -> None:
        """An integer from 0 to 2 ** 63 - 1: how many bits it has, then those after the first."""
        length = value.bit_length()
        self.symbol(name, length, 64)
        self.raw(value & ~(1 << length - 1) if length else 0, max(length - 1, 0))

    def array(self, symbols: np.ndarray, table: Table, counts: np.ndarray) -> None:
        """Symbols of one table. counts: how many there are of each."""
        size, group = len(table), group_of(len(table), symbols.size)
        whole = symbols.size // group * group
        model = model_of(grouped(table, group))
        for part in _parts(symbols[:whole], PIECE * group):
            self._note(part.size // group, model, part, (size, group))
        if whole < symbols.size:
            self._note(symbols.size - whole, model_of(table), symbols[whole:])
        self.bits += cost(counts, table)

    def plain(self, values: np.ndarray) -> None:
        """Bytes as they are."""
        whole = values.size // TRIPLE * TRIPLE
        for part in _parts(values[:whole], PIECE * TRIPLE):
            self._note(part.size // TRIPLE, _uniform(1 << 24), part, (256, TRIPLE))
        if whole < values.size:
            self._note(values.size - whole, _uniform(256), values[whole:])
        self.bits += 8 * values.size

    def each(self, symbols: np.ndarray, tables: np.ndarray) -> None:
        """Symbols with a table each, (n, k): fewer than `BLOCK`."""
        probabilities = _probabilities(tables)

        def encode(coder: Any) -> None:
            family = _model.Categorical(perfect=False)
            coder.encode_reverse(symbols.astype(np.int32), family, probabilities)

        self._ops.append(_Op(symbols.size, encode))
        chosen = np.take_along_axis(tables, symbols.astype(np.int64)[:, None], 1)
        self.bits += float(bits_of(chosen).sum())

    def finish(self) -> list[bytes]:
        """The streams."""
        streams: list[bytes] = []
        block: list[_Op] = []
        count = 0
        for op in self._ops:
            block.append(op)
            count += op.count
            if count >= BLOCK:
                streams.append(_encoded(block))
                block, count = [], 0
        return [*streams, _encoded(block)]

    def _note(
        self, count: int, model: Any, symbols: np.ndarray, grouping: tuple[int, int] = (0, 1)
    ) -> None:
        def encode(coder: Any) -> None:
            coder.encode_reverse(_joined(symbols, *grouping), model)

        self._ops.append(_Op(count, encode))


class Reader:
    """Symbols in the order in which a `Writer` noted them. streams: gives one stream after another,
    `None` after the last."""

    def __init__(self, streams: Callable[[], bytes | memoryview | None]) -> None:
        self.shelf = Shelf()
        self._streams = streams
        self._count = 0
        self._open()

    def uniform(self, size: int) -> int:
        return int(self._decode(_uniform(size), 1)[0]) if size > 1 else 0

    def raw(self, bits: int) -> int:
        return sum(
            self.uniform(1 << min(RAW_BITS, bits - shift)) << shift
            for shift in range(0, bits, RAW_BITS)
        )

    def symbol(self, name: str, size: int) -> int:
        alphabet = self.shelf.get(name, size)
        value = int(self._decode(model_of(alphabet.table()), 1)[0])
        alphabet.saw(value)
        return value

    def number(self, name: str) -> int:
        length = self.symbol(name, 64)
        return (1 << length - 1) + self.raw(length - 1) if length else 0

    def array(self, count: int, table: Table, values: np.ndarray) -> np.ndarray:
        """`count` of the values whose symbols have this table. values: (k,)."""
        size, group = len(table), group_of(len(table), count)
        whole = count // group * group
        found = np.empty(count, values.dtype)
        many, model = _grouped_values(values, group), model_of(grouped(table, group))
        as_groups = found[:whole].view(many.dtype)
        for part in _parts(as_groups, PIECE):
            np.take(many, self._decode(model, len(part)), out=part, mode="clip")
        if whole < count:
            found[whole:] = values[self._decode(model_of(table), count - whole)]
        assert size == len(values)
        return found

    def plain(self, count: int) -> np.ndarray:
        whole = count // TRIPLE * TRIPLE
        found = np.empty(count, np.uint8)
        for part in _parts(found[:whole], PIECE * TRIPLE):
            triples = self._decode(_uniform(1 << 24), part.size // TRIPLE)
            for place in range(TRIPLE):
                part[place::TRIPLE] = triples >> 8 * (TRIPLE - 1 - place)
        if whole < count:
            found[whole:] = self._decode(_uniform(256), count - whole)
        return found

    def each(self, tables: np.ndarray) -> np.ndarray:
        """A symbol of each table, (n, k): fewer than `BLOCK`."""
        return self._decode(_model.Categorical(perfect=False), len(tables), _probabilities(tables))

    def in_turn(self, count: int, table: Callable[[], Table], saw: Callable[[int], None]) -> None:
        """`count` symbols, each by the table that there is once those before it were seen."""
        for _ in range(count):
            saw(int(self._coder.decode(model_of(table()), 1)[0]))
        self._passed(count)

    def finish(self) -> None:
        """Raises `CheckpointError` where something is left."""
        if not self._coder.is_empty() or self._streams() is not None:
            raise damaged("there is more in it than its tensors")

    def _decode(self, model: Any, count: int, *parameters: np.ndarray) -> np.ndarray:
        symbols: np.ndarray = self._coder.decode(model, *(parameters or (count,)))
        self._passed(count)
        return symbols

    def _passed(self, count: int) -> None:
        """Goes on to the next stream after enough symbols."""
        self._count += count
        if self._count >= BLOCK:
            if not self._coder.is_empty():
                raise damaged("a part of it is longer than what it holds")
            self._open()

    def _open(self) -> None:
        stream = self._streams()
        if stream is None:
            raise damaged("it ends too early")
        if len(stream) and not stream[-1]:
            raise damaged("a part of it ends in zeros")
        padded = bytes(stream) + bytes(-len(stream) % 4)
        self._coder = _Coder(np.frombuffer(padded, "<u4").astype(np.uint32))
        self._count = 0


def _probabilities(tables: np.ndarray) -> np.ndarray:
    """As of `model_of`, a row each; exact, for they are below 2 ** 24."""
    return (tables - 1).astype(np.float32)


def _uniform(size: int) -> Any:
    return _model.Uniform(size)


def _parts(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[start : start + size] for start in range(0, array.size, size)]


def _joined(symbols: np.ndarray, size: int, group: int) -> np.ndarray:
    """Groups of symbols as one, the first counting most."""
    if group == 1:
        return symbols.astype(np.int32)
    columns = symbols.reshape(-1, group)
    joined = columns[:, 0].astype(np.int32)
    for i in range(1, group):
        joined *= size
        joined += columns[:, i]
    return joined


def _grouped_values(values: np.ndarray, group: int) -> np.ndarray:
    """All groups of values in the order of their symbols, each as one item."""
    if group == 1:
        return values
    places = np.indices((len(values),) * group).reshape(group, -1).T
    width = group * values.itemsize
    # np.take is fast on numbers
    item = {2: "u2", 4: "u4", 8: "u8", 16: "c16"}.get(width, f"V{width}")
    return np.ascontiguousarray(values[places]).view(item).ravel()


def _encoded(ops: list[_Op]) -> bytes:
    coder = _Coder()
    for op in reversed(ops):
        op.encode(coder)
    return bytes(coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0"))
