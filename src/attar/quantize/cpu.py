"""What the processor's 8-bit kernels can multiply without overflow."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

WeightBits = Literal[7, 8]

DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx10"}
"""x86 instructions that add products of bytes in 32 bits, as Linux names them."""

SAFE_ANYWHERE = "any CPU"
SAFE_WITH_DOT_PRODUCTS = "x86 with VNNI, ARM"


def saturates(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """Whether byte products may overflow here: x86 before VNNI adds pairs of them (`vpmaddubsw`) in
    16 bits, which 255·127 + 255·127 exceeds. An x86 processor that can't be asked is taken to."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "")
    return not DOT_PRODUCTS & set(flags.split())


def weight_bits(wanted: WeightBits | Literal["auto"]) -> WeightBits:
    """The bits of a weight: `auto` takes 7 where this processor would overflow with 8. Seven bits
    are ±64 here: 255·64 + 255·64 still fits."""
    if wanted == "auto":
        return 7 if saturates() else 8
    return wanted


def safe_on(bits: int) -> str:
    """The processors on which weights of so many bits never overflow."""
    return SAFE_ANYWHERE if bits < 8 else SAFE_WITH_DOT_PRODUCTS
