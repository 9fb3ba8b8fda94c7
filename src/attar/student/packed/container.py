"""The file around the coded tensors: what it is, whether it is whole, and its header.

    magic "ATR", version (1 byte), CRC-32 of all that follows (4 bytes), header, streams

The header is JSON, `[record, names of weights, names of edits' tensors]`, deflated with a preset
dictionary; the deflated data end by themselves. Streams each come with their length before them,
but for the last, which has 0.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from attar.errors import CheckpointError
from attar.student.packed.damage import damaged

MAGIC = b"ATR"
VERSION = 2
"""Version 1 was an early draft's, before 0.1.0."""
LARGEST_HEADER = 1 << 24
MOST_TENSORS = 1 << 16
START = 8
DICTIONARY = (
    b'[{"spec":{"model":"cifar-resnet20","arguments":{"image_size":28},"channels":1,"classes":10,'
    b'"library":{"torchvision":"0.2","transformers":"5.","timm":"1.0","attar":"0.1.0"},'
    b'"shapes_sha256":true},"edits":[{"kind":"shared","tensors":{'
    b'"layer1.0.conv1.weight":{"size":16,"shape":[16,16,3,3],"zero":null},"zero":0}}},'
    b'{"kind":"masked","shapes":{"kind":"quantized","scheme":{"runtime":"onnxruntime",'
    b'"weight_bits":8,"float_layers":[],"observer":"mse","calibration":512},"weights_sha256":true,'
    b'"patterns":{}}]},["features.","layer1.0.","downsample.0.","classifier.","self_attn.in_proj_",'
    b'"blocks.0.","norm1.","encoder.","bn1.weight","bn1.bias","bn1.running_mean",'
    b'"bn1.running_var","bn1.num_batches_tracked","conv2.weight","conv2.bias","fc.weight","fc.bias",'
    b'"linear1.weight","linear1.bias","linear2.weight","linear2.bias"],[]]'
)


class Header(NamedTuple):
    """record: of the spec and the edits. weights, edits: names of tensors, in the file's order."""

    record: dict[str, Any]
    weights: list[str]
    edits: list[str]


def seal(header: Header, streams: Sequence[bytes]) -> bytes:
    """The file's bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    body = b"".join([_deflated(text.encode()), *_prefixed(streams)])
    return MAGIC + bytes([VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body


def unseal(data: bytes) -> tuple[Header, Callable[[], memoryview | None]]:
    """The header, and what gives the streams one after another.

    Raises `CheckpointError` for anything but a whole file of this version.
    """
    if not data.startswith(MAGIC):
        raise CheckpointError("this is no packed student: it doesn't begin as one")
    if len(data) < START:
        raise damaged("it ends too early")
    if data[3] > VERSION:
        raise CheckpointError(
            f"the packed student has version {data[3]}; this Attar reads up to {VERSION}: upgrade "
            "attar"
        )
    if data[3] < VERSION:
        raise CheckpointError(
            f"the packed student has version {data[3]}, an early draft's: pack its run again by "
            "`attar pack`"
        )
    body = memoryview(data)[START:]
    if zlib.crc32(body) != int.from_bytes(data[4:START], "little"):
        raise damaged("its checksum is wrong, so some of it is missing or changed")
    text, rest = _inflated(body)
    return _header(text), _streams(rest)


def _header(text: bytes) -> Header:
    try:
        header = Header(*json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(f"its header can't be read: {error}") from None
    fits = isinstance(header.record, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in header[1:]
    )
    if not fits or any(len(set(names)) != len(names) for names in header[1:]):
        raise damaged("its header has no record, or no names")
    if len(header.weights) + len(header.edits) > MOST_TENSORS:
        raise damaged(f"it has more than {MOST_TENSORS:,} tensors")
    return header


def _deflated(text: bytes) -> bytes:
    shortest = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return shortest.compress(text) + shortest.flush()


def _inflated(body: memoryview) -> tuple[bytes, memoryview]:
    """The header, and what comes after it."""
    inflate = zlib.decompressobj(-15, DICTIONARY)
    text, read = b"", 0
    try:
        while not inflate.eof and read < len(body) and len(text) <= LARGEST_HEADER:
            piece = body[read : read + 4096]
            read += len(piece)
            text += inflate.decompress(piece, LARGEST_HEADER + 1 - len(text))
    except zlib.error as error:
        raise damaged(f"its header can't be read: {error}") from None
    if not inflate.eof or len(text) > LARGEST_HEADER:
        raise damaged("its header has no end")
    return text, body[read - len(inflate.unused_data) :]


def _prefixed(streams: Sequence[bytes]) -> list[bytes]:
    *before, last = streams
    return [part for stream in before for part in (_varint(len(stream)), stream)] + [b"\0", last]


def _streams(rest: memoryview) -> Callable[[], memoryview | None]:
    """Gives the streams in turn, `None` after the last."""
    left: memoryview | None = rest

    def following() -> memoryview | None:
        nonlocal left
        if left is None:
            return None
        length, start = _read_varint(left)
        stream = left[start : start + length] if length else left[start:]
        if len(stream) < length:
            raise damaged("it ends too early")
        left = left[start + length :] if length else None
        return stream

    return following


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    digits = []
    while number >= 128:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _read_varint(data: memoryview) -> tuple[int, int]:
    """A number, and where it ends."""
    number = 0
    for place, byte in enumerate(data[:9]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, place + 1
    raise damaged("it ends too early")
