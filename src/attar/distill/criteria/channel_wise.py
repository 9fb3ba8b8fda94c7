"""Where each channel of a layer is most active."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from attar.distill.adapted import AdaptedCriterion
from attar.distill.adapters import adapter, channels, require_positions, resize
from attar.distill.criterion import criteria, wide
from attar.distill.divergence import divergence


@criteria.register("cwd")
class ChannelWise(AdaptedCriterion):
    """Channel-wise distillation: where each channel is active, as probabilities over positions.

        L = T² · mean over pairs, examples and channels of Σ_i p_i · (log p_i − log q_i)
        p = softmax(teacher / T),  q = softmax(student / T),  over the positions i of a channel

    for maps (N, C, H, W) or tokens (N, T, D). The student's map is pooled or interpolated to the
    teacher's size, and its width changed by a 1×1 convolution or a linear layer where the widths
    differ, trained with the student. A constant added to a channel of the student's or of the
    teacher's changes nothing.

    temperature: T; more than 1 attends to more of each channel. layers: pairs
    `{student: path, teacher: path}`; a bare path names the same layer in both.

    Source: Shu et al. 2021, "Channel-wise Knowledge Distillation for Dense Prediction", section
    3.2, made for semantic segmentation and detection.

    Example:
        >>> cwd = ChannelWise(layers=["layer4"], weight=50)
        >>> cwd.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *cwd.parameters()])  # doctest: +SKIP
        >>> loss = cwd(own, wanted)  # doctest: +SKIP
    """

    class Settings(AdaptedCriterion.Settings):
        temperature: float = Field(4.0, ge=0.01, allow_inf_nan=False)

    settings: Settings

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        require_positions("cwd", student, teacher)
        return adapter(student, teacher)

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        t = self.settings.temperature
        own = wide(self.adapted(index)(resize(student, teacher)))
        q, p = (F.log_softmax(channels(x) / t, -1) for x in (own, teacher))
        return divergence(p, q) * t**2
