"""Symbols whose low bits are stored apart: they come back, and say little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import CheckpointError
from attar.student.packed import split
from attar.student.packed.ans import Reader, Writer
from attar.student.packed.models import SPLIT, Models, Symbols


@given(
    st.integers(65, 4096),
    st.sampled_from(["even", "normal", "peaked"]),
    st.floats(0, 0.3),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_symbols_come_back_whatever_is_split_off(size, law, loss, seed):
    draw = np.random.default_rng(seed)
    drawn = {
        "even": lambda: draw.integers(0, size, 20_003),
        "normal": lambda: draw.normal(size / 2, size / 8, 20_003),
        "peaked": lambda: draw.laplace(size / 3, 2, 20_003),
    }[law]()
    values = np.clip(drawn, 0, size - 1).astype(np.uint8 if size <= 256 else np.uint16)
    places = np.arange(size) - size // 3
    writer = Writer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "LOSS", loss)
        Models().write(writer, Symbols.of(values, places))
    streams = writer.finish()
    assert abs(sum(map(len, streams)) - writer.bits / 8) < 16
    reader = Reader(iter([*streams, None]).__next__)
    back = Models().read(reader, len(values), places, np.arange(size))
    assert np.array_equal(back, values)
    reader.finish()


def test_low_bits_that_say_something_stay_with_the_others():
    even = np.full(256, 1000)
    assert split.spare_bits(even) == 8
    assert split.spare_bits(np.where(np.arange(256) % 2, 1000, 1)) == 0
    bell = np.exp(-(((np.arange(256) - 128) / 30) ** 2) / 2)
    assert split.spare_bits((bell * 40_000).astype(int)) == 3


def test_no_symbols_are_read_by_a_split():
    writer = Writer()
    writer.symbol("model", SPLIT, 4)
    writer.symbol("low bits", 7, 16)
    reader = Reader(iter([*writer.finish(), None]).__next__)
    assert not len(Models().read(reader, 0, np.arange(100), np.arange(100)))


@pytest.mark.parametrize(("bits", "said"), [(0, "splits symbols into nothing"), (7, "stand for")])
def test_low_bits_beyond_the_values_are_refused(bits, said):
    writer = Writer()
    writer.symbol("model", SPLIT, 4)
    writer.symbol("low bits", bits, 16)
    for _ in range(bits):
        writer.plain(np.full(2, 255, np.uint8))
    reader = Reader(iter([*writer.finish(), None]).__next__)
    with pytest.raises(CheckpointError, match=said):
        Models().read(reader, 16, np.arange(100), np.arange(100))
