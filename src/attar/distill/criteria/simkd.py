"""The teacher's classifier, reused: the student learns to give what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.adapters import require_comparable
from attar.distill.capture import unwrapped
from attar.distill.criterion import Criterion, criteria, wide
from attar.distill.head import reuse_head
from attar.distill.pairs import Pair
from attar.distill.signal import Signal
from attar.errors import UsageError
from attar.student import Student


@criteria.register("simkd")
class SimKD(Criterion):
    """The student's last features, projected, against the teacher's; the teacher's head on top.

        L = mean over all elements of (P(student) − teacher)²
        the student answers with W · pool(P(student)) + b,  W and b the teacher's

    for maps (N, C, H, W), tokens (N, T, D) or vectors (N, D). P is, for maps, a 1×1 convolution to
    C_t / r, a 3×3 one, and a 1×1 one to C_t, each with a batch normalisation and a ReLU; for tokens
    and vectors its linear counterpart: three linear layers with the same widths, normalised over
    examples and tokens. P and the head are part of the student that is deployed: while `changing`
    holds, the head is frozen. The task's own loss is left out unless it is asked for.

    Of maps of different sizes the larger is averaged to the smaller's. What lies between layer and
    head must have no weights and work with the teacher's width: pooling, flattening, a class token.
    Paths inside the student's layer change: `layer3.0` is `layer3.inner.0` from then on.

    layers: one pair, the last before the head; `auto` finds it. reduction: r.
    head: the classifiers' paths, `{student, teacher}`; default: the last `nn.Linear` that runs.
    Raises `UsageError` for layers that don't fit, a student with edits, no network to teach.

    Source: Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier", section
    3, with two deviations: the last ReLU of P is left out where the teacher's features can be
    negative (seen on a few examples), since no student could reach them; and it is P's output that
    is averaged for the loss, where the authors' code averages the student's map before P.

    Example:
        >>> simkd = SimKD(layers="auto")
        >>> with simkd.changing(student, net, (images,)):  # doctest: +SKIP
        ...     teacher = Teacher(net, task, layers=simkd.teacher_layers)
        ...     objective = DistillObjective(task, teacher, {"simkd": simkd}, task_weight=0)
        ...     train(student.module, objective=objective, ...)
    """

    class Settings(Criterion.Settings):
        layers: Annotated[list[Pair], Field(min_length=1, max_length=1)] | Literal["auto"]
        reduction: int = Field(2, ge=1)
        head: Pair | None = None

    settings: Settings
    beside_task = 0.0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.settings.layers != "auto":
            self._compare(self.settings.layers[0])

    @contextmanager
    def changing(
        self, student: Student, teacher: nn.Module | None, example: tuple[Any, ...]
    ) -> Iterator[None]:
        """Gives the student the projector and the teacher's head, which is frozen until the end.
        The change itself stays."""
        if teacher is None:
            raise UsageError(
                "simkd needs the teacher's network, whose classifier it puts on the student: name "
                "a model as the teacher, or use a criterion on responses"
            )
        layers = None if self.settings.layers == "auto" else self.settings.layers[0]
        pair, head = reuse_head(
            student,
            unwrapped(teacher),
            example,
            layers=layers,
            heads=self.settings.head,
            reduction=self.settings.reduction,
        )
        self._compare(pair)
        head.requires_grad_(False)
        try:
            yield
        finally:
            head.requires_grad_(True)

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        if not self.student_layers:
            raise UsageError("simkd has not changed the student yet: enter changing(…) first")
        own = wide(student.features[self.student_layers[0]])
        wanted = wide(teacher.features[self.teacher_layers[0]])
        require_comparable(own, wanted)
        maps = own.dim() == 4
        width = 1 if maps else -1
        if own.shape[width] != wanted.shape[width]:
            raise UsageError(
                f"simkd compares features of one width, and the student's have {own.shape[width]} "
                f"and the teacher's {wanted.shape[width]}: enter changing(…) first"
            )
        if maps:
            size = min(own.shape[2], wanted.shape[2]), min(own.shape[3], wanted.shape[3])
            own, wanted = (F.adaptive_avg_pool2d(x, size) for x in (own, wanted))
        return F.mse_loss(own, wanted)

    def _compare(self, pair: Pair) -> None:
        self.student_layers, self.teacher_layers = (pair.student,), (pair.teacher,)
