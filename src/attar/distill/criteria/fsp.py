"""How features flow from one layer to another within a network."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.adapted import require_prepared
from attar.distill.adapters import adapter, channels, require_positions
from attar.distill.criterion import Criterion, criteria, wide
from attar.distill.relations import full_precision
from attar.distill.signal import Signal
from attar.errors import UsageError


class Flow(BaseModel):
    """Two layers of the student, from and to, and the two of the teacher. Two bare paths stand for
    the same in both networks.

    Example:
        >>> Flow.model_validate(["layer1", "layer2"])
        Flow(student=('layer1', 'layer2'), teacher=('layer1', 'layer2'))
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: tuple[str, str]
    teacher: tuple[str, str]

    @model_validator(mode="before")
    @classmethod
    def _same_paths(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("is two layers, from and to")
        same = isinstance(value, list | tuple)
        return {"student": value, "teacher": value} if same else value

    @property
    def ends(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """The pairs (student's layer, teacher's layer) where it begins and ends."""
        return (self.student[0], self.teacher[0]), (self.student[1], self.teacher[1])


@criteria.register("fsp")
class FSP(Criterion):
    """The flow of solution procedure: which channels of two layers go together.

        L = mean over flows and examples of ‖ G_S − G_T ‖_F²
        G = A·Bᵀ / positions,  A, B = what two layers of a network give, as (width, positions)

    for maps (N, C, H, W) or tokens (N, T, D). Of two maps in a network the larger is max-pooled to
    the other's size; student and teacher may differ in size, and in their numbers of tokens. Where
    a student's layer is not as wide as the teacher's, a 1×1 convolution or a linear layer changes
    that, trained with the student: an addition, as the paper takes layers of equal widths.

    flows: `{student: [from, to], teacher: [from, to]}`; bare `[from, to]` names the same layers in
    both.

    Source: Yim et al. 2017, "A Gift from Knowledge Distillation", equations 1 and 2 with equal
    weights; there it is a first training before the task's.

    Example:
        >>> fsp = FSP(flows=[["layer1", "layer2"], ["layer2", "layer3"]])
        >>> fsp.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *fsp.parameters()])  # doctest: +SKIP
        >>> loss = fsp(own, wanted)  # doctest: +SKIP
    """

    class Settings(Criterion.Settings):
        flows: list[Flow] = Field(min_length=1)

    settings: Settings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._ends = list(dict.fromkeys(end for one in self.settings.flows for end in one.ends))
        self.student_layers = tuple(dict.fromkeys(own for own, _ in self._ends))
        self.teacher_layers = tuple(dict.fromkeys(wanted for _, wanted in self._ends))
        self.adapters = nn.ModuleList()

    def prepare(self, student: Signal, teacher: Signal) -> None:
        made = []
        for own, wanted in self._ends:
            features, like = wide(student.features[own]), wide(teacher.features[wanted])
            require_positions("fsp", features, like)
            made.append(adapter(*(_one(x) for x in (features, like))))
        self.adapters = nn.ModuleList(made)

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        require_prepared(self, self.adapters)
        losses = []
        for flow in self.settings.flows:
            places = [self._ends.index(end) for end in flow.ends]
            own = [
                wide(self.adapters[place](wide(student.features[path])))
                for place, path in zip(places, flow.student, strict=True)
            ]
            wanted = [wide(teacher.features[path]) for path in flow.teacher]
            losses.append((_flow(*own) - _flow(*wanted)).square().sum((1, 2)).mean())
        return torch.stack(losses).mean()


def _one(features: Tensor) -> Tensor:
    """A single token of tokens, which student and teacher may have other numbers of."""
    return features[:, :1] if features.dim() == 3 else features


def _flow(start: Tensor, end: Tensor) -> Tensor:
    """(N, start's width, end's width)."""
    if start.dim() != end.dim() or (start.dim() == 3 and start.shape[1] != end.shape[1]):
        raise UsageError(
            "a flow goes between two layers that give maps, or two that give as many tokens, not "
            f"features of shapes {tuple(start.shape)} and {tuple(end.shape)}"
        )
    if start.dim() == 4 and start.shape[2:] != end.shape[2:]:
        size = (min(start.shape[2], end.shape[2]), min(start.shape[3], end.shape[3]))
        start, end = F.adaptive_max_pool2d(start, size), F.adaptive_max_pool2d(end, size)
    a, b = channels(start), channels(end)
    with full_precision(a):
        return a @ b.transpose(1, 2) / a.shape[2]
