"""What is wrong with a recipe, one sentence an error: where, what, and what would work."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from attar.recipe.source import Place, Source, readable
from attar.registry import near
from attar.stages.base import Stage, stages

LIMITS = {
    "greater_than": ("gt", "above {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "below {}"),
    "less_than_equal": ("le", "at most {}"),
}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
         "list": "a list", "dict": "a mapping", "model": "a mapping of settings",
         "tuple": "a list"}  # fmt: skip


def sentences(error: ValidationError, source: Source, model: type[BaseModel]) -> list[str]:
    """One sentence for each wrong place. Alternatives of one value are told as one."""
    wrong: dict[Place, list[Any]] = {}
    for one in error.errors():
        wrong.setdefault(_place(one, source.values), []).append(one)
    return [_sentence(place, ones, source, model) for place, ones in wrong.items()]


def _place(error: Any, values: Any) -> Place:
    """The error's place in the recipe as written: pydantic's names of alternatives left out."""
    place: list[str | int] = []
    node = values
    for depth, part in enumerate(error["loc"]):
        if _has(node, part):
            node = node[part]
            place.append(part)
        elif error["type"] == "missing" and depth == len(error["loc"]) - 1:
            place.append(part)
    return tuple(place)


def _has(node: Any, part: str | int) -> bool:
    if isinstance(node, list):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, dict) and part in node


def _sentence(place: Place, errors: list[Any], source: Source, model: type[BaseModel]) -> str:
    first = errors[0]
    at = f"{readable(place)}{source.where(place)}: " if place else ""
    if first["type"] == "extra_forbidden":
        return f"{at}unknown key {str(place[-1])!r}{near(str(place[-1]), _keys(model, place[:-1]))}"
    if first["type"] == "missing":
        return f"{at}is missing"
    own = [error for error in errors if error["type"] == "value_error"]
    if own:
        return at + str(own[0]["ctx"]["error"])
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in _relevant(errors)))
    return f"{at}{first['input']!r} does not work here: it should be {wanted}"


def _relevant(errors: list[Any]) -> list[Any]:
    """Of a value's several alternatives, those it could have been meant for come first."""
    return sorted(errors, key=lambda error: error["type"] not in LIMITS)


def _wanted(error: Any) -> str:
    """What pydantic's error asks for, in words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in LIMITS:
        key, words = LIMITS[kind]
        return words.format(f"{context[key]:g}")
    if kind in {"literal_error", "enum"}:
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return "a name of letters, digits, dots, dashes and underscores"
    for prefix, words in KINDS.items():
        if kind.startswith(prefix):
            return words
    return str(error["msg"]).removeprefix("Input should be ")


def _keys(model: type[BaseModel], place: Place) -> list[str]:
    """The keys that may stand at `place`."""
    candidates: list[Any] = [model]
    for part in place:
        candidates = [inner for one in candidates for inner in _inside(one, part)]
    return [key for one in candidates if _is_model(one) for key in one.model_fields]


def _inside(kind: Any, part: str | int) -> list[Any]:
    """The types that `part` may have inside a value of type `kind`."""
    if kind is Stage:
        return [stages.get(part)] if part in stages.names() else []  # type: ignore[arg-type]
    if _is_model(kind):
        field = kind.model_fields.get(str(part))
        return _alternatives(field.annotation) if field else []
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in {list, tuple} and arguments:
        return _alternatives(arguments[0])
    if typing.get_origin(kind) is dict and arguments:
        return _alternatives(arguments[1])
    return []


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, else the type itself; what `Annotated` adds is left out."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return [one for member in typing.get_args(annotation) for one in _alternatives(member)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
