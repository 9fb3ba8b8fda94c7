"""The same student under several criteria, on sets of several sizes, seed by seed."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from scipy.special import stdtrit

import attar
from attar.distill.transfer import Transfer
from attar.errors import UsageError
from attar.events import Listener, silent
from attar.files import Trust, from_file, is_reference
from attar.pipeline.entry import run
from attar.pipeline.result import read_ledger
from attar.recipe import Recipe, dump_recipe
from attar.stages.distill import Distill
from attar.store import write_whole
from attar.tasks.base import Metric, tasks

ALONE = "alone"
"""The student without a teacher: the task's own loss, under the same schedule."""
METHOD: str = Transfer.model_fields["method"].default
"""How a set's examples are chosen where only sizes are asked for."""
FEWEST = 3
"""Seeds from which an interval is given: two say next to nothing about a spread."""


@dataclass(frozen=True)
class Variant:
    """One way to teach the student.

    criterion: as a person types it, or `ALONE`. method, size: how the examples it is taught on are
    chosen, and how many; `None` for those of the recipe.

    Example:
        >>> Variant("kd", "herding", 500).label
        'kd on 500 (herding)'
    """

    criterion: str
    method: str | None = None
    size: int | None = None

    @property
    def label(self) -> str:
        if self.size is None:
            return self.criterion
        return f"{self.criterion} on {self.size} ({self.method})"

    @property
    def alone(self) -> Variant:
        """The student without a teacher on the same examples."""
        return Variant(ALONE, self.method, self.size)


@dataclass(frozen=True)
class Trial:
    """One training of the student.

    validation, test: the metric of its exported model. teacher: the recipe's teacher's on test.
    """

    variant: Variant
    seed: int
    validation: float
    test: float
    teacher: float
    folder: Path


@dataclass(frozen=True)
class Comparison:
    """The trials that are done, by seed; how many were asked for; the metric they are judged by."""

    recipe: Recipe
    trials: list[Trial]
    asked: int
    metric: Metric


@dataclass(frozen=True)
class Standing:
    """What one variant reached over the seeds: means and standard deviations (0 for one seed).

    gain, gain_sd: of the test metric over the student alone on the same examples, seed by seed;
    `None` without it. gain_low, gain_high: the gain's 95 % interval (Student's t over the seeds);
    `None` for fewer than three seeds and where all gains are equal, which says nothing of their
    spread. better: whether the whole interval is above 0; `None` without one.
    """

    variant: Variant
    seeds: int
    validation: float
    validation_sd: float
    test: float
    test_sd: float
    gain: float | None
    gain_sd: float | None
    gain_low: float | None
    gain_high: float | None
    better: bool | None


def compare(
    recipe: Recipe,
    criteria: Sequence[Any],
    folder: Path,
    *,
    seeds: int = 3,
    sizes: Sequence[int] = (),
    methods: Sequence[str] = (),
    tell: Listener = silent,
    trusted: Trust = False,
) -> Comparison:
    """Runs the recipe up to its `distill` stage with each criterion in turn, and the student alone.

    criteria: as a recipe has them, a name or `{name: settings}` each. sizes, methods: where given,
    every criterion and the student alone learn from sets of so many training examples, chosen by
    each method (as `distill: {transfer: …}` chooses them).

    Every trial is a run in `folder`; finished ones are read, so a comparison that was interrupted
    goes on, and one with more criteria, sizes or seeds only adds to it. All variants are tried with
    one seed before the next. After each, `comparison.json` and `comparison.html` tell what is known
    so far. Raises `UsageError` for a recipe without `distill`, for criteria and methods that are
    unknown, and for methods without a size.

    Example:
        >>> done = compare(load_recipe("digits"), ["kd", "dist"], Path("runs/compared"),
        ...                seeds=1)  # doctest: +SKIP
        >>> [one.variant.criterion for one in standings(done)]  # doctest: +SKIP
        ['dist', 'kd', 'alone']
    """
    variants = _variants(recipe, criteria, sizes, methods)
    plan = [
        (variant, _named(one, variant, seed), folder / f"{_short(variant.label)}-{seed}")
        for seed in range(recipe.seed, recipe.seed + seeds)
        for variant, one in variants.items()
    ]
    judge = from_file(recipe.task, trusted) if is_reference(recipe.task) else tasks.get(recipe.task)
    metric = judge().metric
    known = {
        place: _trial(variant, one.seed, ledger, place)
        for variant, one, place in plan
        if (ledger := _finished(one, place)) is not None
    }

    def so_far() -> Comparison:
        trials = [known[place] for _, _, place in plan if place in known]
        return Comparison(recipe, trials, len(plan), metric)

    for variant, one, place in plan:
        if place not in known:
            ledger = run(one, place, resume=True, tell=tell, trusted=trusted).ledger
            known[place] = _trial(variant, one.seed, ledger, place)
            write_comparison(so_far(), folder)
    write_comparison(so_far(), folder)
    return so_far()


def standings(comparison: Comparison) -> list[Standing]:
    """The variants with the best on validation first. A gain is positive where the student got
    better by the criterion, whichever way the metric counts."""
    trials, better = comparison.trials, 1 if comparison.metric.higher_is_better else -1
    reached = {(one.variant, one.seed): one.test for one in trials}
    found = []
    for variant in dict.fromkeys(one.variant for one in trials):
        own = [one for one in trials if one.variant == variant]
        gains = [
            better * (one.test - reached[variant.alone, one.seed])
            for one in own
            if variant.criterion != ALONE and (variant.alone, one.seed) in reached
        ]
        validation, validation_sd = _spread([one.validation for one in own])
        test, test_sd = _spread([one.test for one in own])
        gain, gain_sd = _spread(gains) if gains else (None, None)
        low, high = _interval(gains)
        found.append(
            Standing(
                variant=variant,
                seeds=len(own),
                validation=validation,
                validation_sd=validation_sd,
                test=test,
                test_sd=test_sd,
                gain=gain,
                gain_sd=gain_sd,
                gain_low=low,
                gain_high=high,
                better=None if low is None else low > 0,
            )
        )
    return sorted(found, key=lambda one: -better * one.validation)


def record(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """The comparison as `comparison.json` has it: JSON values, fractions as they are.

    `standings` in order, each with the figure a paper published for it where this is that paper's
    setting; `trials` with their folders relative to `folder`.
    """
    from attar.report.published import published

    ranked = []
    for one in standings(comparison):
        whole = one.variant.size is None
        figure = published(comparison.recipe, one.variant.criterion) if whole else None
        ranked.append(
            {
                **_written(one.variant),
                **{name: value for name, value in asdict(one).items() if name != "variant"},
                "published": None if figure is None else asdict(figure),
            }
        )
    return {
        "schema": 1,
        "attar": attar.__version__,
        "recipe": comparison.recipe.name,
        "metric": asdict(comparison.metric),
        "asked": comparison.asked,
        "done": len(comparison.trials),
        "standings": ranked,
        "trials": [
            {
                **_written(one.variant),
                "seed": one.seed,
                "validation": one.validation,
                "test": one.test,
                "teacher": one.teacher,
                "folder": one.folder.relative_to(folder).as_posix(),
            }
            for one in comparison.trials
        ],
    }


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Writes `comparison.json` and the page made of it; returns the page's path."""
    from attar.report.comparison import write_page

    text = json.dumps(record(comparison, folder), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "comparison.json", text)
    return write_page(folder)


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


def _variants(
    recipe: Recipe, criteria: Sequence[Any], sizes: Sequence[int], methods: Sequence[str]
) -> dict[Variant, Recipe]:
    """Every variant with the recipe that makes it."""
    if methods and not sizes:
        raise UsageError(
            f"a method ({methods[0]}) chooses a set's examples: say how many, with --size"
        )
    sets: list[tuple[str | None, int | None]] = [
        (method, size) for method in methods or [METHOD] for size in sorted(sizes)
    ]
    named: dict[str, list[Any]] = {ALONE: []}
    named |= {_label(one): [one] for one in criteria}
    return {
        (variant := Variant(label, method, size)): _up_to_distill(recipe, variant, asked)
        for method, size in sets or [(None, None)]
        for label, asked in named.items()
    }


def _up_to_distill(recipe: Recipe, variant: Variant, criteria: list[Any]) -> Recipe:
    """The recipe that ends with its first `distill`, by these criteria, on the variant's set."""
    for place, stage in enumerate(recipe.stages):
        if isinstance(stage, Distill):
            settings = {**stage.model_dump(), "criteria": criteria}
            if variant.size is not None:
                chosen = {"method": variant.method, "count": variant.size, "fraction": None}
                settings["transfer"] = {**(settings["transfer"] or {}), **chosen}
            settings["diagnose"] = False  # the student alone is a variant of its own
            try:
                taught = Distill.model_validate(settings)
            except ValidationError as error:
                wrong = error.errors()[0]
                said = wrong["msg"].removeprefix("Value error, ")
                of = "transfer" if "transfer" in wrong["loc"] else "criterion"
                raise UsageError(f"{of} {variant.label}: {said}") from None
            return recipe.model_copy(update={"stages": [*recipe.stages[:place], taught]})
    raise UsageError(
        f"the recipe {recipe.name} has no distill stage, so there are no criteria to compare"
    )


def _trial(variant: Variant, seed: int, ledger: dict[str, Any], place: Path) -> Trial:
    row, teacher = (
        next(row for row in ledger["rows"] if row["stage"] == stage)
        for stage in ("distill", "teacher")
    )
    reached = row["validation"]["value"], row["metric"]["value"]
    return Trial(variant, seed, *reached, teacher["metric"]["value"], place)


def _finished(recipe: Recipe, place: Path) -> dict[str, Any] | None:
    """The ledger of a finished run of this very recipe."""
    written = place / "recipe.yaml"
    if not (place / "report.html").exists() or not written.exists():
        return None
    if written.read_text(encoding="utf-8") != dump_recipe(recipe):
        return None
    return read_ledger(place)


def _named(recipe: Recipe, variant: Variant, seed: int) -> Recipe:
    """The recipe of one trial."""
    name = f"{recipe.name}-{_short(variant.label)}"[:80]
    return recipe.model_copy(update={"seed": seed, "name": name})


def _written(variant: Variant) -> dict[str, Any]:
    return {"label": variant.label, **asdict(variant)}


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


def _interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the mean by Student's t, where the values have a spread."""
    if len(values) < FEWEST or not (sd := statistics.stdev(values)):
        return None, None
    half = float(stdtrit(len(values) - 1, 0.975)) * sd / len(values) ** 0.5
    return statistics.fmean(values) - half, statistics.fmean(values) + half
