"""Consistency of inner layers, through an adapter where their shapes differ."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import adapter, resize
from attar.distill.criterion import criteria, wide


@criteria.register("feature")
class Feature(AdaptedCriterion):
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

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return adapter(student, teacher)

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(wide(self.adapted(index)(resize(student, teacher))), teacher)
