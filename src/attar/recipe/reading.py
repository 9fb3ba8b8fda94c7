"""From YAML to a recipe and back."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import ValidationError

from attar.errors import RecipeError, UsageError
from attar.recipe.messages import sentences
from attar.recipe.model import Recipe
from attar.recipe.source import Source, override, read_source
from attar.registry import near

SUFFIXES = {".yaml", ".yml"}


def load_recipe(recipe: str | os.PathLike[str], overrides: list[str] | None = None) -> Recipe:
    """The recipe in a file, in a run's folder, or shipped under a name such as `digits`.

    overrides: `key.path=value` settings laid over it, such as `stages.prune.ratio=0.3`.

    Paths in a recipe's file are relative to that file's folder; those in a shipped recipe or in an
    override to the current one. `${NAME}` stands for an environment variable, `${NAME:-value}`
    for one with a default. Raises `RecipeError` with a sentence for each thing that is wrong.

    Example:
        >>> load_recipe("digits", ["seed=1"]).seed  # doctest: +SKIP
        1
    """
    source = _source(os.fspath(recipe))
    override(source, overrides or [], Path.cwd())
    source.values.setdefault("name", _stem(os.fspath(recipe)))
    return validated(source)


def recipe_from_text(text: str, title: str, base: Path) -> Recipe:
    """The recipe in a YAML text. title: what messages call it. base: where its paths start.
    Raises `RecipeError`."""
    source = read_source(text, title, base)
    source.values.setdefault("name", _stem(title))
    return validated(source)


def validated(source: Source) -> Recipe:
    """The recipe that `source` writes down. Raises `RecipeError`."""
    try:
        return Recipe.model_validate(source.values)
    except ValidationError as error:
        wrong = sentences(error, source, Recipe)
        if len(wrong) == 1:
            raise RecipeError(f"{source.title}: {wrong[0]}") from None
        listed = "\n".join(f"  {sentence}" for sentence in wrong)
        raise RecipeError(f"{source.title} has {len(wrong)} mistakes:\n{listed}") from None
    except UsageError as error:
        raise RecipeError(f"{source.title}: {error}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; reading it gives an equal recipe."""
    record = recipe.model_dump(mode="json", by_alias=True)
    if (share := recipe.budget.max_drop) is not None:
        record["budget"]["max_drop"] = f"{100 * share:.12g}%"
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=100)


def presets() -> dict[str, str]:
    """The shipped recipes: name to what the first comment says."""
    folder = files("attar.recipe") / "presets"
    found = {}
    for entry in folder.iterdir():
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").split("\n", 1)[0]
            found[entry.name.removesuffix(".yaml")] = first.lstrip("# ")
    return dict(sorted(found.items()))


def _source(recipe: str) -> Source:
    path = Path(recipe).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        return read_source(_text(path), str(path), path.parent)
    if recipe in presets():
        text = (files("attar.recipe") / "presets" / f"{recipe}.yaml").read_text(encoding="utf-8")
        return read_source(text, recipe, Path.cwd())
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        raise RecipeError(f"there is no recipe file {recipe}")
    raise RecipeError(
        f"no recipe {recipe!r}: neither a file nor a shipped one{near(recipe, list(presets()))}"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not a text file: a recipe is YAML") from None
    except OSError as error:
        raise RecipeError(f"{path} can't be read: {error.strerror}") from None


def _stem(recipe: str) -> str:
    path = Path(recipe)
    return path.resolve().name if path.is_dir() else path.stem.replace(" ", "-")
