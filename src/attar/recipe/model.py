"""What a recipe holds: task, data, teacher, student, stages, deploy target, budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    field_validator,
    model_validator,
)

from attar.data.config import DataConfig
from attar.errors import UsageError
from attar.files import is_reference
from attar.registry import Registry
from attar.runtimes.base import GraphPasses, runtimes
from attar.stages.base import Stage, stages
from attar.tasks.base import tasks
from attar.training.config import Training
from attar.units import parse_share, parse_size

HANDED_IN = "python:"
"""Prefix of a model's name when the module itself was handed in from Python."""

NEVER_TEACH = {"prune", "share", "quantize"}
"""Stages that need a student that already knows something."""


def stage_of(written: object) -> Stage:
    """The stage that `{name: {fields}}` writes down. Raises `ValueError`."""
    if isinstance(written, Stage):
        return written
    if isinstance(written, str):
        written = {written: {}}
    if not isinstance(written, dict) or len(written) != 1:
        raise ValueError("a stage is one name with its settings, such as `prune: {ratio: 0.5}`")
    ((name, settings),) = written.items()
    try:
        kind = stages.get(str(name))
        whole = TypeAdapter(dict[str, kind]).validate_python({name: settings or {}})  # type: ignore[valid-type]
    except UsageError as error:
        raise ValueError(str(error)) from None
    return whole[name]


def _written(stage: Stage) -> dict[str, Any]:
    return {stage.name: stage.model_dump(mode="json")}


StageField = Annotated[Stage, PlainValidator(stage_of), PlainSerializer(_written)]


def _registered(registry: Registry[Any], name: str) -> str:
    """The name, which the registry knows. Raises `ValueError`."""
    try:
        registry.get(name)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return name


class Part(BaseModel):
    """A section of a recipe: its fields are its keys, any other key is an error."""

    model_config = ConfigDict(extra="forbid")


class Network(Part):
    """A network and where its weights are: a model's name, its arguments, perhaps a checkpoint.

    model: a name of Attar's own, a torchvision name, `timm:NAME`, or `path/to/file.py:function`.
    checkpoint: a safetensors or PyTorch file.
    """

    model: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it comes with weights: a checkpoint's, the library's, or those it was given."""
        pretrained = self.arguments.get("weights") or self.arguments.get("pretrained")
        return bool(self.checkpoint or pretrained) or self.model.startswith(HANDED_IN)


class Teacher(Network):
    """The network that knows. Without weights it is trained first (`train`).

    prepare: stages that the teacher itself goes through before it teaches.
    """

    train: Training | None = None
    prepare: list[StageField] = Field(default_factory=list)

    @model_validator(mode="after")
    def _knows_something(self) -> Teacher:
        if not self.has_weights and self.train is None:
            raise ValueError(
                "the teacher knows nothing yet: give its `checkpoint`, or `train: {epochs: …}`, "
                "or a library's weights (`arguments: {weights: DEFAULT}`)"
            )
        if self.checkpoint and self.train is not None:
            raise ValueError(
                "the teacher has a `checkpoint` and is to be trained as well: leave one of the two "
                "out (`train: null`)"
            )
        _check_order(self.prepare)
        return self


class Learner(Network):
    """The network that is taught.

    from_teacher: layers that begin with the teacher's weights, the student's path: the teacher's.
    """

    from_teacher: dict[str, str] = Field(default_factory=dict)


class Deploy(Part):
    """The target every row is exported to and measured on.

    graph: `all`, the runtime's graph optimisation, or `none`.
    """

    runtime: Annotated[str, Field(validate_default=True)] = "onnxruntime"
    batch: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    graph: GraphPasses = "all"

    @field_validator("runtime")
    @classmethod
    def _runtime_exists(cls, name: str) -> str:
        return _registered(runtimes, name)

    @model_validator(mode="after")
    def _passes_exist(self) -> Deploy:
        known = runtimes.get(self.runtime).passes
        if self.graph not in known:
            raise ValueError(
                f"graph: {self.graph} is nothing the runtime {self.runtime} can do; "
                f"it knows {', '.join(known)}"
            )
        return self


class Budget(Part):
    """What the person can afford; what isn't given isn't judged.

    max_drop: how much of the metric may be lost against the teacher, as a fraction (0.005); in a
        recipe `0.5%`. latency_ms: the median milliseconds of one answer. size: bytes of the model
        files (`50KB`). memory: bytes that a fresh process adds (`20MB`).
    """

    max_drop: Annotated[float, BeforeValidator(parse_share)] | None = None
    latency_ms: float | None = Field(default=None, gt=0)
    size: Annotated[int, BeforeValidator(parse_size)] | None = None
    memory: Annotated[int, BeforeValidator(parse_size)] | None = None


class Recipe(Part):
    """Everything one run depends on. See `attar.recipe.load_recipe` for reading one from YAML.

    Example:
        >>> Recipe.model_validate({  # doctest: +SKIP
        ...     "name": "mine", "data": {"source": "digits"},
        ...     "teacher": {"model": "digits-wide", "train": {"epochs": 20}},
        ...     "stages": [{"prune": {"ratio": 0.5}}, {"quantize": {}}],
        ...     "budget": {"max_drop": "1%"},
        ... })
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    task: Annotated[str, Field(validate_default=True)] = "image-classification"
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    teacher: Teacher
    student: Learner | None = None
    """`None`: a copy of the teacher."""
    stages: list[StageField] = Field(default_factory=list)
    deploy: Deploy = Field(default_factory=Deploy)
    budget: Budget = Field(default_factory=Budget)

    @field_validator("task")
    @classmethod
    def _task_exists(cls, name: str) -> str:
        return name if is_reference(name) else _registered(tasks, name)

    @field_validator("stages")
    @classmethod
    def _possible_order(cls, chain: list[Stage]) -> list[Stage]:
        _check_order(chain)
        return chain

    @model_validator(mode="after")
    def _student_learns(self) -> Recipe:
        if (
            self.student
            and not self.student.has_weights
            and all(stage.name in NEVER_TEACH for stage in self.stages)
        ):
            raise ValueError(
                f"the student {self.student.model!r} starts with random weights and no stage "
                "teaches it: put `distill` first, or give its `checkpoint`"
            )
        if self.student is None:  # a copy of the teacher has been through what prepared it
            _check_order(self.stages, after=self.teacher.prepare)
        return self

    @model_validator(mode="after")
    def _runtime_suits(self) -> Recipe:
        for stage in (*self.teacher.prepare, *self.stages):
            try:
                stage.suits(runtimes.get(self.deploy.runtime))
            except UsageError as error:
                raise ValueError(f"{stage.name}: {error}") from None
        return self

    @model_validator(mode="after")
    def _labels_where_needed(self) -> Recipe:
        from attar.distill.criterion import require_no_labels
        from attar.stages.distill import Distill

        for stage in (*self.teacher.prepare, *self.stages):
            if self.data.unlabelled is None or not isinstance(stage, Distill):
                continue
            names = [name for one in stage.criteria for name in one]
            try:  # without a person's own files, which may not have been allowed to run yet
                require_no_labels(name for name in names if not is_reference(name))
            except UsageError as error:
                raise ValueError(f"distill: {error}") from None
        return self


def _check_order(chain: list[Stage], after: Sequence[Stage] = ()) -> None:
    for place, stage in enumerate(chain):
        for earlier in (*after, *chain[:place]):
            if earlier.name in stage.not_after:
                raise ValueError(
                    f"{stage.name} (stage {place + 1}) can't come after {earlier.name}: "
                    f"{stage.not_after[earlier.name]}"
                )
