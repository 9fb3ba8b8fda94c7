"""The same student under several criteria, seed by seed."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from attar.errors import UsageError
from attar.events import Listener, silent
from attar.files import Trust, from_file, is_reference
from attar.pipeline.entry import run
from attar.pipeline.result import read_ledger
from attar.recipe import Recipe, dump_recipe
from attar.stages.distill import Distill
from attar.tasks.base import Metric, tasks

ALONE = "alone"
"""The student without a teacher: the task's own loss, under the same schedule."""


@dataclass(frozen=True)
class Trial:
    """One training of the student. validation, test: the metric of its exported model."""

    criterion: str
    seed: int
    validation: float
    test: float
    folder: Path


@dataclass(frozen=True)
class Comparison:
    """All trials, and the metric they are judged by."""

    trials: list[Trial]
    metric: Metric


@dataclass(frozen=True)
class Standing:
    """What one criterion reached over the seeds: means and standard deviations (0 for one seed).

    gain, gain_sd: of the test metric over the student alone, seed by seed; `None` without it.
    """

    criterion: str
    seeds: int
    validation: float
    validation_sd: float
    test: float
    test_sd: float
    gain: float | None
    gain_sd: float | None


def compare(
    recipe: Recipe,
    criteria: Sequence[Any],
    folder: Path,
    *,
    seeds: int = 3,
    tell: Listener = silent,
    trusted: Trust = False,
) -> Comparison:
    """Runs the recipe up to its `distill` stage with each criterion in turn, and the student alone.

    criteria: as a recipe has them, a name or `{name: settings}` each. Every trial is a run in
    `folder`; finished ones are read, so a comparison that was interrupted goes on, and one with
    more criteria or seeds only adds to it. All criteria are tried with one seed before the next.
    Raises `UsageError` for a recipe without `distill` and for criteria that are unknown.

    Example:
        >>> done = compare(load_recipe("digits"), ["kd", "dist"], Path("runs/compared"),
        ...                seeds=1)  # doctest: +SKIP
        >>> [one.criterion for one in standings(done)]  # doctest: +SKIP
        ['dist', 'kd', 'alone']
    """
    variants = {ALONE: _up_to_distill(recipe, [])}
    variants |= {_label(one): _up_to_distill(recipe, [one]) for one in criteria}
    trials = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        for label, variant in variants.items():
            short = _short(label)
            named = variant.model_copy(update={"seed": seed, "name": f"{recipe.name}-{short}"[:80]})
            trials.append(_trial(named, label, folder / f"{short}-{seed}", tell, trusted))
    judge = from_file(recipe.task, trusted) if is_reference(recipe.task) else tasks.get(recipe.task)
    return Comparison(trials, judge().metric)


def standings(comparison: Comparison) -> list[Standing]:
    """The criteria with the best on validation first. A gain is positive where the student got
    better by the criterion, whichever way the metric counts."""
    trials, better = comparison.trials, 1 if comparison.metric.higher_is_better else -1
    alone = {one.seed: one.test for one in trials if one.criterion == ALONE}
    found = []
    for name in dict.fromkeys(one.criterion for one in trials):
        own = [one for one in trials if one.criterion == name]
        gains = [
            better * (one.test - alone[one.seed])
            for one in own
            if one.seed in alone and name != ALONE
        ]
        validation, test = [one.validation for one in own], [one.test for one in own]
        found.append(
            Standing(
                name,
                len(own),
                *_spread(validation),
                *_spread(test),
                *(_spread(gains) if gains else (None, None)),
            )
        )
    return sorted(found, key=lambda one: -better * one.validation)


def criteria_of(text: str) -> Any:
    """A criterion as a recipe has it, from what a person typed: `kd`, `dkd: {others: 2}`.

    Raises `UsageError` for text that is no YAML of one name.

    Example:
        >>> criteria_of("dkd: {others: 2}")
        {'dkd': {'others': 2}}
    """
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        read = None
    if isinstance(read, str) or (isinstance(read, dict) and len(read) == 1):
        return read
    raise UsageError(f"{text!r} is no criterion: write a name, or 'dkd: {{others: 2}}'")


def _trial(recipe: Recipe, label: str, place: Path, tell: Listener, trusted: Trust) -> Trial:
    ledger = _finished(recipe, place)
    if ledger is None:
        ledger = run(recipe, place, resume=True, tell=tell, trusted=trusted).ledger
    row = next(row for row in ledger["rows"] if row["stage"] == "distill")
    return Trial(label, recipe.seed, row["validation"]["value"], row["metric"]["value"], place)


def _finished(recipe: Recipe, place: Path) -> dict[str, Any] | None:
    """The ledger of a finished run of this very recipe."""
    written = place / "recipe.yaml"
    if not (place / "report.html").exists() or not written.exists():
        return None
    if written.read_text(encoding="utf-8") != dump_recipe(recipe):
        return None
    return read_ledger(place)


def _up_to_distill(recipe: Recipe, criteria: list[Any]) -> Recipe:
    """The recipe that ends with its first `distill`, by these criteria."""
    for place, stage in enumerate(recipe.stages):
        if isinstance(stage, Distill):
            try:
                taught = Distill.model_validate({**stage.model_dump(), "criteria": criteria})
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise UsageError(f"criterion {_label(criteria[0])}: {said}") from None
            return recipe.model_copy(update={"stages": [*recipe.stages[:place], taught]})
    raise UsageError(
        f"the recipe {recipe.name} has no distill stage, so there are no criteria to compare"
    )


def _label(criterion: Any) -> str:
    """A criterion as a person types it: `kd`, `dkd: {others: 2}`."""
    if isinstance(criterion, str):
        return criterion
    ((name, settings),) = criterion.items()
    if not settings:
        return str(name)
    return f"{name}: {yaml.safe_dump(settings, default_flow_style=True, width=10_000).strip()}"


def _short(label: str) -> str:
    """A label as part of a folder's name, another one for every other label.

    >>> _short("kd"), _short("dkd: {others: 2}")
    ('kd', 'dkd-others-2-7e5a3f')
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:40]
    if plain == label:
        return plain
    return f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
