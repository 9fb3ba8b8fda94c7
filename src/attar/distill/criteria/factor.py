"""The teacher's features paraphrased, the student's translated."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import require_maps, resize
from attar.distill.criterion import criteria, wide
from attar.distill.relations import unit

SLOPE = 0.1
"""Of the leaky ReLUs, below 0."""


@criteria.register("factor-transfer")
class FactorTransfer(AdaptedCriterion):
    """Factor transfer: the teacher's features as an autoencoder compresses them.

        L = mean over pairs of (mean over all elements of |f_T − f_S| + reconstruction · L_rec)
        f = factors at length 1 an example,  L_rec = mean over all elements of (teacher − D(E))²

    for maps (N, C, H, W). The teacher's factors are E, what its paraphraser, three 3×3 convolutions
    with leaky ReLUs, makes of its features, and D as many transposed ones make its features of them
    again. The student's are what its translator makes, three convolutions like E's. The student's
    map is pooled or interpolated to the teacher's size before. All are trained with the student.

    A deviation: the paper trains the paraphraser first, for some epochs on the teacher's features,
    and keeps it. Here it is trained beside the student, by L_rec alone: f_T is a constant to the
    first part, which reaches student and translator only. So the factors still move in the first
    epochs, and a paraphraser can't make them easier to guess.

    rate: the factors' width as a share of the teacher's. reconstruction: of L_rec in L; the default
    makes it 1 at the recommended weight. layers: pairs `{student: path, teacher: path}`; a bare
    path names the same layer in both.

    Source: Kim et al. 2018, "Paraphrasing Complex Network: Network Compression via Factor
    Transfer", section 3 with p = 1, averaged over elements as in the authors' code; without the
    leaky ReLU that ends D there, as features before a ReLU are negative.

    Example:
        >>> factors = FactorTransfer(layers=["layer3"], weight=500)
        >>> factors.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *factors.parameters()])  # doctest: +SKIP
        >>> loss = factors(own, wanted)  # doctest: +SKIP
    """

    class Settings(AdaptedCriterion.Settings):
        rate: float = Field(0.5, gt=0, allow_inf_nan=False)
        reconstruction: float = Field(0.002, gt=0, allow_inf_nan=False)

    settings: Settings

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_maps("factor-transfer", student, teacher)
        full, narrow = teacher.shape[1], max(1, round(teacher.shape[1] * self.settings.rate))
        return nn.ModuleDict(
            {
                "translate": _encoder(student.shape[1], narrow),
                "paraphrase": _encoder(full, narrow),
                "restore": _decoder(narrow, full),
            }
        )

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        parts = self.adapted(index)
        factors = parts["paraphrase"](teacher)
        lost = F.mse_loss(wide(parts["restore"](factors)), teacher)
        own = wide(parts["translate"](resize(student, teacher)))
        apart = F.l1_loss(unit(own.flatten(1)), unit(wide(factors).detach().flatten(1)))
        return apart + self.settings.reconstruction * lost


def _encoder(before: int, after: int) -> nn.Module:
    widths = ((before, before), (before, after), (after, after))
    convolutions = (nn.Conv2d(a, b, 3, padding=1) for a, b in widths)
    return nn.Sequential(*(m for c in convolutions for m in (c, nn.LeakyReLU(SLOPE))))


def _decoder(before: int, after: int) -> nn.Module:
    widths = ((before, before), (before, after), (after, after))
    first, second, last = (nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in widths)
    return nn.Sequential(first, nn.LeakyReLU(SLOPE), second, nn.LeakyReLU(SLOPE), last)
