"""How many bits of a weight this processor's 8-bit kernels can multiply without overflow."""

from __future__ import annotations

from typing import Literal

from attar.measure.processor import saturates

WeightBits = Literal[7, 8]

SAFE_ANYWHERE = "any CPU"
SAFE_WITH_DOT_PRODUCTS = "x86 with VNNI, ARM"


def weight_bits(wanted: WeightBits | Literal["auto"]) -> WeightBits:
    """The bits of a weight: `auto` takes 7 where this processor would overflow with 8. Seven bits
    are ±64 here: 255·64 + 255·64 still fits."""
    if wanted == "auto":
        return 7 if saturates() else 8
    return wanted


def safe_on(bits: int) -> str:
    """The processors on which weights of so many bits never overflow."""
    return SAFE_ANYWHERE if bits < 8 else SAFE_WITH_DOT_PRODUCTS
