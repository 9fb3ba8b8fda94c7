"""Where the networks look: the energy of every position."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from attar.distill.adapters import require_comparable, resize
from attar.distill.criterion import criteria
from attar.distill.pairs import LayerCriterion


@criteria.register("attention")
class Attention(LayerCriterion):
    """Attention transfer: where a layer's energy lies, normalised over the positions.

        L = mean over pairs and examples of ‖ a_S/‖a_S‖₂ − a_T/‖a_T‖₂ ‖₂²
        a = mean over the width of features², a number a position

    for maps (N, C, H, W) or tokens (N, T, D). Widths may differ; the student's map is pooled or
    interpolated to the teacher's size. Each pair's loss is between 0 and 2.

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", equation 2 with p = 2
    (the squared distance, as in the authors' code, but summed over the positions).

    Example:
        >>> attention = Attention(layers=["layer2", "layer3"], weight=100)
        >>> loss = attention(own, wanted)  # doctest: +SKIP
    """

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        require_comparable(student, teacher)
        return (_where(resize(student, teacher)) - _where(teacher)).square().sum(1).mean()


def _where(features: Tensor) -> Tensor:
    """(N, positions), of length 1 each."""
    width = 1 if features.dim() == 4 else -1
    return F.normalize(features.square().mean(width).flatten(1), dim=1)
