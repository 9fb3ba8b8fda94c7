"""Consistency of inner layers, through an adapter where their shapes differ."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from attar.distill.adapters import adapter, resize
from attar.distill.criterion import criteria, wide
from attar.distill.pairs import LayerCriterion
from attar.distill.signal import Signal
from attar.errors import UsageError


@criteria.register("feature")
class Feature(LayerCriterion):
    """The mean squared difference of inner layers, the student's brought to the teacher's shape.

        L = mean over pairs of mean over all elements of (r(student) − teacher)²

    for maps (N, C, H, W), tokens (N, T, D) or vectors (N, D). r pools or interpolates the student's
    map to the teacher's size and, where widths differ, changes the width by a 1×1 convolution or a
    linear layer. These adapters are the criterion's own parameters: `prepare` makes them, the
    optimizer trains them with the student, and they are no part of it.

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3.

    Example:
        >>> hint = Feature(layers=[{"student": "layer2", "teacher": "layer3"}])
        >>> hint.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *hint.parameters()])  # doctest: +SKIP
        >>> loss = hint(own, wanted)  # doctest: +SKIP
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.adapters = nn.ModuleList()

    def prepare(self, student: Signal, teacher: Signal) -> None:
        self.adapters = nn.ModuleList(
            adapter(wide(student.features[pair.student]), wide(teacher.features[pair.teacher]))
            for pair in self.pairs
        )

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        if not self.adapters:
            raise UsageError(
                "Feature has no adapters yet: call prepare(student, teacher) with the signals of "
                "one batch before the optimizer is made"
            )
        return F.mse_loss(wide(self.adapters[index](resize(student, teacher))), teacher)
