"""Calling a function that makes a network with what it can take, and saying what was wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from attar.errors import AttarError, UsageError
from attar.registry import near


def accepts(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has a parameter of that name (`**arguments` doesn't count)."""
    return argument in inspect.signature(function).parameters


def call(function: Callable[..., Any], name: str, arguments: dict[str, Any]) -> nn.Module:
    """The network that `function(**arguments)` makes.

    name: what messages call it. Raises `UsageError` for an argument it doesn't know, one that is
    missing, or whatever it raises itself.
    """
    _check_names(function, name, arguments)
    try:
        module = function(**arguments)
    except AttarError:
        raise
    except Exception as error:
        given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        raise UsageError(
            f"the model {name} can't be made with ({given}): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"the model {name} gives a {type(module).__name__}: it should return a torch.nn.Module"
        )
    return module


def _check_names(function: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [p.name for p in named]
    for argument in arguments:
        if argument not in known:
            raise UsageError(f"the model {name} takes no {argument!r}{near(argument, known)}")
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise UsageError(f"the model {name} needs {', '.join(missing)} among its arguments")
