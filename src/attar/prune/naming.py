"""Layers named by patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from attar.errors import UsageError
from attar.registry import near


def matching(layers: Iterable[str], patterns: Sequence[str]) -> dict[str, str]:
    """The layers that patterns name, each with the first pattern that does.

    A pattern is a module's path, with `*` for any part of it, or the path of a module around it.
    Raises `UsageError` for one that names none.

    Example:
        >>> matching(["layer1.0.conv1", "fc"], ["layer1"])
        {'layer1.0.conv1': 'layer1'}
    """
    names = sorted(set(layers))
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")
        ]
        if not hits:
            raise UsageError(f"exclude: no layer matches {pattern!r}{near(pattern, names)}")
        for name in hits:
            found.setdefault(name, pattern)
    return found
