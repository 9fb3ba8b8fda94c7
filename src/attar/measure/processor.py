"""The processor: its name, the instructions that kernels' speed hangs on, what overflows on it."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx10"}
"""x86 instructions that add products of bytes in 32 bits, as Linux names them."""
SHOWN = (
    "avx2", "avx512f", *sorted(DOT_PRODUCTS), "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""Instructions that decide how fast int8, bfloat16 and float are: x86's, then ARM's."""


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name as the system gives it."""
    return _said(cpuinfo, "model name") or platform.processor() or platform.machine()


def instructions(cpuinfo: Path = CPUINFO) -> list[str]:
    """Which of `SHOWN` it has; processors of one name differ, as virtual machines show them."""
    flags = (_said(cpuinfo, "flags") or _said(cpuinfo, "Features") or "").split()
    return [name for name in SHOWN if name in flags]


def saturates(cpuinfo: Path = CPUINFO, machine: str | None = None) -> bool:
    """Whether byte products may overflow here: x86 before VNNI adds pairs of them (`vpmaddubsw`) in
    16 bits, which 255·127 + 255·127 exceeds. An x86 processor that can't be asked is taken to."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return not DOT_PRODUCTS & set(instructions(cpuinfo))


def _said(cpuinfo: Path, field: str) -> str | None:
    """What Linux says of the first processor under `field`."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    values = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in values if name.strip() == field), None)
