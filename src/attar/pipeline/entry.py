"""What the command line and the Python face call: run a recipe, say what it would do, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attar.data import DataConfig, load_data
from attar.errors import DataError, UsageError
from attar.events import Listener, silent
from attar.files import Trust, from_file, is_reference
from attar.pipeline.execute import execute
from attar.pipeline.job import job_of, require_source
from attar.pipeline.result import Run
from attar.pipeline.rows import session_arrays_of
from attar.recipe import Recipe, load_recipe
from attar.runtimes.bundle import read_bundle
from attar.tasks.base import tasks
from attar.tasks.intervals import metric_interval


def run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    tell: Listener = silent,
    trusted: Trust = False,
) -> Run:
    """Executes a recipe into a run's folder.

    A folder that holds a run already is refused unless `resume` says to go on with it; what was
    computed before is taken from the store either way. trusted: whether files named in the recipe
    may run. Raises an `AttarError`.
    """
    if (folder / "ledger.json").exists() and not resume:
        raise UsageError(
            f"{folder} holds a run already: go on with it (--resume) or choose another folder "
            "(--out)"
        )
    return execute(job_of(recipe, trusted=trusted), Path(folder), tell=tell)


def dry_run(recipe: Recipe) -> list[str]:
    """What a run of this recipe would do, a line each, without doing it."""
    teacher, student = recipe.teacher, recipe.student
    lines = [f"data: {recipe.data.source} {recipe.data.name or recipe.data.path or ''}".rstrip()]
    if teacher.train is not None and teacher.checkpoint is None:
        lines.append(f"train the teacher {teacher.model} for {teacher.train.epochs} epochs")
    else:
        lines.append(f"load the teacher {teacher.model} from {teacher.checkpoint or 'its library'}")
    lines += [f"prepare the teacher: {stage.name}" for stage in recipe.teacher.prepare]
    lines.append(f"student: {student.model if student else 'a copy of the teacher'}")
    lines += [f"{i:02} {_said(stage)}" for i, stage in enumerate(recipe.stages, start=1)]
    target = recipe.deploy
    lines.append(
        f"deploy to {target.runtime}: batch {target.batch}, {target.threads} thread"
        f"{'s' * (target.threads > 1)}, graph passes {target.graph}"
    )
    return lines


def _said(stage: Any) -> str:
    """A stage's name and the settings that were changed."""
    changed = stage.model_dump(mode="json", exclude_defaults=True)
    shown = ", ".join(f"{k} {_brief(v)}" for k, v in changed.items())
    return f"{stage.name}: {shown}" if shown else stage.name


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{k} {_brief(v)}' for k, v in value.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    return str(value)


def evaluate(
    place: Path,
    data: DataConfig | None = None,
    *,
    split: str = "test",
    task: str | None = None,
    seed: int = 0,
    trusted: Trust = False,
) -> dict[str, Any]:
    """The metric of an exported model on one split, with its interval.

    place: a run's folder or a bundle's. data: the examples; by default those of the run's own
    recipe. Returns `metric` as a ledger row has it, with `further` ones. Raises an `AttarError`.
    """
    place = Path(place)
    folder = place / "bundle" if (place / "bundle" / "manifest.json").exists() else place
    bundle = read_bundle(folder)
    recipe_file = place / "recipe.yaml"
    if data is None:
        if not recipe_file.exists():
            raise UsageError(
                f"{place} is a bundle without a recipe: say which data to use (--data)"
            )
        recipe = load_recipe(str(recipe_file))
        require_source(recipe)
        data, seed, task = recipe.data, recipe.seed, recipe.task
    name = task or bundle.manifest["task"]
    judge = (from_file(name, trusted) if is_reference(name) else tasks.get(name))()
    examples = load_data(data, seed=seed, trusted=trusted)
    _require_same_preparation(bundle.manifest, judge.describe(examples))
    arrays = session_arrays_of(bundle.session(), getattr(examples, split), judge)
    statistics = arrays["statistics"]
    interval = metric_interval(judge, statistics)
    return {
        "bundle": str(folder),
        "metric": {
            "name": judge.metric.name,
            "unit": judge.metric.unit,
            "split": split,
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "n": len(statistics),
        },
        "further": judge.further_values(statistics),
    }


def _require_same_preparation(manifest: dict[str, Any], description: dict[str, Any]) -> None:
    """Refuses data of another shape than the bundle wants."""
    for wanted, given in zip(manifest["inputs"], description["inputs"], strict=True):
        if wanted["shape"][1:] != given["shape"][1:]:
            raise DataError(
                f"the bundle wants inputs of shape {wanted['shape'][1:]} and the data have "
                f"{given['shape'][1:]}: set the data's `size` and `color`"
            )
