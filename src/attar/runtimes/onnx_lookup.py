"""Indices packed into bits, and the ONNX function that looks their values up when a file is loaded.

A function's body is written once a file, and each tensor that it expands takes a single node. It is
made of arithmetic alone: OpenVINO computes shifts and masks of bits anew in every call, and some of
them wrongly, where ordinary integers are computed once, when it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from attar.runtimes.onnx_operators import DOMAIN

WIDEST = 15
"""The most bits of an index."""
BYTE = 8


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Indices (count,) below 2**bits as uint8, `bits` each, zeros after the last.

    They are cut into digits of 8, 4, 2 and 1 bits, as many as add up to `bits`, which each fill
    bytes, lowest first. One kind of digit lies flat; several lie in rows, (bits, count / 8).

    Example:
        >>> pack(np.array([1, 2, 3]), 4).tolist()  # 1 + 2 * 16, 3
        [33, 3]
    """
    digits = _digits(bits)
    padded = np.pad(indices.astype(np.int64), (0, -len(indices) % multiple(bits)))
    rows, place = [], 0
    for digit in digits:
        per = BYTE // digit
        cut = ((padded >> place) & (2**digit - 1)).reshape(-1, per)
        whole = (cut << (digit * np.arange(per))).sum(1).astype(np.uint8)
        rows.append(whole if len(digits) == 1 else whole.reshape(digit, -1))
        place += digit
    return np.concatenate(rows)


def multiple(bits: int) -> int:
    """What the number of packed indices is a multiple of."""
    digits = _digits(bits)
    return BYTE // digits[0] if len(digits) == 1 else BYTE


def function_name(bits: int, *, cut: bool) -> str:
    """What the function is called. cut: whether it drops what `pack` has added at the end."""
    return f"Lookup{bits}" + ("Cut" if cut else "")


def lookup(bits: int, *, cut: bool, opset: int) -> onnx.FunctionProto:
    """The function of `pack`'s bytes, the values, the tensor's shape, and the tables of `tabled`.

    The values are (k,) or (k, length). Where bytes hold digits of one kind there have to be all
    2**bits: every byte's values are looked up first, among them bytes that never occur, so that
    a tensor takes the least memory while it is made. opset: the file's version of ONNX's operators.
    """
    body = Nodes()
    digits = _digits(bits)
    tables = [f"digits{digit}" for digit in tabled(bits)]
    if len(digits) > 1:
        parts = body.add("Split", "stored", body.constant(digits, np.int64), outputs=len(digits))
        (found,) = body.add("Gather", "values", _sum(body, digits, parts))
    else:
        values = body.add("Gather", "values", *tables)[0] if tables else "values"
        (found,) = body.add("Gather", values, body.integers("stored"))
    if cut:
        (flat,) = body.add("Reshape", found, body.constant([-1], np.int64))
        (count,) = body.add("ReduceProd", "shape")
        (found,) = body.add("Slice", flat, body.constant([0], np.int64), count)
    body.add("Reshape", found, "shape", outputs=["tensor"])
    return helper.make_function(
        DOMAIN,
        function_name(bits, cut=cut),
        ["stored", "values", "shape", *tables],
        ["tensor"],
        body.nodes,
        [helper.make_opsetid("", opset)],
    )


def tabled(bits: int) -> list[int]:
    """The digits, in bits, of which a function wants the table, in the order that it takes them."""
    return [digit for digit in _digits(bits) if digit != BYTE]


def tables(digits: Sequence[int], prefix: str) -> tuple[list[onnx.NodeProto], list[str]]:
    """Nodes that make the digits of every byte, lowest first, (256, digits of a byte), and what
    these values are called. prefix: of all names in here."""
    made = Nodes(prefix)
    ends = [made.constant(n) for n in (0, 2**BYTE, 1)]
    (every,) = made.add("Range", *ends)
    (column,) = made.add("Reshape", every, made.constant([-1, 1], np.int64))
    names = []
    for digit in digits:
        powers = made.constant(2 ** (digit * np.arange(BYTE // digit)))
        (shifted,) = made.add("Div", column, powers)
        names += made.add("Mod", shifted, made.constant(2**digit))
    return made.nodes, names


def complete(values: np.ndarray, bits: int) -> np.ndarray:
    """The values as the function wants them: one for every byte that there could be."""
    missing = 2**bits - len(values) if len(_digits(bits)) == 1 and bits != BYTE else 0
    return np.concatenate([values, np.zeros_like(values, shape=(missing, *values.shape[1:]))])


def _digits(bits: int) -> list[int]:
    return [digit for digit in (8, 4, 2, 1) if bits & digit]


class Nodes:
    """Nodes so far, and the names of their values."""

    def __init__(self, prefix: str = "v") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix, self._values = prefix, 0

    def add(
        self, kind: str, *inputs: str, outputs: int | list[str] = 1, **options: Any
    ) -> list[str]:
        """A node; returns the names of its values."""
        if isinstance(outputs, int):
            outputs = [f"{self._prefix}{self._values + i}" for i in range(outputs)]
            self._values += len(outputs)
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **options))
        return outputs

    def constant(self, value: Any, kind: type[np.generic] = np.int32) -> str:
        tensor = numpy_helper.from_array(np.asarray(value, kind))
        return self.add("Constant", value=tensor)[0]

    def integers(self, value: str) -> str:
        """The value as integers that can index."""
        return self.add("Cast", value, to=onnx.TensorProto.INT32)[0]


def _sum(body: Nodes, digits: list[int], parts: list[str]) -> str:
    """The indices, of their digits in several parts."""
    flat = body.constant([-1], np.int64)
    total, place = "", 0
    for digit, part in zip(digits, parts, strict=True):
        found = body.integers(part)
        if digit != BYTE:
            (found,) = body.add("Gather", f"digits{digit}", found)
        (found,) = body.add("Reshape", found, flat)
        if total:
            (found,) = body.add("Mul", found, body.constant(2**place))
            (found,) = body.add("Add", total, found)
        total, place = found, place + digit
    return total
