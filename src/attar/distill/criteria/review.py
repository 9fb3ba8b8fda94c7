"""Shallow layers that learn from the teacher's with what the deep ones know."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import require_maps, resize
from attar.distill.criterion import criteria, wide
from attar.distill.signal import Signal

LEVELS = (4, 2, 1)
"""Sizes that maps are pooled to."""
WIDEST = 512
"""The most channels of fused features."""


@criteria.register("reviewkd")
class Review(AdaptedCriterion):
    """Knowledge review: each of the teacher's layers is compared with the student's and all deeper.

        L = mean over pairs j of D(o_j(f_j), teacher_j)
        f_j = a ⊙ x_j + b ⊙ u,  x_j = c_j(student_j),  u = f_{j+1} at the size of x_j
        a, b = sigmoid(1×1 convolution of x_j and u),  one number a position; f_n = x_n
        D = Σ_l w_l · mean over all elements of (P_l(o) − P_l(t))² / Σ_l w_l

    for maps (N, C, H, W). c is a 1×1 convolution and o a 3×3 one, each with a batch normalisation,
    all trained with the student. D is of whole maps (w = 1) and of maps that P averages to 4×4, 2×2
    and 1×1, of those that are smaller, w halving with each. o sees f at the teacher's size.

    layers: pairs `{student: path, teacher: path}` from shallow to deep; a bare path names the same
    layer in both. Fused features have the width of the student's last layer, 512 at most.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", section 3 (residual
    learning with ABF and HCL), details as in the authors' code, but for the mean over the pairs,
    where they sum: their weight times the number of pairs is the weight here. Theirs grows from 0
    over the first 20 epochs, and the last pair is the pooled features before the classifier, which
    a path can't name where pooling is no layer.

    Example:
        >>> review = Review(layers=["layer1", "layer2", "layer3"], weight=15)
        >>> review.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *review.parameters()])  # doctest: +SKIP
        >>> loss = review(own, wanted)  # doctest: +SKIP
    """

    def prepare(self, student: Signal, teacher: Signal) -> None:
        require_maps("reviewkd", student.features[self.student_layers[-1]])
        self._width = min(WIDEST, student.features[self.student_layers[-1]].shape[1])
        super().prepare(student, teacher)
        del self.adapters[-1].attend  # nothing is deeper

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_maps("reviewkd", student, teacher)
        return _Fusion(student.shape[1], self._width, teacher.shape[1])

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        losses, deeper = [], None
        for index in reversed(range(len(self.student_layers))):
            fusion = self.adapted(index)
            wanted = wide(teacher.features[self.teacher_layers[index]])
            deeper = fusion(wide(student.features[self.student_layers[index]]), deeper)
            losses.append(self.compare(index, wide(fusion.out(resize(deeper, wanted))), wanted))
        return torch.stack(losses).mean()

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
        for level in LEVELS:
            if level < min(teacher.shape[2:]):
                weight /= 2
                total += weight
                own, wanted = (F.adaptive_avg_pool2d(x, level) for x in (student, teacher))
                loss = loss + weight * F.mse_loss(own, wanted)
        return loss / total


class _Fusion(nn.Module):
    """A student's layer with what the deeper ones gave."""

    def __init__(self, before: int, width: int, after: int) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.out = nn.Sequential(
            nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, features: Tensor, deeper: Tensor | None) -> Tensor:
        x = self.into(features)
        if deeper is None:
            return x
        u = F.interpolate(deeper, x.shape[2:], mode="nearest")
        a, b = self.attend(torch.cat((x, u), 1)).split(1, 1)
        return x * a + u * b
