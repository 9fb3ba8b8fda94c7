"""What a network is made of: parameters, those that are not zero, multiply-accumulates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameters(module: nn.Module) -> int:
    """The number of parameters; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


def nonzero(module: nn.Module) -> int:
    """The number of parameters that are not zero."""
    return sum(int(torch.count_nonzero(p)) for p in module.parameters())


def macs(module: nn.Module, example: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one example's forward pass: convolutions, linear layers, matrix
    products and attention, as PyTorch's own counter sees them.

    example: inputs, batch first; only the first example is used.
    """
    counted = copy.deepcopy(module).eval()
    one = tuple(x[:1] if isinstance(x, torch.Tensor) else x for x in example)
    with torch.no_grad(), _unfused_attention(), FlopCounterMode(display=False) as counter:
        counted(*one)
    return counter.get_total_flops() // 2


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Attention as matrix products: PyTorch's counter doesn't know the CPU's fused kernels, and
    would take their work for none."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
