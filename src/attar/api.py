"""The Python face: what a recipe says in YAML, said in objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attar.data import Data, from_loaders
from attar.errors import UsageError
from attar.events import Listener, silent
from attar.files import Trust
from attar.pipeline.execute import execute
from attar.pipeline.job import Job, allow_own_files, handed_in
from attar.pipeline.result import Run, read_ledger
from attar.recipe import Budget, Deploy, Recipe, dump_recipe
from attar.recipe.model import HANDED_IN
from attar.recipe.reading import validated
from attar.recipe.source import Source
from attar.stages.base import Stage
from attar.student import Student
from attar.tasks.base import Task, tasks

Loaders = Data | Sequence[Iterable[Any]]


def compress(
    teacher: nn.Module,
    *,
    data: Loaders,
    stages: Sequence[Stage],
    student: nn.Module | None = None,
    task: str | Task = "image-classification",
    classes: Sequence[str] | None = None,
    deploy: Deploy | dict[str, Any] | None = None,
    budget: Budget | dict[str, Any] | None = None,
    seed: int = 0,
    name: str = "compress",
    out: str | Path | None = None,
    tell: Listener = silent,
    trusted: Trust = False,
) -> Run:
    """Compresses a trained network with the stages given, and proves what it cost.

    teacher: a trained `nn.Module`; it is left as it is. student: a smaller network to be taught, or
    `None` for a copy of the teacher. data: an `attar.data.Data`, or three iterables of
    (inputs, targets) that can be gone through again and again: train, validation, test.
    classes: their names, when `data` are iterables. out: the run's folder, `runs/NAME` by default;
    what was computed before with the same inputs is not computed again. trusted: whether files of
    your own that stages name (`criteria: ["losses.py:Huber"]`) may run; they are asked for once.

    Returns the run: `run.student` is the compressed `nn.Module`, `run.ledger` the table,
    `run.session(batch)` the exported file, answering. Raises an `AttarError` saying what is wrong.

    Example:
        >>> run = attar.compress(net, data=(train, validation, test),
        ...     stages=[attar.Prune(ratio=0.5), attar.Quantize()])  # doctest: +SKIP
        >>> run.student  # doctest: +SKIP
    """
    judge = tasks.get(task)() if isinstance(task, str) else task
    examples = _as_data(data, classes)
    recipe = _as_recipe(
        name=name,
        seed=seed,
        data={"source": "python", "name": examples.name},
        teacher=_as_network(teacher),
        student=_as_network(student),
        stages=list(stages),
        deploy=deploy,
        budget=budget,
    )
    allow_own_files(recipe.stages, trusted)
    job = Job(
        name=name,
        task=judge,
        data=examples,
        seed=seed,
        teacher=handed_in(teacher),
        student=handed_in(student) if student is not None else None,
        stages=recipe.stages,
        deploy=recipe.deploy,
        budget=recipe.budget,
        text=dump_recipe(recipe.model_copy(update={"task": judge.name})),
    )
    return execute(job, Path(out or Path("runs") / name), tell=tell)


def load(run: str | Path, *, model: nn.Module | None = None, stage: str | None = None) -> nn.Module:
    """The compressed network of a run, as an ordinary `nn.Module`, in any process.

    run: the run's folder, a student's folder, or a packed student's file (`attar pack`). model: a
    fresh network of the same class, for a run that was given a module of the person's own
    (`attar.compress`); it is changed in place. stage: an earlier stage's student, such as
    `"01-distill"`. Raises `CheckpointError` or `UsageError`.
    """
    return load_student(run, model=model, stage=stage).module


def load_student(
    run: str | Path, *, model: nn.Module | None = None, stage: str | None = None
) -> Student:
    """Like `load`, with the record of what was done to the network (`.edits`)."""
    import attar.stages  # noqa: F401 - the edits' kinds are known once their packages are
    from attar.pipeline.job import rebuild
    from attar.stages.base import stages as known
    from attar.student import load_student as load_from
    from attar.student.packed import load_packed

    known.names()
    folder = Path(run)
    if folder.is_file():
        if stage is not None:
            raise UsageError(f"{run} holds one student: it has no stage {stage!r}")
        return load_packed(folder, build=rebuild, module=model)
    if stage is not None:
        folder = folder / "stages" / stage
        if not folder.is_dir():
            there = sorted(p.name for p in (Path(run) / "stages").glob("*"))
            raise UsageError(f"{run} has no stage {stage!r}; it has: {', '.join(there)}")
    if (folder / "student").is_dir():
        folder = folder / "student"
    return load_from(folder, build=rebuild, module=model)


def ledger(run: str | Path) -> dict[str, Any]:
    """A run's ledger, as `ledger.json` has it."""
    return read_ledger(Path(run))


def _as_network(module: nn.Module | None) -> dict[str, str] | None:
    """A network handed in, as a recipe has it: by its class. Raises `UsageError`."""
    if module is None:
        return None
    if not isinstance(module, nn.Module):
        raise UsageError(f"a teacher or student is an nn.Module, not a {type(module).__name__}")
    return {"model": f"{HANDED_IN}{type(module).__qualname__}"}


def _as_recipe(**values: Any) -> Recipe:
    """The recipe that says the same, checked like one from a file. Raises `RecipeError`."""
    said = {key: value for key, value in values.items() if value is not None}
    return validated(Source("attar.compress", said))


def _as_data(data: Loaders, classes: Sequence[str] | None) -> Data:
    if isinstance(data, Data):
        return data
    splits = tuple(data)
    if len(splits) != 3:
        raise UsageError(
            f"data has {len(splits)} parts; give three: train, validation (choices are made on it) "
            "and test (only reported on)"
        )
    return from_loaders(*splits, classes=classes)


__all__ = ["compress", "ledger", "load", "load_student"]
