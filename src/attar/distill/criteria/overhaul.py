"""The teacher's features before its ReLU, where they matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import channels, require_comparable, resize
from attar.distill.criterion import criteria, wide


@criteria.register("ofd")
class Overhaul(AdaptedCriterion):
    """Overhauled feature distillation: what the teacher's ReLU lets through.

        L = mean over pairs and examples of Σ_i d(t_i, s_i),  t = max(teacher, m_c),  s = r(student)
        d(t, s) = 0 where s ≤ t ≤ 0, (t − s)² elsewhere

    for what layers give before their ReLU (a batch normalisation's output): maps (N, C, H, W),
    tokens (N, T, D) or vectors (N, D). What is negative in the teacher need only be as low in the
    student. m_c, the margin of a channel c, is the mean of the teacher's negative responses. r is a
    1×1 convolution (linear layer) and a batch normalisation, trained with the student whatever the
    widths; the student's map is pooled or interpolated to the teacher's size before.

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Heo et al. 2019, "A Comprehensive Overhaul of Feature Distillation", section 3, with
    three deviations: m_c is measured on the batch that `prepare` sees and kept (0 for a channel
    that is never negative there), where the paper derives it from the teacher's batch
    normalisation; the teacher normalises as in evaluation, not by the batch; and pairs count alike,
    where the authors' code halves the weight with each layer further from the output.

    Example:
        >>> ofd = Overhaul(layers=[{"student": "bn2", "teacher": "bn3"}], weight=1e-3)
        >>> ofd.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *ofd.parameters()])  # doctest: +SKIP
        >>> loss = ofd(own, wanted)  # doctest: +SKIP
    """

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_comparable(student, teacher)
        return _Transform(channels(student).shape[1], channels(teacher))

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        transform = self.adapted(index)
        s = wide(transform.layers(channels(resize(student, teacher))))
        t = torch.maximum(channels(teacher), transform.margin)
        matters = (s > t) | (t > 0)
        return ((t - s).square() * matters).sum((1, 2)).mean()


class _Transform(nn.Module):
    """r for features as (N, width, positions), and the teacher's margins."""

    margin: Tensor

    def __init__(self, before: int, teacher: Tensor) -> None:
        super().__init__()
        after = teacher.shape[1]
        self.layers = nn.Sequential(nn.Conv1d(before, after, 1, bias=False), nn.BatchNorm1d(after))
        low = teacher < 0
        count = low.sum((0, 2)).clamp_min(1)
        mean = (teacher * low).sum((0, 2)) / count
        self.register_buffer("margin", mean.detach().unsqueeze(1))
