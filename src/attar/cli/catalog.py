"""What `attar list` knows: the kinds of parts, and the parts of each kind."""

from __future__ import annotations

import importlib
from typing import Any

from attar.errors import UsageError
from attar.registry import near
from attar.runtimes.base import Runtime

REGISTRIES = {
    "models": ("attar.models.base:models", "Networks of Attar's own; torchvision's work by name."),
    "sources": ("attar.data.parts:sources", "Where data come from: `data: {source: …}`."),
    "stages": ("attar.stages.base:stages", "Steps of a recipe: `stages: [{NAME: {…}}]`."),
    "criteria": ("attar.distill.criterion:criteria", "What a student is taught by: `distill`."),
    "prune-criteria": (
        "attar.prune.criteria.base:criteria",
        "Which weights or channels go: `prune`.",
    ),
    "observers": (
        "attar.quantize.ranges:ranges",
        "How an int8 grid's range is chosen: `quantize: {observer: …}`.",
    ),
    "tasks": ("attar.tasks.base:tasks", "What is right: `task: …`."),
    "runtimes": (
        "attar.runtimes.base:runtimes",
        "What executes the result: `deploy: {runtime: …}`.",
    ),
}
RECIPES = "Shipped recipes: `attar run NAME`."


def kinds() -> dict[str, str]:
    """Every kind of part, and what it is for."""
    return {"recipes": RECIPES, **{kind: purpose for kind, (_, purpose) in REGISTRIES.items()}}


def described(kind: str) -> dict[str, str]:
    """The parts of one kind: name to what it is. Raises `UsageError` for an unknown kind."""
    if kind == "recipes":
        from attar.recipe import presets

        return presets()
    if kind not in REGISTRIES:
        raise UsageError(f"nothing is called {kind!r} to list{near(kind, list(kinds()))}")
    module, _, name = REGISTRIES[kind][0].partition(":")
    registry: Any = getattr(importlib.import_module(module), name)
    found: dict[str, str] = registry.describe()
    if kind == "runtimes":
        return {one: f"{said} {_here(registry.get(one))}" for one, said in found.items()}
    return found


def _here(runtime: type[Runtime]) -> str:
    """Whether a runtime works on this machine."""
    works, more = runtime.available()
    return f"Works here: {more}." if works else f"Not here: {more}."
