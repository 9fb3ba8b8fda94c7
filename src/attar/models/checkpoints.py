"""Weights from a file into a network: safetensors or PyTorch's, never by running code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attar.errors import CheckpointError
from attar.models.weights import load_weights

NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
)
"""Where training scripts keep the weights inside a checkpoint, in the order of preference."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What wrappers (DataParallel, `torch.compile`, Lightning) put before the network's own names."""

COUNTERS = ("num_batches_tracked", "n_averaged")
"""Counts, not weights: older files lack the first, averaged ones add the second."""


def load_checkpoint(module: nn.Module, path: str | Path) -> None:
    """Loads the weights in `path` into `module`, in place and completely.

    The file: safetensors, or what `torch.save` wrote of a state dict, also inside a training
    checkpoint's `state_dict`, `model`, … and with `module.` or similar before its names. Raises
    `CheckpointError` for a file that is missing, damaged, would run code, or belongs to another
    network (listing what is missing, unexpected or of another shape).

    Example:
        >>> load_checkpoint(network, "teacher.safetensors")  # doctest: +SKIP
    """
    path = Path(path)
    own = module.state_dict()
    state = _renamed(_weights_in(_read(path), path), set(own))
    _check_fit(own, state, path)
    load_weights(module, state, strict=False)  # checked above; only counters may differ


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} can't be read: {error.strerror}") from None
    if head[8:9] == b"{":  # safetensors: a length of eight bytes, then JSON
        return _read_safetensors(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":  # a zip archive, or a bare pickle
        return _read_pytorch(path)
    raise CheckpointError(
        f"{path} is no checkpoint: it is neither a safetensors file nor one that torch.save wrote"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from None


def _read_pytorch(path: Path) -> Any:
    # argparse's Namespace only holds values; many training scripts save their options in one.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a file's age or kind: what fails is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript program, not weights: save its state_dict instead, "
                "torch.save(torch.jit.load(file).state_dict(), …)"
            ) from None
        raise CheckpointError(
            f"the checkpoint {path} is damaged or cut off: get or save it again "
            f"({type(error).__name__})"
        ) from None


def _refusal(path: Path, message: str) -> str:
    """What to say of a pickle that holds more than weights, from PyTorch's own message."""
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return f"the checkpoint {path} is damaged, or a pickle that holds more than weights"
    name = found[1]
    if "blocked" in message or "." not in name:  # PyTorch names builtins without their module
        return (
            f"refused to open {path}: unpickling it would run {name}, which weights never need; "
            "don't use this file"
        )
    return (
        f"{path} looks like a whole pickled model or object ({name}), which would run code when "
        "opened: where you trust it, save its weights instead, "
        "torch.save(model.state_dict(), …)"
    )


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds, however deep a training script put it."""
    if isinstance(content, dict):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        nested = [content[k] for k in NESTED if isinstance(content.get(k), dict)]
        if tensors and not nested:
            return tensors
        for inner in nested:
            try:
                return _weights_in(inner, path)
            except CheckpointError:
                continue
    holds = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else ""
    raise CheckpointError(
        f"{path} holds no weights, only {holds or 'a ' + type(content).__name__}: "
        "save the network's state_dict"
    )


def _renamed(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """The state with wrappers' prefixes gone, from each name the network itself doesn't have."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name
        while short not in own and short.startswith(PREFIXES):
            short = short.partition(".")[2]
        renamed[name if short in renamed else short] = value
    return renamed


def _check_fit(own: dict[str, Tensor], state: dict[str, Tensor], path: Path) -> None:
    def weights(names: Iterable[str]) -> list[str]:
        return [n for n in names if n.rpartition(".")[2] not in COUNTERS]

    missing = weights(n for n in own if n not in state)
    unexpected = weights(n for n in state if n not in own)
    shaped = [
        f"{n} ({_size(state[n])} in the file, {_size(own[n])} in the network)"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    wrong = [f"{len(n)} {what}: {_first(n)}" for what, n in found.items() if n]
    if wrong:
        raise CheckpointError(f"the weights in {path} are another network's: {'; '.join(wrong)}")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one value"


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
