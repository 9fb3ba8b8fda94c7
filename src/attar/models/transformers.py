"""transformers' image classifiers by kind, or by name (`pip install 'attar[text]'`)."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

from attar.errors import UsageError
from attar.models.calling import call
from attar.registry import near


def transformers_model(
    name: str, arguments: dict[str, Any], *, channels: int | None, classes: int | None
) -> nn.Module:
    """An image classifier of the library transformers for these channels and classes.

    name: a kind of network (`vit`, `resnet`, `convnext`), or a model on the hub or in a folder
    (`google/vit-base-patch16-224`). arguments: fields of its configuration, and `pretrained: true`
    for a model's own weights: only safetensors files are read, and no code that comes with it runs.
    Raises `UsageError`, also where transformers isn't installed.
    """
    _require_known(name)
    known = {"num_channels": channels, "num_labels": classes}
    given = {**{k: v for k, v in known.items() if v is not None}, **arguments}
    pretrained = bool(given.pop("pretrained", False))
    if pretrained and not _is_model(name):
        raise UsageError(f"transformers:{name} is a kind of network and has no weights to load")
    make = _loaded if pretrained else _new
    return call(lambda **fields: make(name, fields), f"transformers:{name}", given)


def transformers_arguments(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...] | None
) -> dict[str, Any]:
    """The arguments, with the image's size where the kind of network is made for one size."""
    _require_known(name)
    if shape is None or _is_model(name) or not hasattr(_configuration(name), "image_size"):
        return arguments
    height, width = shape[-2:]  # some kinds know square images only, by one number
    return {"image_size": height if height == width else [height, width], **arguments}


def _is_model(name: str) -> bool:
    """Whether it names a model on the hub or in a folder, rather than a kind of network."""
    return "/" in name


def _require_known(name: str) -> None:
    try:
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS,
        )
    except ImportError:
        raise UsageError(
            f"transformers:{name} needs transformers, which isn't installed: "
            "pip install 'attar[text]'"
        ) from None
    if not _is_model(name) and name not in KINDS:
        raise UsageError(
            f"transformers has no image classifier {name!r}"
            f"{near(name, get_close_matches(name, list(KINDS)))}"
        )


def _configuration(name: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS,
    )

    if _is_model(name):
        return AutoConfig.from_pretrained(name)
    classes = KINDS[name]  # the first of several is the plain one
    config = AutoConfig.for_model(name)
    config.architectures = [classes if isinstance(classes, str) else classes[0]]
    return config


def _new(name: str, fields: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForImageClassification

    config = _configuration(name)
    for field in fields:
        if not hasattr(config, field):
            raise UsageError(
                f"transformers:{name} takes no {field!r}{near(field, sorted(config.to_dict()))}"
            )
    config.update(fields)
    return AutoModelForImageClassification.from_config(config)


def _loaded(name: str, fields: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(
        name, use_safetensors=True, ignore_mismatched_sizes=True, **fields
    )
