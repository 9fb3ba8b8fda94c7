"""Students in one file: `pack_student` there, `unpack_student` back, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from attar.models.base import ModelSpec
from attar.models.building import shapes_of
from attar.student.edits import Edit, kind_of
from attar.student.fingerprint import tensors_sha256
from attar.student.packed import tensors as coded
from attar.student.packed.ans import Reader, Writer
from attar.student.packed.container import Header, seal, unseal
from attar.student.packed.damage import damaged
from attar.student.packed.elements import Elements
from attar.student.packed.rows import fitting
from attar.student.saving import assembled, fresh_network, record_of, spec_from
from attar.student.student import Student

LIMIT = 1 << 30
"""Bytes that the tensors of a file may take where no network says how many they should."""
SPARE = 1 << 24
PLACE = "the packed student"


class Packed(NamedTuple):
    """data: the file. tensors: how each is stored, by name, in the file's order; those of edits
    are named by the edit's place: `0/conv.weight`."""

    data: bytes
    tensors: dict[str, coded.Stored]


def pack_student(student: Student) -> bytes:
    """The student as the bytes of a `.attar` file, which `unpack_student` takes back bit for bit.

    The same student gives the same bytes. Raises `CheckpointError` for a tensor of a type that the
    file has no place for.

    Example:
        >>> data = pack_student(Student(nn.Linear(4, 2)))
        >>> data[:3]
        b'ATR'
    """
    return packed(student).data


def packed_size(student: Student) -> int:
    """The bytes of the student's `.attar` file."""
    return len(pack_student(student))


def coded_size(tensors: Mapping[str, Tensor]) -> float:
    """The bytes that tensors take in a packed file, without what is around them.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> coded_size(dict(layer.named_parameters())) < packed_size(Student(layer))
        True
    """
    writer = Writer()
    elements = [Elements.of(name, tensor) for name, tensor in tensors.items()]
    coded.write_tensors(writer, elements, [coded.Hint() for _ in elements])
    return writer.bits / 8


def packed(student: Student) -> Packed:
    """As `pack_student`, with what each tensor came to."""
    student = _settled(student)
    weights = student.module.state_dict()
    records = [json.loads(json.dumps(record_of(edit))) for edit in student.edits]
    beside = {
        f"{place}/{name}": tensor
        for place, (edit, record) in enumerate(zip(student.edits, records, strict=True))
        for name, tensor in _said(edit, record, weights).items()
    }
    record: dict[str, Any] = {"spec": _short_spec(student.spec)} if student.spec else {}
    if records:
        promise = tensors_sha256(weights)
        record["edits"] = [_short_record(each, promise, weights) for each in records]
    elements = [Elements.of(name, tensor) for name, tensor in {**weights, **beside}.items()]
    writer = Writer()
    hints = [*_hints(student.edits, weights), *(coded.Hint() for _ in beside)]
    stored = coded.write_tensors(writer, elements, hints)
    data = seal(Header(record, list(weights), list(beside)), writer.finish())
    return Packed(data, dict(zip([*weights, *beside], stored, strict=True)))


def unpack_student(
    data: bytes,
    *,
    build: Callable[[ModelSpec], nn.Module],
    module: nn.Module | None = None,
) -> Student:
    """The student that `pack_student` packed.

    build, module: as of `attar.student.load_student`. Raises `CheckpointError` for data that are
    damaged, from a newer version, or of another network; nothing large is allocated before that.

    Example:
        >>> data = pack_student(Student(nn.Linear(4, 2)))
        >>> unpack_student(data, build=build, module=nn.Linear(4, 2)).module  # doctest: +SKIP
        Linear(in_features=4, out_features=2, bias=True)
    """
    header, streams = unseal(data)
    spec, network = _network(header.record.get("spec"), build, module)
    limit = 4 * sum(t.numel() * t.element_size() for t in network.state_dict().values()) + SPARE
    found = coded.read_tensors(Reader(streams), len(header.weights) + len(header.edits), limit)
    weights = {
        name: elements.tensor()
        for name, elements in zip(header.weights, islice(found, len(header.weights)), strict=True)
    }
    beside = {name: elements.tensor() for name, elements in zip(header.edits, found, strict=True)}
    return assembled(network, spec, _edits(header.record, weights, beside), weights, PLACE)


def read_tensors(data: bytes, *, limit: int = LIMIT) -> dict[str, np.ndarray]:
    """A packed student's weights by name, without building its network.

    bfloat16 is widened to float32; 8-bit floats are given as their bits. limit: bytes that the
    tensors may take together, edits' tensors included. Raises `CheckpointError`.

    Example:
        >>> read_tensors(pack_student(Student(nn.Linear(4, 2))))["weight"].shape
        (2, 4)
    """
    header, streams = unseal(data)
    found = coded.read_tensors(Reader(streams), len(header.weights) + len(header.edits), limit)
    return {
        name: elements.array()
        for name, elements in zip([*header.weights, *header.edits], found, strict=True)
        if name in set(header.weights)
    }


def _settled(student: Student) -> Student:
    if not student.edits:
        return student
    student = student.copy()
    # the last first: a quantization moves the weights that a codebook before it then counts
    settled = [edit.settled(student.module) for edit in reversed(student.edits)]
    return Student(student.module, student.spec, settled[::-1])


def _hints(edits: Sequence[Edit], weights: Mapping[str, Tensor]) -> list[coded.Hint]:
    """What the edits say of the weights."""
    runs = {path: run for edit in edits for path, run in edit.runs().items()}
    grids = {path: grid for edit in edits for path, grid in edit.row_grids().items()}
    return [
        coded.Hint(runs.get(name, 1), fitting(grids.get(name), tensor))
        for name, tensor in weights.items()
    ]


def _said(edit: Edit, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An edit's tensors that don't follow from its record and the weights."""
    with kind_of(record) as kind:
        implied = kind.implied(record, weights)
    return {
        name: tensor
        for name, tensor in edit.tensors().items()
        if name not in implied or not _same(implied[name], tensor)
    }


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are of the same type and shape, and equal bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = Elements.of("", one), Elements.of("", other)
    return np.array_equal(first.bits, second.bits)


def _edits(
    record: dict[str, Any], weights: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> list[Edit]:
    records = record.get("edits", [])
    if not isinstance(records, list):
        raise damaged("its edits are no list")
    promise = tensors_sha256(weights) if records else ""
    edits = []
    for place, short in enumerate(records):
        long = _long_record(short, promise, weights)
        prefix = f"{place}/"
        own = {k.removeprefix(prefix): t for k, t in beside.items() if k.startswith(prefix)}
        with kind_of(long) as kind:
            edits.append(kind.from_json(long, {**kind.implied(long, weights), **own}))
    return edits


# What follows from the file's own tensors isn't written again: a hash takes 32 bytes.


def _short_spec(spec: ModelSpec) -> dict[str, Any]:
    record = spec.model_dump(exclude_defaults=True)
    return record | ({"shapes_sha256": True} if spec.shapes_sha256 else {})


def _network(
    record: Any, build: Callable[[ModelSpec], nn.Module], module: nn.Module | None
) -> tuple[ModelSpec | None, nn.Module]:
    """A fresh network and its spec, with the hash of the shapes that it was built in."""
    left_out = isinstance(record, dict) and record.get("shapes_sha256") is True
    spec = spec_from(record | {"shapes_sha256": None} if left_out else record, PLACE)
    network = fresh_network(spec, PLACE, build, module)
    if spec is not None and left_out:
        spec = spec.model_copy(update={"shapes_sha256": shapes_of(network)})
    return spec, network


def _short_record(
    record: dict[str, Any], promise: str, weights: Mapping[str, Tensor]
) -> dict[str, Any]:
    with kind_of(record) as kind:
        short = kind.shortened(record, weights)
    return short | ({"weights_sha256": True} if record.get("weights_sha256") == promise else {})


def _long_record(record: Any, promise: str, weights: Mapping[str, Tensor]) -> Any:
    if isinstance(record, dict) and record.get("weights_sha256") is True:
        record = record | {"weights_sha256": promise}
    with kind_of(record) as kind:
        return kind.lengthened(record, weights)
