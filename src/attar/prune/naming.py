"""Layers named by patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from attar.errors import UsageError
from attar.registry import near


def matching(
    layers: Iterable[str], patterns: Sequence[str], setting: str = "exclude"
) -> dict[str, str]:
    """The layers that patterns name, each with the first pattern that does.

    A pattern is a module's path, with `*` for any part of it, or the path of a module around it.
    Raises `UsageError`, naming the setting that holds it, for one that names none.

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
            raise UsageError(f"{setting}: no layer matches {pattern!r}{near(pattern, names)}")
        for name in hits:
            found.setdefault(name, pattern)
    return found


def joined(layers: Sequence[str]) -> str:
    """Layers in few words: those that differ in one number are named by its range.

    Example:
        >>> joined(["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"])
        'conv1, layer1.0–2.conv2'
    """
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for layer in layers:
        parts = re.split(r"(\d+)", layer)
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    return ", ".join(name for names in alike.values() for name in _ranges(names))


def _ranges(names: list[list[str]]) -> list[str]:
    """Names of the same words around other numbers, told by the number that shortens them most."""
    ways = [_ranges_at(names, place) for place in reversed(range(1, len(names[0]), 2))]
    return min(ways, key=len, default=["".join(parts) for parts in names])


def _ranges_at(names: list[list[str]], place: int) -> list[str]:
    found: dict[tuple[str, str], list[list[int]]] = {}
    for parts in names:
        around = "".join(parts[:place]), "".join(parts[place + 1 :])
        number, runs = int(parts[place]), found.setdefault(around, [])
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        f"{before}{run[0]}–{run[-1]}{after}" if len(run) > 1 else f"{before}{run[0]}{after}"
        for (before, after), runs in found.items()
        for run in runs
    ]
