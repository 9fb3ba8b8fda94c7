"""Which examples of a batch are each other's neighbours, as probabilities."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from attar.distill.criterion import criteria
from attar.distill.divergence import divergence
from attar.distill.pairs import LayerCriterion
from attar.distill.relations import examples, gram, unit

EPSILON = 1e-7
"""The least similarity: of two examples that point in opposite directions."""


@criteria.register("pkt")
class PKT(LayerCriterion):
    """Probabilistic knowledge transfer: how likely an example picks each other as its neighbour.

        L = mean over pairs and examples i of Σ_{j≠i} p_ij · log(p_ij / q_ij)
        p_ij = K_ij / Σ_{k≠i} K_ik,  K_ij = (cos(xᵢ, xⱼ) + 1) / 2

    p from the teacher's features, q from the student's, of any shape, batch first, flattened; they
    may differ in all but the batch, and their scale changes nothing. Two examples have no choice
    and teach nothing: it takes three.

    layers: pairs `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Passalis & Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge
    Transfer", section 3, with the cosine kernel. The mean over the examples instead of their sum
    keeps the weight apart from the batch's size; the authors' code takes the mean over all N² and
    counts each example as its own neighbour.

    Example:
        >>> pkt = PKT(layers=["pool"], weight=500)
        >>> loss = pkt(own, wanted)  # doctest: +SKIP
    """

    auto_deepest = True

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        q, p = _neighbours(student), _neighbours(teacher)
        return divergence(p, q)


def _neighbours(features: Tensor) -> Tensor:
    """(N, N − 1), the logarithms of each example's probabilities of the others."""
    near = (gram(unit(examples("pkt", features))) + 1) / 2
    n = len(near)
    others = near.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
    return F.log_softmax(others.clamp_min(EPSILON).log(), 1)
