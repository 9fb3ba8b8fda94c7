"""What the processor's 8-bit kernels can multiply without overflow."""

from __future__ import annotations

import platform
from pathlib import Path

DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx10"}
"""x86 instructions that add products of bytes in 32 bits, as Linux names them."""


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
