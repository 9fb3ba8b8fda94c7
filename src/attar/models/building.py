"""From a model's name to a network, and to a spec that builds it again elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from attar.errors import CheckpointError, UsageError
from attar.files import Trust, from_file, is_reference, locate, sha256_of
from attar.models.base import ModelSpec, models
from attar.models.calling import accepts, call
from attar.models.timm import timm_model
from attar.models.torchvision import torchvision_arguments, torchvision_model, torchvision_names
from attar.models.transformers import transformers_arguments, transformers_model
from attar.registry import near

PRETRAINED = ("weights", "pretrained")
"""The arguments by which a library loads weights of its own."""

LIBRARIES = ("torchvision", "timm", "transformers")


def build(
    spec: ModelSpec,
    *,
    channels: int | None = None,
    classes: int | None = None,
    shape: tuple[int, ...] | None = None,
    pretrained: bool = True,
    trusted: Trust = False,
) -> nn.Module:
    """The network a spec describes, in training mode, newly initialised.

    channels, classes, shape ((C, H, W) of one input): the data's, where the spec doesn't say.
    pretrained: `False` leaves out the library's own weights that the arguments ask for: for a
    network whose weights are loaded next. trusted: whether a person's file may run, see
    `attar.files.allow`. Raises `UsageError` for what can't be built, `CheckpointError` where it
    comes out in other shapes than when the spec was made.

    Example:
        >>> build(ModelSpec(model="lenet5"), channels=1, classes=10).conv1
        Conv2d(1, 20, kernel_size=(5, 5), stride=(1, 1))
    """
    channels = spec.channels if spec.channels is not None else channels
    classes = spec.classes if spec.classes is not None else classes
    library, name = _source(spec.model)
    arguments = _sized(spec.model, spec.arguments, shape, trusted)
    if not pretrained:
        arguments = {k: v for k, v in arguments.items() if k not in PRETRAINED}
    if library == "torchvision":
        module = torchvision_model(name, arguments, channels=channels, classes=classes)
    elif library == "timm":
        module = timm_model(name, arguments, channels=channels, classes=classes)
    elif library == "transformers":
        module = transformers_model(name, arguments, channels=channels, classes=classes)
    else:
        function = _function(spec.model, trusted)
        known = {"channels": channels, "classes": classes}
        fitting = {k: v for k, v in known.items() if v is not None and accepts(function, k)}
        module = call(function, spec.model, {**fitting, **arguments})
    if spec.shapes_sha256 not in (None, shapes_of(module)):
        raise CheckpointError(_changed(spec))
    return module


def resolve(
    model: str,
    arguments: dict[str, Any] | None = None,
    *,
    channels: int | None = None,
    classes: int | None = None,
    shape: tuple[int, ...] | None = None,
    trusted: Trust = False,
) -> ModelSpec:
    """The spec of a named network with all that building it again needs.

    Channels, classes and, where the network asks for one, the image's size are written down; so
    are the library's version (or the file's hash) and the fingerprint of the shapes, found by
    building it once. A file's path becomes absolute. Raises what `build` does.

    Example:
        >>> resolve("lenet5", channels=1, classes=10, shape=(1, 28, 28)).arguments
        {'image_size': [28, 28]}
    """
    library, name = _source(model)
    file_sha256 = None
    if library == "file":
        path, function_name = locate(name)
        model = f"{path}:{function_name}"
        file_sha256 = sha256_of(path)
    spec = ModelSpec(
        model=f"torchvision:{name}" if library == "torchvision" else model,
        arguments=_sized(model, arguments or {}, shape, trusted),
        channels=channels,
        classes=classes,
        library={} if library == "file" else {library: _version(library)},
        file_sha256=file_sha256,
    )
    with torch.random.fork_rng(devices=[]):  # looking at the shapes must not shift the run's seed
        module = build(spec, pretrained=False, trusted=trusted)
    return spec.model_copy(update={"shapes_sha256": shapes_of(module)})


def shapes_of(module: nn.Module) -> str:
    """A hash of the names and shapes of a network's parameters and buffers."""
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in module.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _source(model: str) -> tuple[str, str]:
    """Which library a model's name belongs to, and its name there."""
    if is_reference(model):
        return "file", model
    library, colon, name = model.partition(":")
    if colon and library in LIBRARIES:
        return library, name
    if model in models.names():
        return "attar", model
    if model in torchvision_names():
        return "torchvision", model
    if colon:
        raise UsageError(
            f"unknown model {model!r}: write torchvision:NAME, timm:NAME, transformers:NAME "
            "or path/file.py:function"
        )
    raise UsageError(
        f"unknown model {model!r}{near(model, [*models.names(), *torchvision_names()])}"
    )


def _function(model: str, trusted: Trust) -> Callable[..., nn.Module]:
    """What makes a network that is no library's: a registered function, or a file's."""
    return from_file(model, trusted) if is_reference(model) else models.get(model)


def _sized(
    model: str, arguments: dict[str, Any], shape: tuple[int, ...] | None, trusted: Trust
) -> dict[str, Any]:
    """The arguments, with the image's size where the network is made for one size."""
    library, name = _source(model)
    if library == "torchvision":
        return torchvision_arguments(name, arguments, shape)
    if library == "transformers":
        return transformers_arguments(name, arguments, shape)
    if (
        library in LIBRARIES
        or shape is None
        or not accepts(_function(model, trusted), "image_size")
    ):
        return arguments
    return {"image_size": list(shape[-2:]), **arguments}


def _version(library: str) -> str:
    try:
        return version(library)
    except ModuleNotFoundError:
        return "unknown"


def _changed(spec: ModelSpec) -> str:
    """Why a spec may build other shapes than it did, and what would help."""
    shapes = f"{spec.model} is built in other shapes than when it was saved"
    if spec.file_sha256 is not None:
        path, _ = locate(spec.model)
        same = sha256_of(path) == spec.file_sha256
        return f"{shapes}: " + (
            "its file is the same, so what it imports has changed"
            if same
            else f"{path} has changed since; bring back the file as it was"
        )
    for library, before in spec.library.items():
        now = _version(library)
        if now != before:
            return (
                f"{shapes}: it was made with {library} {before}, this is {library} {now}; "
                f"pip install '{library}=={before}'"
            )
    return f"{shapes}, by the same version of {', '.join(spec.library) or 'its library'}"
