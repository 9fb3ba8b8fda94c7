"""What a run is about, with names turned into things: the task, the data, the networks."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from attar.data.base import Data
from attar.errors import CheckpointError, DataError, UsageError
from attar.files import Trust, allow, from_file, is_reference
from attar.models import ModelSpec, build, load_checkpoint, resolve
from attar.recipe.model import Budget, Deploy
from attar.runtimes import runtimes
from attar.stages.base import Stage
from attar.student import Student, load_student
from attar.student.fingerprint import fingerprint
from attar.tasks.base import Task
from attar.training.config import Training

if TYPE_CHECKING:
    from attar.recipe.model import Network, Recipe


@dataclass(frozen=True)
class Origin:
    """Where a network comes from, before anything is done to it.

    module: a network handed in from Python; else `spec` says what to build, and `checkpoint` which
        weights to load into it. key: a hash of all that.
    """

    key: str
    spec: ModelSpec | None = None
    checkpoint: Path | None = None
    module: nn.Module | None = None

    def fresh(self, seed: int = 0) -> Student:
        """The network as it comes. Random initial weights depend on `seed` alone."""
        if self.module is not None:
            return Student(copy.deepcopy(self.module).eval())
        assert self.spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build(self.spec, pretrained=self.checkpoint is None)
        if self.checkpoint is not None:
            load_checkpoint(module, self.checkpoint)
        return Student(module.eval(), self.spec)

    def load(self, folder: Path) -> Student:
        """A student saved in `folder` that began as this network."""
        module = copy.deepcopy(self.module) if self.module is not None else None
        return load_student(folder, build=rebuild, module=module)


def rebuild(spec: ModelSpec) -> nn.Module:
    """A spec's network whose weights are loaded next."""
    return build(spec, pretrained=False)


@dataclass(frozen=True)
class Job:
    """A run, ready to be executed."""

    name: str
    task: Task
    data: Data
    seed: int
    teacher: Origin
    stages: list[Stage]
    student: Origin | None = None
    from_teacher: dict[str, str] = field(default_factory=dict)
    train: Training | None = None
    prepare: list[Stage] = field(default_factory=list)
    deploy: Deploy = field(default_factory=Deploy)
    budget: Budget = field(default_factory=Budget)
    text: str = ""
    """The recipe as YAML, every default written out."""


def job_of(recipe: Recipe, *, trusted: Trust = False) -> Job:
    """The job that a recipe describes: its data are read, its networks looked up.

    trusted: whether a person's own file may be run (see `attar.files.allow`).
    Raises the `AttarError` of whatever is missing or wrong.
    """
    from attar.data import load_data
    from attar.recipe import dump_recipe
    from attar.tasks.base import tasks

    require_source(recipe)
    named = is_reference(recipe.task)
    task = (from_file(recipe.task, trusted) if named else tasks.get(recipe.task))()
    data = load_data(recipe.data, seed=recipe.seed, trusted=trusted)
    allow_own_files([*recipe.teacher.prepare, *recipe.stages], trusted)
    student = recipe.student
    return Job(
        name=recipe.name,
        task=task,
        data=data,
        seed=recipe.seed,
        teacher=_named_origin(recipe.teacher, data, trusted),
        student=_named_origin(student, data, trusted) if student is not None else None,
        from_teacher=student.from_teacher if student is not None else {},
        train=recipe.teacher.train if recipe.teacher.checkpoint is None else None,
        prepare=recipe.teacher.prepare,
        stages=recipe.stages,
        deploy=recipe.deploy,
        budget=recipe.budget,
        text=dump_recipe(recipe),
    )


def require_source(recipe: Recipe) -> None:
    """Raises `UsageError` for a run that was made in Python: a file can't hold its data."""
    if recipe.data.source == "python":
        raise UsageError(
            f"the data of {recipe.name!r} were handed in from Python: go on with it by the same "
            "call of attar.compress, or name a data set"
        )


def require_runtime(deploy: Deploy) -> None:
    """Raises `UsageError` where the runtime to deploy to isn't on this machine: nothing could be
    measured."""
    ready, how = runtimes.get(deploy.runtime)().available()
    if not ready:
        raise UsageError(f"the runtime {deploy.runtime} is missing: {how}")


def allow_own_files(stages: list[Stage], trusted: Trust) -> None:
    """Asks about the person's own files that stages name, before any of them is needed."""
    for stage in stages:
        for path in stage.files:
            if path.suffix == ".py":
                allow(path, trusted)


def require_answers(job: Job, student: Student, who: str) -> None:
    """Raises `DataError` where a network doesn't take the data's inputs, or can't answer about
    them: asked before anything long. who: what messages call it."""
    args, kwargs = job.task.arguments(job.data.validation.pick([0, 1]))
    try:
        with torch.no_grad():
            output = student.module(*args, **kwargs)
    except Exception as error:  # the person's own code: anything can come out of it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the {who} can't answer to inputs of shape {job.data.shape}, as {job.data.name} has "
            f"them: {reason}"
        ) from error
    job.task.check_output(output, job.data)
    if not job.task.logits(output).isfinite().all():
        raise DataError(f"the {who} answers with infinities or NaN: its weights are damaged")


def handed_in(module: nn.Module) -> Origin:
    """The origin of a module from Python: known by its classes, structure and weights."""
    return Origin(key=fingerprint(module), module=module)


def _named_origin(network: Network, data: Data, trusted: Trust) -> Origin:
    spec = resolve(
        network.model,
        network.arguments,
        channels=data.shape[0] if data.shape else None,
        classes=len(data.classes) or None,
        shape=data.shape,
        trusted=trusted,
    )
    checkpoint = Path(network.checkpoint) if network.checkpoint else None
    digest = hashlib.sha256(spec.model_dump_json(exclude={"library"}).encode())
    if checkpoint is not None:
        digest.update(content_of(checkpoint))
    return Origin(key=digest.hexdigest()[:32], spec=spec, checkpoint=checkpoint)


def content_of(path: Path) -> bytes:
    """The SHA-256 of a file of weights. Raises `CheckpointError` if it can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} can't be read: {error.strerror}") from None
