"""A packed student comes back bit for bit, from few bytes, and says what it can't read."""

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attar
from attar.errors import CheckpointError, StorageError, UsageError
from attar.models import build, resolve
from attar.quantize import quantize_weights, quantized_reference
from attar.student import Edit, Student
from attar.student.edits import RowGrid
from attar.student.packed import (
    pack_student,
    packed,
    packed_size,
    read_tensors,
    save_packed,
    unpack_student,
)
from network_fixture import Encoder
from test_student import IMAGES, NETS, SHAPES, WAYS, made, made_by, make_net, no_spec


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    if not same or not one.numel():
        return same
    rows = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*rows)


def assert_same(student: Student, back: Student) -> None:
    weights, again = student.module.state_dict(), back.module.state_dict()
    assert list(weights) == list(again)
    assert all(equal_bits(weights[name], again[name]) for name in weights)
    assert [e.kind for e in back.edits] == [e.kind for e in student.edits]
    for edit, other in zip(student.edits, back.edits, strict=True):
        assert json.loads(json.dumps(other.to_json())) == json.loads(json.dumps(edit.to_json()))
        assert other.tensors().keys() == edit.tensors().keys()
        for name, tensor in edit.tensors().items():
            assert equal_bits(other.tensors()[name], tensor)


class Holding(nn.Module):
    """Any tensors, as buffers."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        for place, tensor in enumerate(tensors):
            self.register_buffer(f"t{place}", tensor)

    def empty(self) -> nn.Module:
        return Holding(*(torch.zeros_like(t) for t in self.buffers()))


def there_and_back(*tensors: torch.Tensor) -> bytes:
    """Packs tensors, holds what comes back to them, and gives the bytes."""
    net = Holding(*tensors)
    data = pack_student(Student(net))
    back = unpack_student(data, build=no_spec, module=net.empty())
    assert_same(Student(net), back)
    return data


# --- there and back


@pytest.mark.parametrize("way", WAYS)
def test_a_student_comes_back(way):
    student, fresh = made_by(way), NETS.get(way, make_net)
    if way == "weights-quantized":  # it is packed with the weights as they are deployed
        student = unpack_student(pack_student(student), build=no_spec, module=fresh())
    data = pack_student(student)
    back = unpack_student(data, build=no_spec, module=fresh())
    assert_same(student, back)
    assert not any(m.training for m in back.module.modules())
    assert pack_student(back) == data
    assert packed_size(student) == len(data)


def test_a_named_network_is_built_again_with_its_whole_spec():
    spec = resolve("cifar-resnet8", channels=1, classes=10)
    student = Student(build(spec).eval(), spec)
    back = unpack_student(pack_student(student), build=build)
    assert back.spec == spec and spec.shapes_sha256
    assert_same(student, back)


TYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (5, 3, 2, 2), (300,)], ids=str)
def test_tensors_of_any_type_and_shape_come_back(kind, shape):
    torch.manual_seed(1)
    values = (torch.randn(shape) * 3).to(kind)
    there_and_back(values, torch.zeros(shape, dtype=kind), torch.ones(shape).to(kind))


def test_every_bit_pattern_of_halves_comes_back():
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.int16)
    there_and_back(halves.view(torch.float16), halves.view(torch.bfloat16))


@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 1 << 31, 0x7FC00001, 0xFF800000])))
@settings(max_examples=60, deadline=None)
def test_any_floats_come_back(bits):
    there_and_back(torch.from_numpy(np.array(bits, np.uint32).view(np.float32)))


@given(
    step=st.floats(2.0**-100, 2.0**60, width=32),
    places=st.lists(st.integers(-3000, 3000), min_size=1, max_size=60),
    minus=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_values_on_a_grid_come_back(step, places, minus):
    values = np.array(places, np.float32) * np.float32(step)
    if minus:
        values[values == 0] = -0.0
    there_and_back(torch.from_numpy(values))


def test_the_same_student_gives_the_same_bytes():
    assert pack_student(made(*WAYS["all"])) == pack_student(made(*WAYS["all"]))


def test_tied_weights_are_stored_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    apart = packed_size(Student(net))
    net[1].weight = net[0].weight
    assert packed_size(Student(net)) < apart / 2 + 10
    assert packed(Student(net)).tensors["1.weight"].form == "same"


def test_arrays_are_read_without_a_network():
    student = made(*WAYS["all"])
    arrays = read_tensors(pack_student(student))
    for name, tensor in student.module.state_dict().items():
        assert np.array_equal(arrays[name], tensor.numpy()) and arrays[name].dtype == str(
            tensor.dtype
        ).removeprefix("torch.")
    wide = read_tensors(pack_student(Student(Holding(torch.tensor([1.5, -2]).bfloat16()))))
    assert wide["t0"].dtype == np.float32 and wide["t0"].tolist() == [1.5, -2]


def test_an_edit_leaves_out_what_its_weights_say():
    student = made_by("masked")
    stored = packed(student).tensors
    assert set(stored) == set(student.module.state_dict())


class InRuns(Edit):
    """Says that a weight is made of vectors."""

    kind = "in-runs-for-a-test"

    def to_json(self):
        return {}

    @classmethod
    def from_json(cls, record, tensors):
        return cls()

    def runs(self):
        return {"weight": 4}


def test_vectors_are_stored_once_each():
    torch.manual_seed(0)
    vectors = torch.randn(8, 4)
    net = nn.Linear(16, 64, bias=False)
    with torch.no_grad():
        net.weight.copy_(vectors[torch.randint(0, 8, (256,))].reshape(64, 16))
    student = Student(net, edits=[InRuns()])
    assert packed(student).tensors["weight"].form == "runs"
    assert packed_size(student) < 256 * 3 / 8 + 8 * 4 * 4 + 60 < packed_size(Student(net))
    back = unpack_student(pack_student(student), build=no_spec, module=nn.Linear(16, 64, False))
    assert_same(student, back)
    del Edit.kinds[InRuns.kind]


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "group"),
    [("int8", None), ("int4", None), ("int4", 32), ("float16", None), ("bfloat16", None)],
)
@pytest.mark.parametrize("net", [plain_net, Encoder, make_net], ids=["cnn", "encoder", "normed"])
def test_quantized_weights_are_packed_as_deployed(precision, group, net):
    torch.manual_seed(0)
    module = net().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.3, 2)
            part.running_var.uniform_(0.2, 3)
    student = Student(module)
    traced = {"example": (IMAGES,), "dynamic_shapes": SHAPES}
    quantized = quantize_weights(student, precision, group=group, **traced)
    back = unpack_student(pack_student(quantized), build=no_spec, module=net())

    def answers(one: Student) -> torch.Tensor:
        graph = quantized_reference(one.edits, one.module, (IMAGES,), SHAPES)
        return graph(IMAGES)

    assert equal_bits(answers(quantized), answers(back))
    assert pack_student(back) == pack_student(quantized)


@pytest.mark.parametrize("net", [plain_net, Encoder, make_net], ids=["cnn", "encoder", "normed"])
def test_quantized_weights_take_as_many_bits_as_their_integers(net):
    student = Student(net().eval())
    for precision, bits in (("int8", 8), ("int4", 4)):
        quantized = quantize_weights(student, precision, example=(IMAGES,), dynamic_shapes=SHAPES)
        found = packed(quantized).tensors
        (edit,) = quantized.edits
        for path, scale in edit.scales.items():
            assert found[path].form == "rows" and found[f"0/{path}"].form == "same"
            assert found[path].bits < bits * found[path].elements + 32 * scale.numel() + 120


class OnGrids(Edit):
    """Says that a weight is made of integers and steps."""

    kind = "on-grids-for-a-test"

    def __init__(self, steps, length):
        self.grid = RowGrid(steps, length)

    def to_json(self):
        return {}

    @classmethod
    def from_json(cls, record, tensors):
        return cls(torch.ones(1, 1), None)

    def row_grids(self):
        return {"weight": self.grid}


del Edit.kinds[OnGrids.kind]


@pytest.mark.parametrize("length", [None, 1, 7, 10, 0, -1, 99])
@pytest.mark.parametrize("special", [0.25, 0.0, -0.3, float("nan"), float("inf")])
def test_weights_come_back_whatever_grids_an_edit_says(length, special, monkeypatch):
    monkeypatch.setitem(Edit.kinds, OnGrids.kind, OnGrids)
    torch.manual_seed(0)
    groups = 1 if length is None else -(-10 // max(length, 1))
    steps = torch.rand(12, groups)
    steps[0] = special
    each = steps.repeat_interleave(length or 10, 1)[:, :10] if (length or 1) > 0 else steps[:, :1]
    net = nn.Linear(10, 12, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.randint(-9, 9, (12, 10)) * each + 0.0)
        net.weight[0, :5] = 0
    student = Student(net, edits=[OnGrids(steps, length)])
    back = unpack_student(pack_student(student), build=no_spec, module=nn.Linear(10, 12, False))
    assert equal_bits(back.module.weight, net.weight)


# --- files


def test_a_file_is_loaded(tmp_path):
    spec = resolve("cifar-resnet8", channels=1, classes=10)
    student = Student(build(spec).eval(), spec)
    save_packed(student, tmp_path / "new" / "student.attar")
    assert_same(student, attar.load_student(tmp_path / "new" / "student.attar"))
    with pytest.raises(UsageError, match="no stage"):
        attar.load(tmp_path / "new" / "student.attar", stage="01-distill")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "student.attar"
    save_packed(made(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"^\S*student\.attar: the packed student is damaged"):
        attar.load(path, model=make_net())


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StorageError, match="no room left to write"):
        save_packed(made(), tmp_path / "student.attar")
    assert list(tmp_path.iterdir()) == []


# --- what is refused


def test_a_module_from_python_must_be_handed_in_again():
    with pytest.raises(CheckpointError, match=r"model=MyNetwork\(\)"):
        unpack_student(pack_student(made()), build=no_spec)


def test_another_network_is_refused():
    with pytest.raises(CheckpointError, match="don't fit the network"):
        unpack_student(pack_student(made()), build=no_spec, module=nn.Linear(3, 3))


def test_something_else_is_refused():
    for data in (b"", b"AT", b"PK\3\4something", bytes(100)):
        with pytest.raises(CheckpointError, match="no packed student"):
            read_tensors(data)


def test_a_newer_version_is_refused():
    data = bytearray(pack_student(made()))
    data[3] = 3
    with pytest.raises(CheckpointError, match="version 3; this Attar reads up to 2: upgrade attar"):
        read_tensors(bytes(data))


def test_a_draft_s_version_is_refused():
    data = bytearray(pack_student(made()))
    data[3] = 1
    with pytest.raises(CheckpointError, match="version 1, an early draft's: pack its run again"):
        read_tensors(bytes(data))


def test_tensors_beyond_the_limit_are_refused_before_they_are_made():
    data = pack_student(Student(Holding(torch.zeros(1 << 13, 1 << 9))))
    assert len(data) < 60
    with pytest.raises(CheckpointError, match="over the limit of 1,000"):
        read_tensors(data, limit=1000)
    larger = pack_student(Student(Holding(torch.zeros(1 << 13, 1 << 11))))
    with pytest.raises(CheckpointError, match="belongs to another network"):
        unpack_student(larger, build=no_spec, module=Holding(torch.zeros(3)))


def test_a_type_without_a_place_is_refused():
    with pytest.raises(CheckpointError, match="t0 is of type complex128"):
        pack_student(Student(Holding(torch.zeros(2, dtype=torch.complex128))))


def test_a_header_that_unfolds_without_end_is_refused():
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(bytes(1 << 25)) + deflate.flush()
    data = b"ATR\x02" + zlib.crc32(body).to_bytes(4, "little") + body
    with pytest.raises(CheckpointError, match="header has no end"):
        read_tensors(data)
