"""The teacher's classifier on the student, behind a projector: an edit, since it is deployed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attar.distill.adapters import require_comparable
from attar.distill.classes import shared_classes
from attar.distill.ending import Ending, ending
from attar.distill.pairs import Pair
from attar.distill.responses import require_same_classes
from attar.errors import CheckpointError, UsageError
from attar.student import Edit, Student
from attar.student.edits import submodule
from attar.training.evaluation import device_of


class Projected(nn.Module):
    """A layer, and a projector on what it gives (of a tuple, on the first entry)."""

    def __init__(self, inner: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.projector = projector

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple | list):
            return type(output)([self.projector(output[0]), *output[1:]])
        return self.projector(output)


@dataclass(frozen=True)
class TeacherHead(Edit):
    """A student that answers through a projector and a classifier of its teacher's shape.

    layer: the path of the layer that the projector follows, whose output has the teacher's width
        from then on. head: the path of the classifier.
    maps: whether that layer gives maps (N, C, H, W), or tokens (N, T, D) or vectors (N, D).
    before, inside, after: widths of the student's features, of the projector, of the teacher's.
    positive: whether the projector ends in a ReLU, as features do that are never negative.
    inputs, classes, bias: the classifier's.
    """

    kind: ClassVar[str] = "teacher-head"

    layer: str
    head: str
    maps: bool
    before: int
    inside: int
    after: int
    positive: bool
    inputs: int
    classes: int
    bias: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> TeacherHead:
        made = cls(**{k: v for k, v in record.items() if k != "kind"})
        for name, kind in cls.__annotations__.items():
            wanted = {"str": str, "bool": bool, "int": int}.get(kind)
            if wanted is not None and type(getattr(made, name)) is not wanted:
                raise ValueError(f"{name} is {getattr(made, name)!r}")
        return made

    def replay(self, module: nn.Module) -> None:
        """Gives a network the projector and the classifier, newly initialised, in place. Raises
        `CheckpointError` for a network that lacks the layers."""
        what = "the teacher's classifier was put behind"
        inner, old = (submodule(module, path, what) for path in (self.layer, self.head))
        if not isinstance(old, nn.Linear):
            raise CheckpointError(
                f"the teacher's classifier was put in the place of {self.head}, which is a "
                f"{type(old).__name__} here"
            )
        projected = Projected(inner, self._projector())
        head = nn.Linear(self.inputs, self.classes, bias=self.bias)
        for made in (projected.projector, head):
            made.to(old.weight.device, old.weight.dtype).train(module.training)
        projected.training = module.training
        module.set_submodule(self.layer, projected)
        module.set_submodule(self.head, head)

    def summary(self) -> str:
        return f"the teacher's classifier, behind a projector of {self.inside} after {self.layer}"

    def _projector(self) -> nn.Sequential:
        if self.maps:
            steps: list[nn.Module] = [
                nn.Conv2d(self.before, self.inside, 1, bias=False),
                nn.BatchNorm2d(self.inside),
                nn.ReLU(),
                nn.Conv2d(self.inside, self.inside, 3, padding=1, bias=False),
                nn.BatchNorm2d(self.inside),
                nn.ReLU(),
                nn.Conv2d(self.inside, self.after, 1, bias=False),
                nn.BatchNorm2d(self.after),
            ]
        else:
            steps = [
                nn.Linear(self.before, self.inside, bias=False),
                _Normalised(self.inside),
                nn.ReLU(),
                nn.Linear(self.inside, self.inside, bias=False),
                _Normalised(self.inside),
                nn.ReLU(),
                nn.Linear(self.inside, self.after, bias=False),
                _Normalised(self.after),
            ]
        return nn.Sequential(*steps, *([nn.ReLU()] if self.positive else []))


class _Normalised(nn.BatchNorm1d):
    """Batch normalisation of vectors (N, D), and of tokens (N, T, D) over examples and tokens."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return super().forward(input)
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


def reuse_head(
    student: Student,
    teacher: nn.Module,
    example: tuple[Any, ...],
    *,
    layers: Pair | None = None,
    heads: Pair | None = None,
    reduction: int = 2,
) -> tuple[Pair, nn.Linear]:
    """Puts the teacher's classifier on the student, behind a projector; in place, with the edit on
    its record. Gives the layers whose outputs then have one width, and the classifier.

    example: the networks' arguments, batch first. layers, heads: default: as `ending` finds them.
    reduction: the projector is the teacher's width over it inside.

    Raises `UsageError` and leaves the student as it was: a student that has edits already, which
    would no longer know their layers; a layer that something with weights follows; features that
    can't be compared; other classes; sizes that don't fit the teacher's classifier.

    Example:
        >>> nets = [nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 3)) for n in (2, 8)]
        >>> student = Student(nets[0])
        >>> pair, head = reuse_head(student, nets[1], (torch.randn(5, 4),))
        >>> pair, torch.equal(head.weight, nets[1][2].weight), len(student.edits)
        (Pair(student='1', teacher='1'), True, 1)
    """
    if student.edits:
        raise UsageError(
            "the teacher's classifier can't be put on a student that has been changed already "
            f"({', '.join(dict.fromkeys(edit.kind for edit in student.edits))}), since its layers "
            "get other paths: distill by simkd first"
        )
    own, wanted = (
        ending(
            network,
            tuple(x.to(device_of(network)) for x in example),
            layer=getattr(layers, who, None),
            head=getattr(heads, who, None),
            who=who,
        )
        for network, who in ((student.module, "student"), (teacher, "teacher"))
    )
    weight, bias = _classifier(wanted.linear, shared_classes(teacher))
    require_same_classes(own.linear.out_features, len(weight))
    require_comparable(own.features, wanted.features)
    edit = _fitting(student.module, _edit(own, wanted, weight, bias, reduction), own.alike, example)
    edit.replay(student.module)
    head = student.module.get_submodule(edit.head)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    student.edits = [*student.edits, edit]
    return Pair(student=edit.layer, teacher=wanted.layer), head


def _classifier(linear: nn.Linear, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a classifier, for the classes that are shared."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if rows is None:
        return weight, bias
    return weight[rows], None if bias is None else bias[rows]


def _edit(
    own: Ending, wanted: Ending, weight: Tensor, bias: Tensor | None, reduction: int
) -> TeacherHead:
    maps = wanted.features.dim() == 4
    width = 1 if maps else -1
    after = wanted.features.shape[width]
    return TeacherHead(
        layer=own.layer,
        head=own.head,
        maps=maps,
        before=own.features.shape[width],
        inside=max(1, after // reduction),
        after=after,
        positive=bool((wanted.features >= 0).all()),
        inputs=weight.shape[1],
        classes=len(weight),
        bias=bias is not None,
    )


def _fitting(
    module: nn.Module, edit: TeacherHead, alike: Sequence[str], example: tuple[Any, ...]
) -> TeacherHead:
    """The edit at the innermost of these layers where it works: the fewest paths then change, but
    some networks read more of their parts than what they give. Raises `UsageError`."""
    *inner, whole = (replace(edit, layer=path) for path in alike)
    for trial in inner:
        with suppress(UsageError):
            _require_fitting(module, trial, example)
            return trial
    _require_fitting(module, whole, example)
    return whole


def _require_fitting(module: nn.Module, edit: TeacherHead, example: tuple[Any, ...]) -> None:
    """Raises `UsageError` unless a copy of the network answers with the edit."""
    trial = copy.deepcopy(module)
    edit.replay(trial)
    given: list[int] = []
    head = trial.get_submodule(edit.head)
    head.register_forward_pre_hook(lambda module, args: given.append(args[0].shape[-1]))
    try:
        placed = tuple(x.to(device_of(trial)) for x in example)
        ending(trial, placed, layer=edit.layer, head=edit.head, who="student")
    except UsageError:
        raise
    except Exception as error:  # whatever the person's forward raises at another width
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if given and given[-1] != edit.inputs:
            reason = f"it gets {given[-1]} values and takes {edit.inputs}"
        raise UsageError(
            f"the teacher's classifier doesn't fit the student behind {edit.layer!r}: {reason}; "
            f"name the last layer before {edit.head!r} in both networks (layers: [{{student: …, "
            "teacher: …}]), where both give features of one size"
        ) from None
