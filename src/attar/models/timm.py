"""timm's networks by name (`pip install 'attar[timm]'`)."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

from attar.errors import UsageError
from attar.models.calling import call
from attar.registry import near


def timm_model(
    name: str, arguments: dict[str, Any], *, channels: int | None, classes: int | None
) -> nn.Module:
    """`timm.create_model(name)` for these channels and classes, with random weights unless the
    arguments say `pretrained: true`. Raises `UsageError`, also where timm isn't installed."""
    try:
        import timm
    except ImportError:
        raise UsageError(
            f"timm:{name} needs timm, which isn't installed: pip install 'attar[timm]'"
        ) from None
    if not timm.is_model(name.split(".")[0]):
        raise UsageError(
            f"timm has no model {name!r}{near(name, get_close_matches(name, timm.list_models()))}"
        )
    given = {"in_chans": channels, "num_classes": classes}
    known = {k: v for k, v in given.items() if v is not None}
    return call(
        lambda **taken: timm.create_model(name, **taken), f"timm:{name}", {**known, **arguments}
    )
