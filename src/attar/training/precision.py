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


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a step computes in, for a recipe's `precision`.

    Accelerate's own mixed precision can't change within a process, and trainings of one recipe may
    differ in theirs.
    """
    wanted = precision == "bfloat16" or (precision == "auto" and computes_bfloat16())
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)
