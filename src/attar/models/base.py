"""Where networks come from: a spec that can be written down, and the modules it builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from attar.registry import Registry

models: Registry[Callable[..., nn.Module]] = Registry("model", "attar.models")
"""Attar's own networks by name: functions of `(channels: int, classes: int, **arguments)`."""


class ModelSpec(BaseModel):
    """What a network is built from, as JSON: enough to build it again in another process.

    model: a name of Attar's own (`cifar-resnet20`), `torchvision:resnet18` (or a bare torchvision
    name), `timm:vit_tiny_patch16_224`, `transformers:vit`, or `path/to/file.py:function`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    channels: int | None = None
    classes: int | None = None
    library: dict[str, str] = Field(default_factory=dict)
    """Name and version of the library the code came from, for messages when it changed."""
    file_sha256: str | None = None
    """For a person's file: what the file was when it was first allowed to run."""
    shapes_sha256: str | None = None
    """A fingerprint of the parameters' names and shapes as built."""
