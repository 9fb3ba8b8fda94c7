"""Which channels of a layer answer alike."""

from __future__ import annotations

from torch import Tensor, nn

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import adapter, channels, require_positions
from attar.distill.criterion import criteria, wide
from attar.distill.relations import gram, unit


@criteria.register("ickd")
class ICKD(AdaptedCriterion):
    """Inter-channel correlation: which channels of a layer answer alike within one example.

        L = mean over pairs, examples and channels c of ‖ G_S[c] − G_T[c] ‖₂²
        G = rows of F·Fᵀ divided by their length,  F = features as (channels, positions)

    for maps (N, C, H, W) or tokens (N, T, D), whose numbers of positions may differ, and a map may
    be compared with tokens. Where widths differ, a 1×1 convolution, trained with the student,
    brings it to the teacher's: the criterion's own, as in `feature`. Each row's part is between 0
    and 4, whatever the width. G takes N · C² numbers a network (0.13 GB for 32 examples of 1024).

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Liu et al. 2021, "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation", equations 2 to 4 (ICKD-C), with G's rows normalised and the sum divided by C
    instead of C², as in the authors' code; without the batch normalisation that follows their
    convolution, and without their convolution where the widths are the same.

    Example:
        >>> ickd = ICKD(layers=["layer4"], weight=2.5)
        >>> ickd.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *ickd.parameters()])  # doctest: +SKIP
        >>> loss = ickd(own, wanted)  # doctest: +SKIP
    """

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_positions("ickd", student, teacher)
        own, wanted = _positions(student), _positions(teacher)
        return adapter(own[:, :1], wanted[:, :1])  # at one position, as for all

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        own = wide(self.adapted(index)(_positions(student)))
        return (_alike(own) - _alike(_positions(teacher))).square().sum(2).mean()


def _positions(features: Tensor) -> Tensor:
    """(N, positions, channels)."""
    return channels(features).transpose(1, 2)


def _alike(positions: Tensor) -> Tensor:
    return unit(gram(positions.transpose(1, 2)))
