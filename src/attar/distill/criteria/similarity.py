"""Which examples of a batch a network finds alike."""

from __future__ import annotations

from torch import Tensor

from attar.distill.criterion import criteria
from attar.distill.pairs import LayerCriterion
from attar.distill.relations import examples, gram, unit


@criteria.register("similarity")
class Similarity(LayerCriterion):
    """Similarity-preserving: which examples of a batch a layer finds alike.

        L = mean over pairs of 1/N² · ‖ G_S − G_T ‖_F²
        G = rows of A·Aᵀ divided by their length,  A = features as (N, everything else)

    for features of any shape, batch first; student and teacher may differ in all but the batch,
    whose examples (two at least) are compared with one another.

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", equations 1 to 4.

    Example:
        >>> similarity = Similarity(layers=["layer3"], weight=3000)
        >>> loss = similarity(own, wanted)  # doctest: +SKIP
    """

    auto_deepest = True

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        return (_alike(student) - _alike(teacher)).square().mean()


def _alike(features: Tensor) -> Tensor:
    return unit(gram(examples("similarity", features)))
