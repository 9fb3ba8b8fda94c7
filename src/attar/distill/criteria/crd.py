"""Which of all training examples an embedding belongs to."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from attar.data.base import UNLABELLED, Batch
from attar.distill.adapted import AdaptedCriterion, require_prepared
from attar.distill.adapters import channels
from attar.distill.criterion import criteria, wide
from attar.distill.relations import full_precision, unit
from attar.distill.signal import Signal
from attar.errors import UsageError

UNSEEN = -1
"""The class of an example that hasn't come yet."""


@criteria.register("crd")
class CRD(AdaptedCriterion):
    """Contrastive: tells an example's embedding by the teacher from those of other examples.

        L = mean over pairs of L(student, teacher's bank) + L(teacher, student's bank)
        L(a, bank) = −mean over examples i of log h(aᵢ·bankᵢ) + Σ_k log(1 − h(aᵢ·bank_k))
        h(s) = p / (p + K/M),  p = exp(s/τ) / Z

    a are a network's features through a linear layer, at length 1. bank has, for each of the M
    training examples, a moving average of them, bank ← momentum · bank + (1 − momentum) · a at
    length 1; it starts at random. k are K negatives, drawn anew for each example: of other classes
    where the batch has class labels (N,), as far as they were seen, else any others. Z is measured
    on the first batch, M times the mean of exp(s/τ), and kept.

    Features are vectors (N, D), tokens (N, T, D) or maps (N, C, H, W), averaged over their
    positions; student and teacher may differ in all but the batch. The linear layers are the
    criterion's own, trained with the student, and not part of it. It needs the batch, for its
    `indices`, and before `prepare` the number of training examples, `expect(M)`.

    The banks take M × width × 2 × 4 bytes a pair (50,000 examples of 128: 51 MB), in memory and in
    checkpoints; a step takes N × (M + negatives) × 2 × 4 bytes a few times over.

    layers: pairs `{student: path, teacher: path}`; the last ones before the classes are best.
    width: of the embeddings. negatives: K. temperature: τ. momentum: of the banks.

    Source: Tian, Krishnan & Isola 2020, "Contrastive Representation Distillation", section 3.1,
    equations 18 and 19, with negatives of other classes (section 4.4). Z, the momentum and that the
    positive is the bank's, too, are the authors' code: with the batch's own embedding for it, a
    bank still random keeps nothing apart, and all embeddings become one.

    Example:
        >>> crd = CRD(layers=["pool"], weight=0.8)
        >>> crd.expect(len(train))  # doctest: +SKIP
        >>> crd.prepare(own, wanted)  # doctest: +SKIP
        >>> optimizer = SGD([*student.parameters(), *crd.parameters()])  # doctest: +SKIP
        >>> loss = crd(own, wanted, batch)  # doctest: +SKIP
    """

    class Settings(AdaptedCriterion.Settings):
        width: int = Field(128, ge=1)
        negatives: int = Field(16384, ge=1)
        temperature: float = Field(0.07, ge=0.01, allow_inf_nan=False)
        momentum: float = Field(0.5, ge=0, lt=1)

    settings: Settings
    auto_deepest = True
    labels: Tensor

    _examples: int | None = None

    def expect(self, examples: int) -> None:
        self._examples = examples

    def prepare(self, student: Signal, teacher: Signal) -> None:
        super().prepare(student, teacher)
        unseen = torch.full((self._expected(),), UNSEEN, device=student.logits.device)
        self.register_buffer("labels", unseen)

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return Contrast(_pooled(student), _pooled(teacher), self._expected(), self.settings)

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        if batch is None:
            raise UsageError(
                "crd tells a batch's examples from the rest of the training set: it needs the "
                "batch, for its indices"
            )
        require_prepared(self, self.adapters)
        others = self._others(batch)
        losses = [
            self.compare(
                index,
                wide(student.features[pair.student]),
                wide(teacher.features[pair.teacher]),
                batch.indices,
                others,
            )
            for index, pair in enumerate(self.pairs)
        ]
        return torch.stack(losses).mean()

    def compare(  # type: ignore[override]  # only called here
        self, index: int, student: Tensor, teacher: Tensor, indices: Tensor, others: Tensor
    ) -> Tensor:
        return self.adapted(index)(_pooled(student), _pooled(teacher), indices, others)

    def _expected(self) -> int:
        if self._examples is None:
            raise UsageError(
                "crd remembers every training example: call expect(examples) with their number "
                "before prepare (DistillObjective.prepare takes it as examples=)"
            )
        return self._examples

    def _others(self, batch: Batch) -> Tensor:
        """(N, negatives): places of training examples, with repetition, that are of other classes
        or, without labels, just others. Of all examples in the order of their classes, one's own
        class is a run: what is drawn lies before it, or is moved beyond it."""
        classes, count = batch.targets, len(self.labels)
        if classes is None or classes.dim() != 1 or classes.is_floating_point():
            order, first, beyond = None, batch.indices, batch.indices + 1
        else:
            # an example without a label is a class of its own: all others may be told from it
            classes = torch.where(classes == UNLABELLED, UNSEEN - 1 - batch.indices, classes)
            if self.training:
                self.labels[batch.indices] = classes
            ranked, order = self.labels.sort(stable=True)
            first = torch.searchsorted(ranked, classes)
            beyond = torch.searchsorted(ranked, classes, right=True)
        own = (beyond - first)[:, None]
        shape = (len(first), self.settings.negatives)
        drawn = torch.randint(2**40, shape, device=first.device) % (count - own).clamp_min(1)
        drawn = torch.where(drawn >= first[:, None], drawn + own, drawn).clamp_max(count - 1)
        return drawn if order is None else order[drawn]


class Contrast(nn.Module):
    """One pair of layers: both linear layers, and both banks (student's, teacher's)."""

    banks: Tensor
    log_z: Tensor

    def __init__(
        self, student: Tensor, teacher: Tensor, examples: int, settings: CRD.Settings
    ) -> None:
        super().__init__()
        self.settings = settings
        self.student = nn.Linear(student.shape[1], settings.width)
        self.teacher = nn.Linear(teacher.shape[1], settings.width)
        self.register_buffer("banks", unit(torch.randn(2, examples, settings.width)))
        self.register_buffer("log_z", torch.full((2,), torch.inf))  # until it is measured

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor, others: Tensor) -> Tensor:
        t, count, negatives = self.settings.temperature, self.banks.shape[1], others.shape[1]
        with full_precision(student):
            both = unit(torch.stack([self.student(student), self.teacher(teacher)]))
            # a product with the whole bank, since gathering the negatives' vectors takes far more
            scores = both @ self.banks.flip(0).transpose(1, 2) / t
            places = torch.cat([indices[:, None], others], 1).expand(2, -1, -1)
            scores = scores.gather(2, places)
            odds = scores - (self._normaliser(scores) + math.log(negatives / count))[:, None, None]
            right, wrong = F.logsigmoid(odds[..., 0]), F.logsigmoid(-odds[..., 1:]).sum(2)
            if self.training:
                self._remember(indices, both.detach())
            return -(right + wrong).sum(0).mean()

    def _normaliser(self, scores: Tensor) -> Tensor:
        """log Z of both sides, (2,), measured the first time."""
        pairs = scores.shape[1] * scores.shape[2]
        measured = scores.detach().logsumexp((1, 2)) + math.log(self.banks.shape[1] / pairs)
        log_z = torch.where(self.log_z.isinf(), measured, self.log_z)
        if self.training:
            self.log_z.copy_(log_z)
        return log_z

    def _remember(self, indices: Tensor, both: Tensor) -> None:
        kept = self.settings.momentum
        self.banks[:, indices] = unit(kept * self.banks[:, indices] + (1 - kept) * both)


def _pooled(features: Tensor) -> Tensor:
    """(N, width): the mean over the positions of maps or tokens."""
    return channels(features).mean(2)
