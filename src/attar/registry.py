"""Named parts found by registration: a new file in a package is all it takes to add one.

A registry imports its package's files when it is first asked, then the entry points that other
distributions declare in the group `attar.<kind>` (with the kind's spaces as dashes).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Generic, TypeVar

from attar.errors import UsageError

T = TypeVar("T")


def near(name: str, names: list[str]) -> str:
    """`"; did you mean 'x'?"` where a known name is close to `name`, else the known names."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(sorted(names)) if names else ""


def first_sentence(text: str) -> str:
    """The first sentence of a text's first paragraph, on one line.

    Example:
        >>> first_sentence("Keeps what\\nmatters. The rest goes.")
        'Keeps what matters.'
    """
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph, maxsplit=1)[0]


class Registry(Generic[T]):
    """Parts of one kind by name.

    Example:
        >>> criteria: Registry[type] = Registry("criterion", "attar.distill")
        >>> @criteria.register("mine")
        ... class Mine: "A criterion of one's own."
        >>> criteria.get("mine").__name__
        'Mine'
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._parts: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: makes the part known as `name`. A name is given once."""

        def add(part: T) -> T:
            known = self._parts.get(name)
            if known is not None and known is not part:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._parts[name] = part
            return part

        return add

    def get(self, name: str) -> T:
        """The part called `name`. Raises `UsageError` naming near ones."""
        if name not in self._parts:
            self._import_own_file(name)
        if name not in self._parts:
            self._load()
        if name not in self._parts:
            raise UsageError(f"unknown {self.kind} {name!r}{near(name, self.names())}")
        return self._parts[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._parts)

    def describe(self) -> dict[str, str]:
        """Name → first sentence of the part's own docstring."""
        return {name: first_sentence(inspect.getdoc(self.get(name)) or "") for name in self.names()}

    def _import_own_file(self, name: str) -> None:
        """Imports the file called like the part, if there is one: a machine that only answers can
        ask for its runtime without importing the rest of the package, which may need PyTorch."""
        module = name.replace("-", "_")
        if module.isidentifier() and find_spec(f"{self.package}.{module}") is not None:
            importlib.import_module(f"{self.package}.{module}")

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for entry in entry_points(group="attar." + self.kind.replace(" ", "-")):
            self.register(entry.name)(entry.load())
