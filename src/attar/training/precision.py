"""Which number format a training computes in on this machine."""

from __future__ import annotations

from functools import cache

import torch


@cache
def computes_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 here: a GPU of Ampere or later, or a CPU with
    AVX-512 BF16 or AMX instructions. Elsewhere it is emulated and slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        return False


def mixed_precision(precision: str) -> str:
    """Accelerate's word for a recipe's `precision`: `bf16` or `no`."""
    if precision == "auto":
        return "bf16" if computes_bfloat16() else "no"
    return "bf16" if precision == "bfloat16" else "no"
