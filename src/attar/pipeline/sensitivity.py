"""How much each layer of a recipe's student can be pruned: measured on validation, kept by content,
written as `sensitivity.json` and a page."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import attar
from attar.data.base import Split
from attar.errors import ExportError, UsageError
from attar.events import Listener, silent
from attar.files import Trust
from attar.pipeline.job import Job, job_of, require_answers
from attar.pipeline.steps import Steps
from attar.prune.criteria import criteria
from attar.prune.sensitivity import RATIOS, Granularity, Progress, Sensitivity, sensitivity
from attar.recipe import Recipe
from attar.stages.prune import Prune, calls_of
from attar.store import Store, full_disk_as_error, key_of, sole_writer, write_whole
from attar.student import Student
from attar.student.fingerprint import fingerprint, source_of
from attar.tasks.base import Metric
from attar.training.evaluation import device_of, statistics_of

EXAMPLES = 2000
POINT = 0.01
"""What a layer may lose where the budget doesn't say: a point; of a metric that is no fraction, a
hundredth of what the whole network reaches."""


def sensitivity_of(
    recipe: Recipe,
    folder: Path,
    *,
    ratios: Sequence[float] = RATIOS,
    stage: int | None = None,
    granularity: Granularity | None = None,
    criterion: str | None = None,
    only: Sequence[str] = (),
    examples: int = EXAMPLES,
    tell: Listener = silent,
    trusted: Trust = False,
) -> dict[str, Any]:
    """Runs the recipe's stages up to `prune`, unless that was done before, and measures what each
    layer can lose; writes `sensitivity.json` and `sensitivity.html` into `folder`.

    ratios: shares of each layer to remove. stage: look at the student after so many of the stages;
    default: those before the first `prune`, or before whatever pruning can't follow. granularity,
    criterion: default: those of the recipe's `prune`. only: layers, by path, with `*`. examples: of
    the validation split, drawn by the recipe's seed.

    Every measurement is stored under the network it was made on, so an analysis that was
    interrupted goes on, and one of more ratios only adds to it. Returns what `sensitivity.json`
    holds (see docs/recipes.md). Raises an `AttarError`.

    Example:
        >>> found = sensitivity_of(load_recipe("digits"), Path("runs/looked"))  # doctest: +SKIP
        >>> {row["name"]: row["tolerated"] for row in found["rows"]}  # doctest: +SKIP
        {'conv1': 0.0, 'conv2': 0.25, 'linear1': 0.5}
    """
    if examples < 1:
        raise UsageError("examples: at least one is needed to measure on")
    place = _place(recipe, stage)
    prune = _pruning(recipe, place)
    granularity = granularity or ("weight" if prune.granularity == "weight" else "channel")
    criterion = criterion or prune.criterion
    scoring = criteria.get(criterion)()
    job = job_of(recipe.model_copy(update={"stages": recipe.stages[:place]}), trusted=trusted)
    scoring.seed = job.seed
    with sole_writer(folder), full_disk_as_error(folder):
        tell({"event": "run", "recipe": job.name, "folder": str(folder)})
        for note in job.data.notes:
            tell({"event": "note", "text": note})
        store = Store()
        steps = Steps(job, store, silent, tell)
        student = _student(steps)
        require_answers(job, student, "student")
        split = _some(job.data.validation, examples, job.seed)
        steps.begin("sensitivity")
        try:
            found = sensitivity(
                student,
                job.task.example(job.data),
                evaluate=_evaluation(job, split, store),
                criterion=scoring,
                granularity=granularity,
                ratios=ratios,
                only=only,
                higher_is_better=job.task.metric.higher_is_better,
                calls=calls_of(job.task, job.data, job.seed, scoring, device_of(student.module)),
                on_cell=lambda progress: tell(_event(progress)),
            )
        except ExportError as error:
            raise ExportError(f"{error} (--granularity weight needs no graph)") from None
        made = {
            "schema": 1,
            "attar": attar.__version__,
            "recipe": recipe.name,
            "student": {
                "model": student.spec.model if student.spec else type(student.module).__name__,
                "after": [one.name for one in job.stages],
                "trained": place > 0 or recipe.student is None or recipe.student.has_weights,
                "fingerprint": fingerprint(student.module),
            },
            "granularity": granularity,
            "criterion": criterion,
            "metric": asdict(job.task.metric),
            "split": split.name,
            "examples": len(split),
            **_written(found, _limit(recipe, job.task.metric, found.baseline)),
        }
        write_sensitivity(made, folder)
    return made


def write_sensitivity(record: dict[str, Any], folder: Path) -> Path:
    """Writes `sensitivity.json` and the page made of it; returns the page's path."""
    from attar.report.sensitivity import write_page

    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "sensitivity.json", text)
    return write_page(folder)


def _place(recipe: Recipe, stage: int | None) -> int:
    """How many of the recipe's stages come before the student that is looked at."""
    stages, never_before = recipe.stages, Prune.not_after
    if stage is None:
        ends = (i for i, s in enumerate(stages) if isinstance(s, Prune) or s.name in never_before)
        return next(ends, len(stages))
    if not 0 <= stage <= len(stages):
        raise UsageError(
            f"stage: {stage} is none of this recipe's, which has {len(stages)}: 0 is the student "
            f"before them, {len(stages)} after the last"
        )
    for done in stages[:stage]:
        if done.name in never_before:
            raise UsageError(
                f"stage: after stage {stage} it is too late to prune, for {done.name} comes "
                f"before: {never_before[done.name]}"
            )
    return stage


def _pruning(recipe: Recipe, place: int) -> Prune:
    """The stage that prunes next, or the last one that did; without any, `prune`'s defaults."""
    later = [s for s in recipe.stages[place:] if isinstance(s, Prune)]
    earlier = [s for s in recipe.stages[:place] if isinstance(s, Prune)]
    return (later or earlier[::-1] or [Prune.model_validate({"ratio": 0.5})])[0]


def _student(steps: Steps) -> Student:
    """The student after the job's stages, computed where the store doesn't hold it."""
    job = steps.job
    teacher, teacher_key = steps.teacher()
    student, key, origin = steps.student(teacher, teacher_key)
    baseline = None
    if any(stage.searches for stage in job.stages):
        answers = statistics_of(teacher.module, job.data.validation, job.task)
        baseline = job.task.value(answers)
    for index, stage in enumerate(job.stages, start=1):
        teaching, name = (teacher, teacher_key), f"{index:02}-{stage.name}"
        student, key, _ = steps.stage(
            stage, student, key, origin, teaching, name, baseline=baseline
        )
    return student


def _some(split: Split, count: int, seed: int) -> Split:
    """At most so many examples of a split, drawn by the seed, in the split's order."""
    if len(split) <= count:
        return split
    places = np.random.default_rng(seed).choice(len(split), count, replace=False)
    chosen: Split = split.only(np.sort(places))  # type: ignore[attr-defined]  # a recipe's data can
    return chosen


def _evaluation(job: Job, split: Split, store: Store) -> Callable[[nn.Module], float]:
    """Measures networks on a split; what a network reaches is stored under what it is."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    inputs = {
        "split": split.fingerprint,
        "task": job.task.name,
        "judge": source_of(type(job.task)),
        "attar": attar.__version__,
        "torch": torch.__version__,
    }

    def evaluate(network: nn.Module) -> float:
        def make(folder: Path, _: Path) -> None:
            where = network if device is None else copy.deepcopy(network).to(device)
            value = job.task.value(statistics_of(where, split, job.task))
            (folder / "metric.json").write_text(json.dumps(value), encoding="utf-8")

        entry, _ = store.compute(key_of(metric_of=fingerprint(network), **inputs), make)
        return float(json.loads((entry / "metric.json").read_text(encoding="utf-8")))

    return evaluate


def _limit(recipe: Recipe, metric: Metric, baseline: float) -> float:
    """The drop that a layer may cause: the budget's, or a point."""
    if recipe.budget.max_drop is not None:
        return recipe.budget.max_drop
    return POINT if metric.unit == "fraction" else POINT * abs(baseline)


def _written(found: Sensitivity, limit: float) -> dict[str, Any]:
    """What was found as JSON values; a metric that is no number is `null`."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "baseline": finite(found.baseline),
        "parameters": found.parameters,
        "macs": found.macs,
        "limit": limit,
        "ratios": [cell.ratio for cell in found.rows[0].cells],
        "rows": [
            {
                "name": row.name,
                "layers": list(row.layers),
                "size": row.size,
                "tolerated": row.tolerated(limit),
                "cells": [
                    {**asdict(cell), "metric": finite(cell.metric), "drop": finite(cell.drop)}
                    for cell in row.cells
                ],
            }
            for row in found.rows
        ],
        "ranked": [row.name for row in found.ranked(limit)],
        "kept": found.kept,
    }


def _event(progress: Progress) -> dict[str, Any]:
    cell = progress.cell
    return {
        "event": "cell",
        "name": progress.name,
        "ratio": cell.ratio,
        "drop": cell.drop,
        "done": progress.done,
        "of": progress.of,
    }
