"""Sparse training in which zeros move: what matters least goes, what would matter most grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attar.prune.weights import Masked
from attar.student import Student


class Regrowing(Masked):
    """Masks that change while a network trains: every so many steps, in each tensor, the smallest
    of the weights that are left become zero, and as many of the masked ones that have the largest
    gradients are let grow, from zero. How many there are stays.

    share: of a tensor's weights, how many change at first; it falls to nothing as a cosine does by
    `until`, a share of all steps. every: steps from one change to the next.

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners" (RigL, section 3).
    """

    def __init__(
        self, masked: Masked, *, share: float, every: int, until: float, steps: int, epochs: int
    ) -> None:
        super().__init__({path: mask.clone() for path, mask in masked.masks.items()})
        self._left = {path: int(mask.sum()) for path, mask in self.masks.items()}
        self._share, self._every, self._steps = share, every, steps
        self._last = until * steps * epochs
        self._step = 0

    def start_epoch(self, module: nn.Module, epoch: int) -> None:
        """Called before each epoch: goes on from the weights as they are, so that a training that
        was interrupted takes the same way as one that was not."""
        self._step = epoch * self._steps
        if epoch:
            for path in self.masks:
                self.masks[path] = module.get_parameter(path).detach() != 0

    def before_step(self, module: nn.Module) -> None:
        self._step += 1
        if self._step % self._every == 0 and self._step < self._last:
            share = 0.5 * self._share * (1 + math.cos(math.pi * self._step / self._last))
            for path in self.masks:
                weight = module.get_parameter(path)
                if weight.grad is not None:
                    self.masks[path] = self._moved(path, weight, share)
        super().before_step(module)

    def _moved(self, path: str, weight: Tensor, share: float) -> Tensor:
        """The mask after a share of what is left gave way."""
        mask, left = self.masks[path].to(weight.device).reshape(-1), self._left[path]
        assert weight.grad is not None
        count = min(int(share * left), mask.numel() - left)
        kept = torch.zeros_like(mask)
        sizes = weight.detach().abs().reshape(-1).masked_fill(~mask, -1.0)
        kept[sizes.topk(min(left - count, int(mask.sum()))).indices] = True
        wanted = weight.grad.abs().reshape(-1).masked_fill(mask, -1.0)
        grown = wanted.topk(min(left - int(kept.sum()), int((~mask).sum()))).indices
        kept[grown] = True
        moved = kept.reshape(weight.shape)
        with torch.no_grad():
            weight.masked_fill_(~moved, 0)
        return moved

    def settled(self, module: nn.Module) -> Masked:
        """The masks as they ended up: of the weights that training hands back."""
        return Masked({path: module.get_parameter(path).detach() != 0 for path in self.masks})


def with_masks(student: Student, masked: Masked) -> Student:
    """The student with these masks in the place of its own."""
    others = [edit for edit in student.edits if not isinstance(edit, Masked)]
    return Student(student.module, student.spec, [*others, masked])
