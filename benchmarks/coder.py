"""How close packed weights come to their entropy, and how fast they are coded.

Tensors of a million float32 weights, of kinds that sharing and pruning leave:

- 4-bit: sixteen values of a Gaussian, as k-means puts them;
- 8-bit: 255 multiples of one step;
- sparse: nine in ten weights zero, the others of fifteen values;
- ternary: minus, zero and plus.

Bytes are the whole file's (header and all) over those of the weights' entropy, with 32 bytes
allowed for a file's own; beside them Huffman's code for the same symbols, and what general
compressors make of the float32 weights and of the symbols as bytes. Times are of
`pack_student` and `read_tensors` on one core, medians, in MB of float32 weights.
"""

from __future__ import annotations

import heapq
import lzma
import shutil
import subprocess
import zlib
from collections.abc import Callable

import numpy as np
import torch
from common import conclude, options, processor_seconds, show
from torch import nn

from attar.student import Student
from attar.student.packed import pack_student, read_tensors

WEIGHTS = 1 << 20
ALLOWED = 32


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Symbols' values at their places, float32 (WEIGHTS,)."""
    gaussian = rng.standard_normal(WEIGHTS)
    book = np.sort(rng.standard_normal(16) * 0.1 + np.linspace(-2.4, 2.4, 16)).astype(np.float32)
    nearest = np.searchsorted((book[1:] + book[:-1]) / 2, gaussian)
    alive = rng.random(WEIGHTS) < 0.1
    others = np.delete(book, 8)
    return {
        "4-bit": book[nearest],
        "8-bit": np.rint(gaussian * 30).clip(-127, 127).astype(np.float32) * np.float32(0.0037) + 0,
        "sparse": np.where(alive, others[nearest.clip(0, 14)], np.float32(0)),
        "ternary": np.sign(np.rint(gaussian * 0.6)).astype(np.float32) * np.float32(0.05) + 0,
    }


def counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each weight's symbol, and how many there are of each."""
    _, symbols, counts = np.unique(values, return_inverse=True, return_counts=True)
    return symbols.astype(np.uint8), counts


def entropy_bytes(counts: np.ndarray) -> float:
    """The least that independent symbols take."""
    share = counts / counts.sum()
    return float(-(counts * np.log2(share)).sum() / 8)


def huffman_bytes(counts: np.ndarray) -> float:
    """The best code of whole bits a symbol: what merging the two rarest costs, again and again."""
    heap = [int(count) for count in counts]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits / 8


def compressors() -> dict[str, Callable[[bytes], int]]:
    """General compressors by name: the size they make of bytes. zstd where its command is."""
    found: dict[str, Callable[[bytes], int]] = {
        "xz": lambda data: len(lzma.compress(data, preset=6)),
        "zlib -9": lambda data: len(zlib.compress(data, 9)),
    }
    if command := shutil.which("zstd"):

        def zstd(data: bytes) -> int:
            arguments = [command, "-19", "--stdout", "--quiet"]
            return len(subprocess.run(arguments, input=data, capture_output=True).stdout)

        found = {"zstd -19": zstd, **found}
    return found


def main() -> None:
    arguments = options(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    rounds = 5 if arguments.quick else 15
    rows, ratios, encoding, decoding = [], [], [], []
    general = compressors()
    for name, values in tensors(np.random.default_rng(0)).items():
        net = nn.Module()
        net.register_buffer("weight", torch.from_numpy(values.reshape(1024, 1024)))
        student = Student(net)
        data = pack_student(student)
        assert np.array_equal(read_tensors(data)["weight"].ravel(), values)
        symbols, counts = counted(values)
        least = entropy_bytes(counts)
        megabytes = values.nbytes / 1e6
        encoding.append(megabytes / processor_seconds(lambda s=student: pack_student(s), rounds))
        decoding.append(megabytes / processor_seconds(lambda d=data: read_tensors(d), rounds))
        ratios.append((len(data) - ALLOWED) / least)
        # as bytes where that is quick; compressors find no more in the floats than in their symbols
        others = [compress(symbols.tobytes()) / least for compress in general.values()]
        floats = next(iter(general.values()))(values.tobytes()) / least
        rows.append(
            [
                name,
                f"{len(data):,}",
                f"{len(data) / least:.5f}",
                f"{huffman_bytes(counts) / least:.4f}",
                *(f"{other:.3f}" for other in others),
                f"{floats:.3f}",
                f"{encoding[-1]:.0f}",
                f"{decoding[-1]:.0f}",
            ]
        )
    first = next(iter(general))
    show(
        f"{WEIGHTS:,} weights: bytes over their entropy's, MB of float32 a second",
        ["weights", "bytes", "attar", "Huffman", *general, f"{first}, floats", "pack", "read"],
        rows,
    )
    conclude(
        "coder",
        arguments,
        {
            "bytes_over_entropy": round(max(ratios), 6),
            "encode_mb_s": round(min(encoding), 1),
            "decode_mb_s": round(min(decoding), 1),
        },
        {
            "bytes_over_entropy": ("<=", 1.001),
            "encode_mb_s": (">=", 200),
            "decode_mb_s": (">=", 200),
        },
        compressors=list(general),
    )


if __name__ == "__main__":
    main()
