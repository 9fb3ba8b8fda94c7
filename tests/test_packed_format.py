"""docs/packed-format.md says what is in a packed file: a reader written from it alone reads one."""

from __future__ import annotations

import json
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attar.student import Student
from attar.student.packed import ans, models, pack_student, packed, split, unpack_student
from attar.student.packed.split import write_low
from attar.student.packed.student import _settled
from test_packed_fuzz import zoo
from test_student import WAYS, made_by

PAGE = (Path(__file__).parents[1] / "docs" / "packed-format.md").read_text(encoding="utf-8")
TOTAL = 2**24


def fenced(mark: str) -> str:
    """The block of the page after a mark."""
    found = re.search(rf"<!-- {mark} -->\n\n```text\n(.*?)```", PAGE, re.S)
    assert found
    return found[1]


DICTIONARY = fenced("the preset dictionary").replace("\n", "").encode()
EXAMPLE = bytes.fromhex(fenced("the example"))
(LISTED,) = re.findall(r'`symbol\("type", 32\)`: (.*?)\.\n', PAGE, re.S)
TYPES = {int(n): name for n, name in re.findall(r"(\d+) (\w+)", LISTED.replace("\n", " "))}
WIDTHS = {"bool": 8, "bfloat16": 16, "complex64": 64, "float8_e4m3fn": 8, "float8_e5m2": 8}


def width_of(kind: str) -> int:
    return WIDTHS.get(kind) or int(re.sub(r"\D", "", kind))


def is_float(kind: str) -> bool:
    return "float" in kind


# --- symbols


def table(weights: list[int]) -> list[int]:
    k, total = len(weights), sum(weights)
    f = [1 + w * (TOTAL - k) // total for w in weights]
    f[weights.index(max(weights))] += TOTAL - sum(f)
    return f


def part(i: int) -> int:
    return ((4 + i % 4) << 13) >> (i // 4)


def profile(rate: int, bend: int) -> list[int]:
    weight, ratio = TOTAL, 2**16 - part(rate)
    shrink = 2**16 - part(bend - 1) if bend else 2**16
    weights = []
    for _ in range(512):
        weights.append(weight)
        weight, ratio = weight * ratio >> 16, ratio * shrink >> 16
    return weights


def count_of(code: int, m: int) -> int:
    e = (code >> m) - 1
    return code if code >> m < 2 else ((code - (e << m)) << e) + (1 << e) // 2


class Symbols:
    """What the page calls symbols."""

    def __init__(self, data: bytes) -> None:
        self.rest = data
        self.counts: dict[tuple[str, int], list[int]] = {}
        self.begin()

    def begin(self) -> None:
        length = shift = 0
        while True:
            byte, self.rest = self.rest[0], self.rest[1:]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        end = length or len(self.rest)
        stream, self.rest = self.rest[:end], self.rest[end:]
        stream += bytes(-len(stream) % 4)
        self.words = list(struct.unpack(f"<{len(stream) // 4}I", stream))
        self.state = self.read = 0
        self.refill()

    def refill(self) -> None:
        while self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def one(self, f: list[int]) -> int:
        assert sum(f) == TOTAL and min(f) >= 1
        q, ends = self.state % TOTAL, list(accumulate(f))
        s = bisect_right(ends, q)
        self.take(f[s], q - (ends[s] - f[s]))
        return s

    def take(self, f: int, above: int) -> None:
        self.state = (self.state >> 24) * f + above
        self.refill()

    def piece(self, tables: list[list[int]]) -> list[int]:
        found = [self.one(f) for f in tables]
        self.passed(len(found))
        return found

    def even(self, n: int, count: int = 1) -> list[int]:
        """A piece of the table whose parts are alike, but for the last."""
        found, each = [], TOTAL // n
        for _ in range(count):
            q = self.state % TOTAL
            found.append(min(q // each, n - 1))
            self.take(each + (TOTAL % n if found[-1] == n - 1 else 0), q - each * found[-1])
        self.passed(count)
        return found

    def passed(self, count: int) -> None:
        self.read += count
        if self.read >= ans.BLOCK:
            assert self.state == 0 and not self.words
            self.begin()

    def uniform(self, n: int) -> int:
        if n == 1:
            return 0
        return self.even(n)[0]

    def raw(self, bits: int) -> int:
        value = shift = 0
        while shift < bits:
            width = min(16, bits - shift)
            value |= self.uniform(2**width) << shift
            shift += width
        return value

    def symbol(self, name: str, n: int) -> int:
        counts = self.counts.setdefault((name, n), [1] * n)
        (s,) = self.piece([table(counts)])
        counts[s] += 2 + n // 4
        return s

    def number(self, name: str) -> int:
        length = self.symbol(name, 64)
        return 2 ** (length - 1) + self.raw(length - 1) if length else 0

    def array(self, count: int, f: list[int]) -> list[int]:
        k = len(f)
        group = 1 if count < 16384 or k > 64 else 4 if k <= 4 else 2
        many = f
        for _ in range(group.bit_length() - 1):
            many = table([a * b >> 24 for a in many for b in many])
        groups = list(product(range(k), repeat=group))
        whole = count // group
        found: list[int] = []
        for start in range(0, whole, ans.PIECE):
            for joined in self.piece([many] * min(ans.PIECE, whole - start)):
                found += groups[joined]
        if left := count - whole * group:
            found += self.piece([f] * left)
        return found

    def bytes(self, count: int) -> list[int]:
        found: list[int] = []
        whole = count // 3
        for start in range(0, whole, ans.PIECE):
            for triple in self.even(TOTAL, min(ans.PIECE, whole - start)):
                found += [triple >> 16, triple >> 8 & 255, triple & 255]
        if left := count % 3:
            found += self.even(256, left)
        return found


# --- tensors


def floats(bits: list[int]) -> list[float]:
    return np.array(bits, np.uint32).view(np.float32).tolist()


class Tensors:
    """What the page calls tensors."""

    def __init__(self, symbols: Symbols) -> None:
        self.s = symbols
        self.kept: list[list[int]] = []
        self.recent: list[int] = []
        self.found: list[tuple[str, tuple[int, ...], list[int]]] = []

    def tensor(self) -> tuple[str, tuple[int, ...], list[int]]:
        s = self.s
        if self.found and s.symbol("same", 2):
            self.found.append(self.found[-1 - s.number("same as")])
            return self.found[-1]
        kind = TYPES[s.symbol("type", 32)]
        count = s.symbol("dimensions", 8)
        if count == 7:
            count = s.number("dimensions")
        shape = []
        for _ in range(count):
            p = s.symbol("dimension", 16)
            size = s.number("dimension") if p == 15 else self.recent[p]
            self.recent = [size, *(r for r in self.recent if r != size)][:15]
            shape.append(size)
        bits = self.block(kind, tuple(shape)) if prod(shape) else []
        self.found.append((kind, tuple(shape), bits))
        return self.found[-1]

    def block(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        forms: list[Callable[[str, tuple[int, ...]], list[int]]]
        forms = [self.constant, self.planes, self.codebook, self.sparse, self.runs]
        forms.append(self.rows)
        return forms[self.s.symbol("form", 8)](kind, shape)

    def constant(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        width = width_of(kind)
        if is_float(kind):
            z = self.s.symbol("zero bits", width + 1)
            return [self.s.raw(width - z) << z] * prod(shape)
        return [self.s.raw(self.s.symbol("integer bits", width + 1))] * prod(shape)

    def planes(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        count, width = prod(shape), width_of(kind)
        bits = [0] * count
        for _ in range(width // 8):
            if self.s.symbol("plane", 2):
                low, high = self.s.raw(8), self.s.raw(8)
                plane = [low + x for x in self.coded(count, list(range(high - low + 1)))]
            else:
                plane = self.s.bytes(count)
            bits = [b << 8 | x for b, x in zip(bits, plane, strict=True)]
        if is_float(kind):
            bits = [b >> 1 | (b & 1) << (width - 1) for b in bits]
        return bits

    def codebook(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        s, width = self.s, width_of(kind)
        size = s.number("codebook size") + 1
        if width != 32 or not s.symbol("codebook", 2):
            values = [s.raw(width) for _ in range(size)]
            places = [i - size // 2 for i in range(size)]
        else:
            exponent, z = s.symbol("exponent", 256), s.symbol("trailing zeros", 24)
            (step,) = struct.unpack("<f", struct.pack("<I", exponent << 23 | s.raw(23 - z) << z))
            zeros = s.symbol("zeros", 3)
            sign = s.symbol("below zero", 2)
            places = [s.number("first place") * (-1 if sign else 1)]
            more = size - 1 - (zeros == 2)
            gaps = s.symbol("gaps", 2) if more else 0
            for _ in range(more):
                places.append(places[-1] + 1 + (s.number("gap") if gaps else 0))
            values = [int((np.float32(p) * np.float32(step)).view(np.uint32)) for p in places]
            if zeros:
                at = places.index(0)
                if zeros == 2:
                    places.insert(at, 0)
                    values.insert(at, 0)
                values[at] = 1 << 31
        return [values[i] for i in self.coded(prod(shape), places)]

    def sparse(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        s = self.s
        kept = [
            [i for i, flag in enumerate(self.coded(size, [0, 1])) if flag]
            if s.symbol("slices", 2)
            else list(range(size))
            for size in shape
        ]
        inner = list(product(*kept))
        order = s.symbol("order", 3)
        rows, columns = len(kept[0]), len(inner) // len(kept[0])
        if order == 1:
            flags = [f for row in self.densities(rows, columns) for f in row]
        elif order == 2:
            turned = self.densities(columns, rows)
            flags = [turned[j][i] for i in range(rows) for j in range(columns)]
        else:
            alone = s.symbol("zeros", 2)
            flags = self.coded(len(inner), [0, 1]) if alone else [1] * len(inner)
        found = np.zeros(shape, np.uint64)
        places = [place for place, flag in zip(inner, flags, strict=True) if flag]
        for place, bits in zip(places, self.block(kind, (len(places),)), strict=True):
            found[place] = bits
        return [int(x) for x in found.ravel()]

    def runs(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        run, size = self.s.number("run"), self.s.number("codebook size") + 1
        vectors = self.block(kind, (size * run,))
        indices = self.coded(prod(shape) // run, list(range(size)))
        return [x for i in indices for x in vectors[i * run : (i + 1) * run]]

    def rows(self, kind: str, shape: tuple[int, ...]) -> list[int]:
        length, columns = self.s.number("group"), prod(shape[1:])
        groups = -(-columns // length)
        bits = self.block(kind, (shape[0] * groups,))
        self.found.append((kind, (shape[0], groups), bits))
        integers = self.block(kind, shape)
        found = []
        for place, integer in enumerate(floats(integers)):
            row, column = divmod(place, columns)
            step = floats(bits)[row * groups + column // length]
            product = np.float32(integer) * np.float32(step) if integer else np.float32(0)
            found.append(int(product.view(np.uint32)))
        return found

    def densities(self, rows: int, columns: int) -> list[list[int]]:
        codes = self.coded(rows, list(range(self.s.number("densest") + 1)))
        starts = [min(max(count_of(i, 1), 1), 4095) for i in range(24)]
        counts = [[4 * (4096 - p), 4 * p] for p in starts]
        seen = [0] * (columns + 2)
        found = []
        for code in codes:
            dense, levels = count_of(code, 1), []
            for j in range(1, columns + 1):
                b = 2 * seen[j] + seen[j - 1] + seen[j + 1] + 2
                c = min(4095, ((b * dense) << 12) // (4 * sum(seen) + 2 * columns))
                e = max(c.bit_length() - 2, 0)
                levels.append(2 * e + (c >> e))
            flags = self.s.piece([table(counts[level]) for level in levels])
            for j, (level, flag) in enumerate(zip(levels, flags, strict=True), 1):
                counts[level][flag] += 4096
                seen[j] += flag
            found.append(flags)
        return found

    # --- coded symbols

    def coded(self, count: int, places: list[int]) -> list[int]:
        k, s = len(places), self.s
        if k == 1:
            return [0] * count
        models = [self.counted, self.decaying, self.earlier]
        model = s.symbol("model", 4)
        if model == 3:
            return self.split(count, places)
        f = models[model](places)
        self.kept = [f, *self.kept][:8]
        learning = s.symbol("learning", 8) if count <= 4096 and k <= 512 else 0
        strength = [0, 4, 8, 16, 32, 64, 128, 256][learning]
        if not strength:
            return s.array(count, f)
        weights = [x * strength for x in f]
        found = []
        for _ in range(count):
            found.append(s.one(table(weights)))
            weights[found[-1]] += TOTAL
        s.passed(count)
        return found

    def counted(self, places: list[int]) -> list[int]:
        m, rate = self.s.symbol("mantissa", 8), self.s.symbol("steps", 56)
        weights = profile(rate, 0)
        g = table([max(1, weights[min((z + 1) // 2, 511)]) for z in range(128 << m)])
        steps = [-(z + 1) // 2 if z % 2 else z // 2 for z in self.s.array(len(places), g)]
        return table([count_of(c, m) for c in accumulate(steps)])

    def decaying(self, places: list[int]) -> list[int]:
        s, k = self.s, len(places)
        peak = min(range(k), key=lambda i: (abs(places[i]), i))
        if s.symbol("peak", 2):
            peak = s.raw((k - 1).bit_length())
        weights = profile(s.symbol("rate", 56), s.symbol("bend", 57))
        w = [max(1, weights[min(abs(p - places[peak]), 511)]) for p in places]
        if s.symbol("peak apart", 2):
            odds = s.symbol("odds", 64)
            w[peak] = 1
            w = table(w)
            w[peak] = TOTAL * ((4 + odds % 4) << odds // 4) >> 8
        return table(w)

    def split(self, count: int, places: list[int]) -> list[int]:
        k, b = len(places), self.s.symbol("low bits", 16)
        zero = min(range(k), key=lambda i: (abs(places[i]), i))
        high = self.coded(count, [i - (zero >> b) for i in range(-(-k // 2**b))])
        found = [h << b for h in high]
        for bit in reversed(range(b)):
            data = self.s.bytes(-(-count // 8))
            found = [x | (data[i // 8] >> i % 8 & 1) << bit for i, x in enumerate(found)]
        assert b and max(found) < k
        return found

    def earlier(self, places: list[int]) -> list[int]:
        f = self.kept[self.s.symbol("earlier", 8)]
        assert len(f) == len(places)
        return f


def read(data: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The record, the weights and the edits' tensors: type, shape and bits by name."""
    assert data[:4] == b"ATR\x02"
    assert zlib.crc32(data[8:]) == int.from_bytes(data[4:8], "little")
    inflate = zlib.decompressobj(-15, DICTIONARY)
    record, weights, edits = json.loads(inflate.decompress(data[8:]))
    symbols = Symbols(inflate.unused_data)
    tensors = Tensors(symbols)
    found = {name: tensors.tensor() for name in weights}
    more = {name: tensors.tensor() for name in edits}
    assert symbols.state == 0 and not symbols.words and not symbols.rest
    return record, found, more


def assert_reads(student: Student) -> None:
    _, weights, _ = read(pack_student(student))
    state = _settled(student).module.state_dict()
    assert list(weights) == list(state)
    for name, (kind, shape, bits) in weights.items():
        tensor = state[name]
        assert (f"torch.{kind}", shape) == (str(tensor.dtype), tuple(tensor.shape))
        own = tensor.contiguous().reshape(-1)
        raw = own.view(torch.uint8).numpy() if own.numel() else np.empty(0, np.uint8)
        assert bits == raw.view(f"u{width_of(kind) // 8}").tolist(), name


# --- what is held to the page


def test_the_example_is_what_attar_packs():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.5, -0.25], [0.0, 0.25]]))
        net.bias.copy_(torch.tensor([0.5, 0.0]))
    assert pack_student(Student(net)).hex(" ") == EXAMPLE.hex(" ")
    assert_reads(Student(net))
    back = unpack_student(EXAMPLE, build=lambda spec: net, module=nn.Linear(2, 2)).module
    assert torch.equal(back.weight, net.weight)


@pytest.mark.parametrize(
    "way", ["none", "masked", "shared", "heads-freed", "quantized", "weights-quantized"]
)
def test_a_student_is_read_as_the_page_says(way):
    student = made_by(way)
    assert way in WAYS
    assert_reads(student)
    record, _, more = read(pack_student(student))
    assert [edit["kind"] for edit in record.get("edits", [])] == [e.kind for e in student.edits]
    assert list(more) == [n for n in packed(student).tensors if n[0].isdigit() and "/" in n]


def test_every_form_is_read_as_the_page_says():
    assert_reads(zoo())


class Many(nn.Module):
    """Tensors long enough to be coded in groups."""

    def __init__(self, size: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("ternary", torch.randn(size, generator=draw).round().clamp(-1, 1) + 0)
        self.register_buffer("ten", torch.randint(0, 10, (size,), generator=draw).float() * 0.1)
        self.register_buffer("many", torch.randn(size // 8, generator=draw))
        spread = torch.randn(size, generator=draw)
        self.register_buffer("fine", (spread * 30).round() * 0.25 + 0)
        self.register_buffer("finest", (spread * 99).round() * 0.5 + 0)
        self.register_buffer("few", torch.randint(0, 9, (50,), generator=draw).float())


def test_groups_are_read_as_the_page_says():
    assert_reads(Student(Many(20_001)))


def test_low_bits_are_read_as_the_page_says(monkeypatch):
    """Of so few symbols they aren't worth a table of their own only if that may cost something."""
    monkeypatch.setattr(split, "LOSS", 0.02)
    seen = []
    monkeypatch.setattr(models, "write_low", lambda w, s, b: (seen.append(b), write_low(w, s, b)))
    assert_reads(Student(Many(20_001)))
    assert len(set(seen)) > 1 and max(seen) > 2


def test_streams_end_where_the_page_says(monkeypatch):
    """Shorter ones, for the test's sake."""
    monkeypatch.setattr(ans, "BLOCK", 1 << 9)
    monkeypatch.setattr(ans, "PIECE", 1 << 7)
    student = Student(Many(20_001))
    assert_reads(student)
    data = pack_student(student)
    back = unpack_student(data, build=lambda spec: Many(8), module=Many(20_001))
    again = back.module.state_dict()
    assert all(torch.equal(again[n], t) for n, t in student.module.state_dict().items())
