"""A recipe's text before it is judged: YAML with line numbers, variables, paths, overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from attar.errors import RecipeError
from attar.registry import near

Place = tuple[str | int, ...]
"""Where in a recipe: keys and places in lists, such as `("stages", 1, "prune", "ratio")`."""

PATH_KEYS = {"root", "path", "unlabelled", "checkpoint", "answers", "folder"}
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
OWN_PART = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")


@dataclass
class Source:
    """A recipe as written: its values, and where each was said."""

    title: str
    """What messages call it: the file's name, or the shipped recipe's."""
    values: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)
    overridden: list[Place] = field(default_factory=list)

    def where(self, place: Place) -> str:
        """` (line 7)`, ` (from --set)` or nothing: where the value at `place` was written."""
        if any(place[: len(own)] == own for own in self.overridden):
            return " (from --set)"
        while place:
            if place in self.lines:
                return f" (line {self.lines[place]})"
            place = place[:-1]
        return ""


def read_source(text: str, title: str, base: Path) -> Source:
    """Parses YAML. Variables are filled in, and paths made absolute from the folder `base`.

    Raises `RecipeError` where the text is no YAML mapping or a variable isn't set.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "it can't be parsed"
        raise RecipeError(f"{title}:{line} not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{title} is not a recipe: it should hold keys such as data and teacher")
    source = Source(title, values)
    _note_lines(node, (), source.lines)
    source.values = _prepared(values, (), base)
    return source


def override(source: Source, settings: list[str], base: Path) -> None:
    """Applies `key.path=value` settings, in order. Values are YAML; paths are from `base`.

    Lists are addressed by place, `stages.1.prune.ratio` or `stages[1].prune.ratio`, or by the name
    of an item where only one has it: `stages.prune.ratio`. Raises `RecipeError`.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = [key for key in re.split(r"[.\[\]]+", path.strip()) if key]
        if not equals or not keys:
            raise RecipeError(f"--set {setting}: write it as key.path=value, such as seed=1")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise RecipeError(f"--set {setting}: {text!r} is not a YAML value") from None
        place = _put(source.values, keys, value, setting)
        target: Any = source.values
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = _prepared(value, place, base)
        source.overridden.append(place)


def _put(node: Any, keys: list[str], value: Any, setting: str) -> Place:
    """Sets the value, making mappings on the way; where it went."""
    place: list[str | int] = []
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        step: str | int
        if isinstance(node, list):
            at, inner = _item(node, key, setting)
            place += [at, key] if inner else [at]
            if inner:
                node, step = node[at], key
            else:
                step = at
        elif isinstance(node, dict):
            step = key
            place.append(key)
        else:
            parent = ".".join(keys[:depth])
            raise RecipeError(f"--set {setting}: {parent} is {node!r}, which has no {key!r} inside")
        if last:
            node[step] = value
        else:
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            node = node[step]
    return tuple(place)


def _item(items: list[Any], key: str, setting: str) -> tuple[int, bool]:
    """An item's place, and whether `key` is a name inside it rather than the place itself."""
    if key.isdigit():
        if int(key) < len(items):
            return int(key), False
        raise RecipeError(f"--set {setting}: there are only {len(items)} items, counted from 0")
    for at, item in enumerate(items):
        if isinstance(item, str):
            items[at] = {item: None}
    named = [at for at, item in enumerate(items) if isinstance(item, dict) and key in item]
    if len(named) == 1:
        return named[0], True
    if named:
        shown = " or ".join(str(at) for at in named)
        raise RecipeError(
            f"--set {setting}: several items are {key!r}: say which by its place, {shown}"
        )
    names = [str(name) for item in items if isinstance(item, dict) for name in item]
    raise RecipeError(f"--set {setting}: no item is {key!r}{near(key, names)}")


def _prepared(value: Any, place: Place, base: Path) -> Any:
    """The value with variables filled in and paths made absolute."""
    if isinstance(value, dict):
        return {
            _own_part(key, base): _prepared(inner, (*place, key), base)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_prepared(inner, (*place, at), base) for at, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    value = VARIABLE.sub(_filler(place), value)
    if place and place[-1] in PATH_KEYS:
        return str(absolute(value, base))
    return _own_part(value, base)


def _own_part(name: Any, base: Path) -> Any:
    """`file.py:Name` with the file's path made absolute; anything else as it is."""
    own = OWN_PART.fullmatch(name) if isinstance(name, str) else None
    return f"{absolute(own['file'], base)}:{own['name']}" if own else name


def absolute(path: str, base: Path) -> Path:
    """`path` as seen from `base`, with `~` and `..` resolved."""
    return Path(os.path.normpath(base.absolute() / Path(path).expanduser()))


def _filler(place: Place) -> Callable[[re.Match[str]], str]:
    def fill(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        value = os.environ.get(name) or default
        if value is None:
            raise RecipeError(
                f"{readable(place)} needs the environment variable {name}, which is not set: "
                f"`export {name}=…`, or write the value itself"
            )
        return value

    return fill


def readable(place: Place) -> str:
    """`stages[1].prune.ratio`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, `off`, `no` and `yes` are words, and a key said twice is an
    error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is said twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("[Tt]rue|[Ff]alse|TRUE|FALSE"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _note_lines(node: yaml.Node | None, place: Place, lines: dict[Place, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            lines[inner] = key.start_mark.line + 1
            _note_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            lines[(*place, at)] = value.start_mark.line + 1
            _note_lines(value, (*place, at), lines)
