"""Putting weights back into a network that tells versions of itself apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Loads tensors by name, as the module itself would have saved them.

    A plain dictionary says nothing of the version that PyTorch's own carry along, and networks that
    ask for it (torchvision's MNASNet) take it for one of long ago, or refuse it. strict, and what
    is raised: as of `load_state_dict`.
    """
    versioned: OrderedDict[str, Tensor] = OrderedDict(weights)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, strict=strict)
