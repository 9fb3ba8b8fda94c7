"""torchvision's classification networks by name, fitted to the data's channels and classes."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from attar.errors import UsageError
from attar.models.calling import call
from attar.registry import near

IMAGENET_CLASSES = 1000


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks."""
    from torchvision import models

    return models.list_models(module=models)


def torchvision_arguments(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The arguments with what some families need besides: to answer with one tensor, to fit images
    of this (C, H, W) shape, and to be the same network with and without the library's weights."""
    needed: dict[str, Any] = {}
    size = None if shape is None else list(shape[-2:])
    weights = arguments.get("weights")
    if weights is not None:
        size = _size_of(name, weights)
    if name in ("googlenet", "inception_v3"):
        needed["aux_logits"] = False  # with them, training gives tuples, not logits
        needed["transform_input"] = weights is not None
        needed["init_weights"] = weights is None
    if size is not None and name.startswith("vit_"):
        needed["image_size"] = size[0]
    if size is not None and name.startswith("maxvit"):
        needed["input_size"] = size
    return {**needed, **arguments}


def torchvision_model(
    name: str, arguments: dict[str, Any], *, channels: int | None, classes: int | None
) -> nn.Module:
    """`torchvision.models.get_model(name)` with its first layer for `channels` and its last for
    `classes`.

    Weights are random unless the arguments ask for the library's own (`weights: DEFAULT`); then
    only the layers that don't fit are new, a new first layer sharing the old one's weights out.
    Raises `UsageError`.
    """
    from torchvision import models

    if name not in torchvision_names():
        close = get_close_matches(name, torchvision_names())
        raise UsageError(f"torchvision has no model {name!r}{near(name, close)}")
    arguments = torchvision_arguments(name, arguments)
    if "input_size" in arguments:
        arguments["input_size"] = tuple(arguments["input_size"])  # JSON knows only lists
    trained = arguments.get("weights") is not None
    if trained:
        auxiliary = arguments.pop("aux_logits", True)  # the weights only load with them
    elif classes is not None:
        arguments.setdefault("num_classes", classes)
    module = call(lambda **given: models.get_model(name, **given), name, arguments)
    if trained and not auxiliary:
        _drop_auxiliary(module)
    if trained and classes is not None:
        _replace_heads(module, classes)
    if channels is not None:
        _replace_stem(module, channels, keep_weights=trained)
    return module


def _size_of(name: str, weights: str) -> list[int] | None:
    """(H, W) that the library's own weights were trained for, where they say."""
    from torchvision import models

    try:
        known = models.get_model_weights(name)
        size = known[weights.rpartition(".")[2]].meta.get("min_size")
    except (AttributeError, KeyError, ValueError):
        return None  # building will say what is wrong with it
    return None if size is None else list(size)


def _drop_auxiliary(module: nn.Module) -> None:
    """Without the heads that Inception networks have in the middle for training."""
    module.aux_logits = False  # type: ignore[assignment]
    for name in ("AuxLogits", "aux1", "aux2"):
        if hasattr(module, name):
            setattr(module, name, None)


def _replace_heads(module: nn.Module, classes: int) -> None:
    """New last layers where they don't give `classes` values (SqueezeNet's is a convolution)."""
    if classes == IMAGENET_CLASSES:
        return
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == IMAGENET_CLASSES:
            module.set_submodule(path, nn.Linear(layer.in_features, classes))
        if isinstance(layer, nn.Conv2d) and layer.out_channels == IMAGENET_CLASSES:
            module.set_submodule(path, nn.Conv2d(layer.in_channels, classes, 1))


def _replace_stem(module: nn.Module, channels: int, *, keep_weights: bool) -> None:
    """A new first convolution where the old one takes another number of channels."""
    path, old = next((p, m) for p, m in module.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        if keep_weights:  # the same answer for a gray image as for its three equal channels
            new.weight.copy_(old.weight.sum(1, keepdim=True).expand_as(new.weight) / channels)
        else:
            new.weight.normal_(std=float(old.weight.std()) * (old.in_channels / channels) ** 0.5)
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    module.set_submodule(path, new)
    if hasattr(module, "transform_input"):
        module.transform_input = False  # type: ignore[assignment] # it wants three channels
