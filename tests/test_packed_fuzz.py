"""No bytes make a packed student's reader fall over, wait, or take memory without end."""

import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError, CheckpointError
from attar.prune import criteria, prune_weights
from attar.quantize import quantize_weights
from attar.student import Student
from attar.student.packed import pack_student, read_tensors, unpack_student
from attar.student.packed.container import Header, seal
from attar.student.packed.student import _settled

LIMIT = 1 << 20
START = 8


class Zoo(nn.Module):
    """A tensor for every form: constant, planes, codebook (listed, on a grid), sparse, the same;
    rows once the layer is quantized."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        grid = torch.randn(6, 10, generator=draw).mul(5).round() * 0.25 + 0.0
        self.register_buffer("ones", torch.ones(5))
        self.register_buffer("planes", torch.randn(30, generator=draw))
        self.register_buffer("listed", torch.tensor([0.1, 0.7, -3.3])[torch.arange(60) % 3])
        self.register_buffer("grid", grid)
        self.register_buffer("again", grid.clone())
        columns = torch.rand(12, 20, generator=draw) < torch.rand(20, generator=draw) ** 4
        self.register_buffer("sparse", torch.randn(12, 20, generator=draw) * columns)
        self.register_buffer("steps", torch.tensor(700))
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def zoo() -> Student:
    torch.manual_seed(0)
    magnitude = criteria.get("magnitude")()
    pruned = prune_weights(Student(Zoo()), criterion=magnitude, ratio=0.5)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    example = (torch.randn(4, 16),)
    return quantize_weights(pruned, "int8", group=6, example=example, dynamic_shapes=shapes)


DATA = pack_student(zoo())


def resealed(body: bytes) -> bytes:
    """A file whose checksum is right."""
    return DATA[:4] + zlib.crc32(body).to_bytes(4, "little") + body


def try_reading(data: bytes) -> None:
    """Reads it, or says in one sentence why not."""
    for read in (
        lambda: read_tensors(data, limit=LIMIT),
        lambda: unpack_student(data, build=Zoo, module=Zoo()),
    ):
        try:
            read()
        except AttarError as error:
            assert "\n" not in str(error)


def test_the_zoo_has_every_form():
    from attar.student.packed import packed

    forms = {stored.form for stored in packed(zoo()).tensors.values()}
    assert forms == {"constant", "planes", "codebook", "same", "sparse", "rows"}


def test_a_file_cut_anywhere_is_refused():
    for end in range(len(DATA)):
        with pytest.raises(CheckpointError):
            read_tensors(DATA[:end])


def test_a_bit_flipped_anywhere_is_noticed():
    for place in range(len(DATA)):
        for bit in (0, 3, 7):
            changed = bytearray(DATA)
            changed[place] ^= 1 << bit
            with pytest.raises(CheckpointError):
                read_tensors(bytes(changed))


def test_bytes_too_many_are_refused():
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(resealed(DATA[START:] + b"\1"))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_changed_bytes_with_a_right_checksum_are_read_or_refused(data):
    body = bytearray(DATA[START:])
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        body[data.draw(st.integers(0, len(body) - 1), "place")] = data.draw(st.integers(0, 255))
    try_reading(resealed(bytes(body)))


def header_length() -> int:
    """Where the streams begin: their bytes are what a decoder walks through."""
    from attar.student.packed.container import _inflated

    body = memoryview(DATA)[START:]
    return len(body) - len(_inflated(body)[1])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_stream_under_a_whole_header_is_read_or_refused(data):
    stream = data.draw(st.binary(max_size=300))
    try_reading(resealed(DATA[START : START + header_length()] + stream))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({}, optional={"spec": JSON, "edits": JSON}) | JSON,
    JSON | st.lists(st.text(max_size=5)),
    JSON | st.just([]),
    st.binary(max_size=40),
)
@settings(max_examples=100, deadline=None)
def test_any_header_is_read_or_refused(record, weights, edits, stream):
    try_reading(seal(Header(record, weights, edits), [stream]))


def test_a_few_bytes_take_no_memory():
    """Ten thousand tensors of as many elements as a decoder can be told of."""
    names = [str(i) for i in range(10_000)]
    data = seal(Header({}, names, []), [bytes(range(1, 256)) * 8])
    tracemalloc.start()
    try:
        try_reading(data)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_too_many_tensors_are_refused():
    data = seal(Header({}, [str(i) for i in range(70_000)], []), [b""])
    with pytest.raises(CheckpointError, match="more than 65,536 tensors"):
        read_tensors(data)


def test_a_dimension_without_elements_claims_no_memory():
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("t", torch.empty(1 << 40, 0))

    with pytest.raises(CheckpointError, match="over the limit"):
        read_tensors(pack_student(Student(Empty())))


def test_what_was_read_is_what_was_packed():
    arrays = read_tensors(DATA)
    for name, tensor in _settled(zoo()).module.state_dict().items():
        assert np.array_equal(arrays[name], tensor.numpy())
