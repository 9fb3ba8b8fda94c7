"""Where each neuron of a layer responds."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from attar.distill.adapters import channels, require_comparable, require_positions, resize
from attar.distill.criterion import criteria
from attar.distill.pairs import LayerCriterion
from attar.distill.relations import full_precision, unit


@criteria.register("nst")
class NST(LayerCriterion):
    """Neuron selectivity transfer: the patterns of where a layer's neurons respond.

        L = mean over pairs and examples of MMD²(student's patterns, teacher's patterns)
        MMD² = mean of k(s, s') + mean of k(t, t') − 2 · mean of k(s, t)

    over all pairs of neurons, a neuron's pattern being its responses at all positions at length 1.
    For maps (N, C, H, W), whose neurons are the channels, or tokens (N, T, D), whose neurons are
    the D numbers of a token. Widths may differ, and a neuron has no counterpart: their order
    changes nothing. The student's map is pooled or interpolated to the teacher's size.

    kernel: k. `polynomial`, (s·t + offset)^degree, the paper's best; `linear`, s·t; `gaussian`,
    exp(−‖s − t‖² / 2σ²) with σ² the mean ‖s − t‖² of the example, taken as a constant in gradients.
    degree, offset: of `polynomial`. layers: pairs `{student: path, teacher: path}`; a bare path
    names the same layer in both.

    Source: Huang & Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity
    Transfer", section 4.

    Example:
        >>> nst = NST(layers=["layer3"], weight=25)
        >>> loss = nst(own, wanted)  # doctest: +SKIP
    """

    class Settings(LayerCriterion.Settings):
        kernel: Literal["polynomial", "linear", "gaussian"] = "polynomial"
        degree: int = Field(2, ge=1)
        offset: float = Field(0.0, ge=0, allow_inf_nan=False)

    settings: Settings

    def compare(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        require_positions("nst", student, teacher)
        require_comparable(student, teacher)
        s, t = unit(channels(resize(student, teacher))), unit(channels(teacher))
        with full_precision(s):
            spread = self._spread(s, t)
            own, wanted, cross = (
                self._alike(a, b, spread).mean() for a, b in ((s, s), (t, t), (s, t))
            )
        return own + wanted - 2 * cross

    def _spread(self, s: Tensor, t: Tensor) -> Tensor:
        """σ², (N, 1, 1), where the kernel has one."""
        if self.settings.kernel != "gaussian":
            return s.new_ones(())
        return _apart(s, t).mean((1, 2), keepdim=True).detach()

    def _alike(self, a: Tensor, b: Tensor, spread: Tensor) -> Tensor:
        """k of each pattern of `a` with each of `b`, (N, neurons, neurons). spread: σ²."""
        if self.settings.kernel == "gaussian":
            least = torch.finfo(spread.dtype).eps
            return torch.exp(-_apart(a, b) / (2 * spread.clamp_min(least)))
        products = a @ b.transpose(1, 2)
        if self.settings.kernel == "polynomial":
            return (products + self.settings.offset) ** self.settings.degree
        return products


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i − b_j‖² from inner products: (N, neurons, positions) to (N, neurons, neurons)."""
    lengths = a.square().sum(2).unsqueeze(2) + b.square().sum(2).unsqueeze(1)
    return lengths - 2 * a @ b.transpose(1, 2)
