"""The models of a tensor's symbols: which table they are coded by, and what the table costs.

Three ways to say a table, whichever makes the file smallest:

- counted: each symbol's count, rounded to a few leading bits;
- decaying: a peak, and how fast symbols get rarer with their distance from it (a discretised
  Laplace or Gaussian distribution, as weights have it), the peak's own weight apart where many
  weights are zero: two to three bytes;
- earlier: the table of symbols before these.

Where the low bits of many symbols hardly say anything about one another, these are stored as they
are, and only the high ones have a table (split): that is read in three quarters of the time.

Few symbols don't pay for an exact table: then the table only is where counting starts from, and
every symbol moves it on (`learning`: how many symbols the start counts for; 0: it stays).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import log

import numpy as np
from scipy.special import gammaln

from attar.student.packed.ans import Reader, Writer
from attar.student.packed.damage import damaged
from attar.student.packed.split import LOW_BITS, grouped_counts, read_low, spare_bits, write_low
from attar.student.packed.tables import TOTAL, Table, bits_of, cost, table_of

COUNTED, DECAYING, EARLIER, SPLIT, KINDS = 0, 1, 2, 3, 4
LEARNING_UP_TO = 4096
LEARNT_SYMBOLS = 512
"""Symbols that may be coded by a table that moves, and of how large an alphabet: it is slow, and
little is gained beyond."""
STRENGTHS = (0, 4, 8, 16, 32, 64, 128, 256)
MANTISSAS = 8
RATES = 56
PEAKS = 64
ONE = 1 << 16
SPAN = 512
"""How far from its peak a decaying table is followed; beyond, symbols are as rare as there."""
EARLIER_MODELS = 8


@dataclass
class Symbols:
    """Symbols of one alphabet. values: uint8 or uint16 (n,). places: int64 (k,), rising: where the
    symbols lie on the line, for tables that decay. counts: int64 (k,), of each symbol."""

    values: np.ndarray
    places: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, places: np.ndarray) -> Symbols:
        return cls(values, places, _counted(values, len(places)))

    def high(self, bits: int) -> Symbols:
        """The same without their low bits."""
        high = self.values >> self.values.dtype.type(bits)
        return Symbols(high, high_places(self.places, bits), grouped_counts(self.counts, bits))


def _counted(values: np.ndarray, size: int) -> np.ndarray:
    """How many there are of each; bytes two at a time."""
    if values.dtype != np.uint8 or len(values) < 1 << 16:
        return np.bincount(values, minlength=size)
    whole = len(values) // 2 * 2
    pairs = np.bincount(values[:whole].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: np.ndarray = pairs.sum(0) + pairs.sum(1)
    counts[values[whole:]] += 1
    return counts[:size]


def high_places(places: np.ndarray, bits: int) -> np.ndarray:
    """Where symbols without their low bits lie: one apart, that of zero at 0."""
    return np.arange(len(places) + (1 << bits) - 1 >> bits) - (_zero(places) >> bits)


class Models:
    """Codes arrays of symbols, and remembers the tables."""

    def __init__(self) -> None:
        self.known: list[Table] = []

    def write(self, writer: Writer, symbols: Symbols) -> None:
        """The table, how fast it learns, and the symbols, in the fewest bits, or hardly more."""
        bits = spare_bits(symbols.counts)
        if not bits:
            self._write_whole(writer, symbols)
            return
        writer.symbol("model", SPLIT, KINDS)
        writer.symbol("low bits", bits, LOW_BITS)
        self._write_whole(writer, symbols.high(bits))
        write_low(writer, symbols.values, bits)

    def _write_whole(self, writer: Writer, symbols: Symbols) -> None:
        if len(symbols.places) == 1:
            return
        few = _may_learn(len(symbols.values), len(symbols.places))
        strengths = STRENGTHS if few else STRENGTHS[:1]
        _, learning, fork, table = min(
            (
                (_price(candidate, symbols, made, strength), i, candidate, made)
                for candidate, made in self._tables(writer, symbols)
                for i, strength in enumerate(strengths)
            ),
            key=lambda way: way[:2],
        )
        if few:
            fork.symbol("learning", learning, len(STRENGTHS))
        if learning:
            tables = learning_tables(symbols, table, STRENGTHS[learning])
            fork.each(symbols.values, tables)
        else:
            fork.array(symbols.values, table, symbols.counts)
        writer.adopt(fork)
        self._remember(table)

    def read(
        self, reader: Reader, count: int, places: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """`count` of `values`, (k,), by their symbols."""
        if len(places) == 1:
            return np.full(count, values[0])
        kind = reader.symbol("model", KINDS)
        if kind == SPLIT:
            return values.take(self._read_split(reader, count, places), mode="clip")
        table = self._read_table(reader, kind, places)
        self._remember(table)
        few = _may_learn(count, len(places))
        learning = reader.symbol("learning", len(STRENGTHS)) if few else 0
        if not learning:
            return reader.array(count, table, values)
        return values[_learnt(reader, count, table, STRENGTHS[learning])]

    def copy(self) -> Models:
        copy = Models()
        copy.known = self.known
        return copy

    def _remember(self, table: Table) -> None:
        self.known = [table, *self.known][:EARLIER_MODELS]

    def _tables(self, writer: Writer, symbols: Symbols) -> Iterator[tuple[Writer, Table]]:
        few = len(symbols.values) <= LEARNING_UP_TO
        for mantissa in (0, 1, 2) if few else (2, 4, 6):
            fork = writer.fork()
            fork.symbol("model", COUNTED, KINDS)
            yield fork, write_counted(fork, symbols.counts, mantissa)
        if len(symbols.values) <= 1 << 16:
            for zero in (False, True):
                for decay in fitted(symbols, zero):
                    fork = writer.fork()
                    fork.symbol("model", DECAYING, KINDS)
                    decay.write(fork, symbols.places)
                    yield fork, decay.table(symbols.places)
        for back, table in enumerate(self.known):
            if len(table) == len(symbols.places):
                fork = writer.fork()
                fork.symbol("model", EARLIER, KINDS)
                fork.symbol("earlier", back, EARLIER_MODELS)
                yield fork, table

    def _read_split(self, reader: Reader, count: int, places: np.ndarray) -> np.ndarray:
        """Symbols, by high and low bits."""
        bits = reader.symbol("low bits", LOW_BITS)
        if not bits:
            raise damaged("it splits symbols into nothing")
        high = high_places(places, bits)
        kind = np.uint8 if len(high) << bits <= 256 else np.uint16
        symbols = self.read(reader, count, high, (np.arange(len(high)) << bits).astype(kind))
        read_low(reader, symbols, bits)
        if (symbols >= len(places)).any():
            raise damaged("it has symbols that don't stand for anything")
        return symbols

    def _read_table(self, reader: Reader, kind: int, places: np.ndarray) -> Table:
        if kind == COUNTED:
            return read_counted(reader, len(places))
        if kind == DECAYING:
            return Decay.read(reader, places).table(places)
        back = reader.symbol("earlier", EARLIER_MODELS)
        if kind != EARLIER or back >= len(self.known) or len(self.known[back]) != len(places):
            raise damaged("it refers to a table that isn't there")
        return self.known[back]


# --- counted


def write_counted(writer: Writer, counts: np.ndarray, mantissa: int) -> Table:
    """Counts as small floats of `mantissa` bits, each as its distance from the one before: their
    bits, as integers, rise as they do."""
    writer.symbol("mantissa", mantissa, MANTISSAS)
    codes = as_codes(counts, mantissa)
    steps = np.diff(codes, prepend=0)
    symbols = np.where(steps < 0, -2 * steps - 1, 2 * steps)
    used = np.bincount(symbols)
    tables = _step_tables(mantissa)
    rate = int(np.argmin(_step_bits(mantissa)[:, : len(used)] @ used))
    writer.symbol("steps", rate, RATES)
    writer.array(symbols, tables[rate], np.bincount(symbols, minlength=tables.shape[1]))
    return table_of(as_counts(codes, mantissa))


def read_counted(reader: Reader, size: int) -> Table:
    mantissa = reader.symbol("mantissa", MANTISSAS)
    table = _step_tables(mantissa)[reader.symbol("steps", RATES)]
    symbols = reader.array(size, table, np.arange(len(table)))
    steps = np.where(symbols & 1, -(symbols + 1 >> 1), symbols >> 1)
    codes = steps.cumsum()
    if codes.min() < 0 or codes.max() > 38 << mantissa or not codes.any():
        raise damaged("a table counts more than there is, or nothing")
    return table_of(as_counts(codes, mantissa))


def as_codes(counts: np.ndarray, mantissa: int) -> np.ndarray:
    """Integers as small floats of `mantissa` bits after the first, which are integers again."""
    lengths = np.frexp(counts.astype(np.float64))[1].astype(np.int64)
    shift = np.maximum(lengths - 1 - mantissa, 0)
    return (shift << mantissa) + (counts >> shift)


def as_counts(codes: np.ndarray, mantissa: int) -> np.ndarray:
    """Numbers in the middle of what has these codes."""
    shift = np.maximum((codes >> mantissa) - 1, 0)
    return (codes - (shift << mantissa) << shift) + (1 << shift >> 1)


@cache
def _step_tables(mantissa: int) -> np.ndarray:
    """By rate, the tables of distances between codes."""
    size = 128 << mantissa
    places = np.minimum(np.arange(size) + 1 >> 1, SPAN - 1)
    profile = profiles(np.arange(RATES), np.zeros(RATES, np.int64))
    return table_of(np.maximum(profile[:, places], 1))


@cache
def _step_bits(mantissa: int) -> np.ndarray:
    return bits_of(_step_tables(mantissa))


# --- decaying


@dataclass(frozen=True)
class Decay:
    """A table that decays from its peak, in integers.

    peak: a symbol. rate, bend: `_fraction`s by which the ratio of one distance to the next falls
    short of 1, and by which that ratio shrinks with each (Gaussian; none: Laplace). odds: the
    peak's weight over all others', where it is apart.
    """

    peak: int
    rate: int
    bend: int
    odds: int | None = None

    def table(self, places: np.ndarray) -> Table:
        profile = _grid()[self.rate * (RATES + 1) + self.bend]
        distance = np.minimum(np.abs(places - places[self.peak]), SPAN - 1)
        weights = profile[distance]
        if self.odds is not None:
            weights[self.peak] = 0
            weights = table_of(np.maximum(weights, 1))
            weights[self.peak] = TOTAL * _odds(self.odds) >> 8
        return table_of(np.maximum(weights, 1))

    def write(self, writer: Writer, places: np.ndarray) -> None:
        zero = _zero(places)
        writer.symbol("peak", int(self.peak != zero), 2)
        if self.peak != zero:
            writer.raw(self.peak, (len(places) - 1).bit_length())
        writer.symbol("rate", self.rate, RATES)
        writer.symbol("bend", self.bend, RATES + 1)
        writer.symbol("peak apart", int(self.odds is not None), 2)
        if self.odds is not None:
            writer.symbol("odds", self.odds, PEAKS)

    @classmethod
    def read(cls, reader: Reader, places: np.ndarray) -> Decay:
        peak = _zero(places)
        if reader.symbol("peak", 2):
            peak = reader.raw((len(places) - 1).bit_length())
        if peak >= len(places):
            raise damaged("a table's peak is outside of it")
        rate, bend = reader.symbol("rate", RATES), reader.symbol("bend", RATES + 1)
        odds = reader.symbol("odds", PEAKS) if reader.symbol("peak apart", 2) else None
        return cls(peak, rate, bend, odds)


def fitted(symbols: Symbols, apart: bool) -> Iterator[Decay]:
    """The decays that fit best, from zero and from the median, searched on a grid."""
    counts, places = symbols.counts, symbols.places
    median = int(np.searchsorted(counts.cumsum(), counts.sum() / 2))
    for peak in dict.fromkeys((_zero(places), median)):
        distance = np.minimum(np.abs(places - places[peak]), SPAN - 1)
        by_distance = np.bincount(distance, counts, SPAN).astype(np.int64)
        total = np.bincount(distance, minlength=SPAN)
        odds = None
        if apart:
            rest = int(counts.sum() - counts[peak])
            if not rest or not counts[peak]:
                continue
            ratio = int(counts[peak]) * 256 / rest
            odds = int(np.argmin([abs(np.log(_odds(i) / ratio)) for i in range(PEAKS)]))
            by_distance[0] = total[0] = 0
        used = np.flatnonzero(total)
        best = _best(_COARSE, used, by_distance[used], total[used])
        best = _best(_around(best), used, by_distance[used], total[used])
        yield Decay(peak, best // (RATES + 1), best % (RATES + 1), odds)


def _best(tried: np.ndarray, used: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> int:
    """The row of the grid by which the symbols at the `used` distances cost least: so many of them
    in all, of so many kinds."""
    weights = np.maximum(_grid()[np.ix_(tried, used)], 1).astype(np.float64)
    share = weights / (weights @ sizes)[:, None] + 2.0**-24
    return int(tried[np.argmin(-np.log2(share) @ counts)])


def _around(row: int) -> np.ndarray:
    """The rows near one of the coarse ones."""
    rate, bend = divmod(row, RATES + 1)
    rates = np.arange(max(rate - 3, 0), min(rate + 4, RATES))
    bends = np.arange(max(bend - 3, 0), min(bend + 4, RATES + 1))
    return (rates[:, None] * (RATES + 1) + bends).ravel()


_COARSE = (np.arange(0, RATES, 4)[:, None] * (RATES + 1) + np.arange(0, RATES + 1, 4)).ravel()


def profiles(rates: np.ndarray, bends: np.ndarray) -> np.ndarray:
    """Weights by distance, int64 (m, SPAN): each is the one before times a ratio, and the ratio
    itself shrinks by `bend`, in fixed point with 16 bits."""
    weight = np.full(len(rates), TOTAL, np.int64)
    ratio = ONE - _fraction(rates)
    shrink = ONE - np.where(bends > 0, _fraction(bends - 1), 0)
    rows = []
    for _ in range(SPAN):
        rows.append(weight)
        weight = weight * ratio >> 16
        ratio = ratio * shrink >> 16
    return np.stack(rows, 1)


def _fraction(index: np.ndarray) -> np.ndarray:
    """Of 2 ** 16: from 4/8 to 7/8 in four steps, and so on by halves."""
    return (4 + (index & 3)) << 13 >> (index >> 2)


def _odds(index: int) -> int:
    """Of 256."""
    return (4 + (index & 3)) << (index >> 2)


def _zero(places: np.ndarray) -> int:
    """The symbol nearest to zero, the first of two."""
    return int(np.argmin(np.abs(places)))


@cache
def _grid() -> np.ndarray:
    """The profiles of all rates, each with all bends."""
    return profiles(np.repeat(np.arange(RATES), RATES + 1), np.tile(np.arange(RATES + 1), RATES))


# --- learning


def expected(counts: np.ndarray, table: Table, strength: int) -> float:
    """What symbols cost that are counted so often, in bits. Where the table learns, their order
    doesn't matter: the product of their probabilities is a ratio of gamma functions."""
    if not strength:
        return cost(counts, table)
    start = table * (strength / TOTAL)
    gained = (gammaln(counts + start) - gammaln(start)).sum()
    return float(gammaln(counts.sum() + strength) - gammaln(strength) - gained) / log(2)


def _may_learn(count: int, size: int) -> bool:
    return count <= LEARNING_UP_TO and size <= LEARNT_SYMBOLS


def flat_bits(counts: np.ndarray) -> float:
    """What symbols cost about which nothing is known at first: hardly less by any table."""
    flat = np.full(len(counts), TOTAL / len(counts))
    return min(expected(counts, flat, strength) for strength in STRENGTHS[1::2])


def _price(writer: Writer, symbols: Symbols, table: Table, strength: int) -> float:
    """Bits, and a little for the time that a table takes which learns."""
    slow = len(symbols.values) / 256 if strength else 0
    return writer.bits + expected(symbols.counts, table, strength) + slow


def learning_tables(symbols: Symbols, start: Table, strength: int) -> np.ndarray:
    """Each symbol's table, (n, k): the start counts for `strength` symbols."""
    seen = np.zeros((len(symbols.values), len(start)), np.int64)
    rows = np.arange(len(symbols.values) - 1)
    seen[rows + 1, symbols.values[:-1]] = 1
    return table_of((seen.cumsum(0) << 24) + start * strength)


def _learnt(reader: Reader, count: int, start: Table, strength: int) -> np.ndarray:
    weights = start * strength
    found: list[int] = []

    def saw(symbol: int) -> None:
        found.append(symbol)
        weights[symbol] += TOTAL

    reader.in_turn(count, lambda: table_of(weights), saw)
    return np.array(found, np.int64)
