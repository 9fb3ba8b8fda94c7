"""The teacher's features, made from part of the student's."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import adapter, require_positions, resize
from attar.distill.criterion import criteria, wide


@criteria.register("mgd")
class MGD(AdaptedCriterion):
    """Masked generative distillation: all of the teacher's features from some of the student's.

        L = mean over pairs and examples of ‖ G(M ⊙ r(student)) − teacher ‖₂²

    the squares summed over an example's elements. M is 0 at positions drawn anew in each call, in
    all channels, and 1 elsewhere. r pools or interpolates the student's map to the teacher's size
    and changes its width by a 1×1 convolution or a linear layer where widths differ. G is two 3×3
    convolutions with a ReLU between them for maps (N, C, H, W); for tokens (N, T, D), which the
    paper doesn't treat, two linear layers that see each token and its two neighbours, as those of a
    single token could make nothing of one that is masked. Both are trained with the student.

    masked: the probability of a position to be masked; 0 masks none. The draws are of PyTorch's own
    generator, which a training seeds in each epoch. layers: pairs `{student: path, teacher: path}`;
    a bare path names the same layer in both.

    Source: Yang et al. 2022, "Masked Generative Distillation", section 3; summed over the batch
    there, and divided by its size in the authors' code, as here. 0.5 is for classification, 0.65
    and 0.45 for one- and two-stage detectors, 0.75 for segmentation.

    Example:
        >>> mgd = MGD(layers=["layer4"], weight=7e-5)
        >>> mgd.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *mgd.parameters()])  # doctest: +SKIP
        >>> loss = mgd(own, wanted)  # doctest: +SKIP
    """

    class Settings(AdaptedCriterion.Settings):
        masked: float = Field(0.5, ge=0, lt=1)

    settings: Settings

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_positions("mgd", student, teacher)
        aligned = adapter(student, teacher)
        return nn.ModuleDict({"align": aligned, "generate": _generator(teacher)})

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        parts = self.adapted(index)
        own = wide(parts["align"](resize(student, teacher)))
        kept = torch.rand(_positions(own), device=own.device) >= self.settings.masked
        made = wide(parts["generate"](own * kept))
        return (made - teacher).square().flatten(1).sum(1).mean()


def _positions(features: Tensor) -> tuple[int, ...]:
    """One number for all channels at a position."""
    width = 1 if features.dim() == 4 else 2
    return tuple(1 if dim == width else n for dim, n in enumerate(features.shape))


def _generator(teacher: Tensor) -> nn.Module:
    if teacher.dim() == 3:
        return _Windows(teacher.shape[2])
    width = teacher.shape[1]
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
    )


class _Windows(nn.Sequential):
    """Linear layers over windows of three tokens, zeros beyond the ends."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)
