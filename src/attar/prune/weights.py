"""Single weights set to zero, and kept there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import CheckpointError, UsageError
from attar.prune.criteria.base import Calls, Criterion, observe
from attar.prune.naming import matching
from attar.student import Student
from attar.student.edits import Edit

if TYPE_CHECKING:
    from attar.prune.removal import ChannelsRemoved


class Masked(Edit):
    """Weights that are zero and stay zero. masks: by parameter path, bool, true where a weight
    stays.

    Stored as one bit a weight. After every optimizer step the masked weights are set to zero, and
    before it their gradients, so that momentum and weight decay can't move them either.
    """

    kind: ClassVar[str] = "masked"

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    def to_json(self) -> dict[str, Any]:
        return {"shapes": {path: list(mask.shape) for path, mask in self.masks.items()}}

    def tensors(self) -> dict[str, Tensor]:
        return {
            path: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
            for path, mask in self.masks.items()
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Masked:
        masks = {}
        try:
            for path, shape in record["shapes"].items():
                bits = np.unpackbits(tensors[path].numpy(), count=int(np.prod(shape)))
                masks[path] = torch.from_numpy(bits.astype(bool)).view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"the record of masked weights is damaged: {error}") from None
        return cls(masks)

    def before_step(self, module: nn.Module) -> None:
        for weight, mask in self._pairs(module):
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0)

    def after_step(self, module: nn.Module) -> None:
        with torch.no_grad():
            for weight, mask in self._pairs(module):
                weight.masked_fill_(~mask, 0)

    def check(self, module: nn.Module) -> list[str]:
        broken = []
        weights = dict(module.named_parameters(remove_duplicate=False))
        for path, mask in self.masks.items():
            weight = weights.get(path)
            if weight is None or weight.shape != mask.shape:
                broken.append(f"{path}, whose weights are masked, is gone or of another shape")
                continue
            grown = int(weight.detach()[~mask.to(weight.device)].count_nonzero())
            if grown:
                broken.append(f"{grown} masked weights of {path} are no longer zero")
        return broken

    def summary(self) -> str:
        zero = sum(int((~mask).sum()) for mask in self.masks.values())
        return f"{zero} of {sum(m.numel() for m in self.masks.values())} weights masked"

    def without(self, removal: ChannelsRemoved) -> Masked:
        """The masks of a network that lost these channels."""
        return Masked(
            {
                path: removal.sliced(path, mask) if path in removal.removed else mask
                for path, mask in self.masks.items()
            }
        )

    def _pairs(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        pairs = []
        for path, mask in self.masks.items():
            weight = module.get_parameter(path)
            if mask.device != weight.device:
                mask = self.masks[path] = mask.to(weight.device)
            pairs.append((weight, mask))
        return pairs


def prune_weights(
    student: Student,
    *,
    criterion: Criterion,
    ratio: float | None = None,
    threshold: float | None = None,
    scope: Literal["local", "global"] = "local",
    floor: int = 8,
    exclude: Sequence[str] = (),
    calls: Calls | None = None,
) -> Student:
    """A copy of the student whose least important weights are zero, and stay so.

    Weight matrices and kernels only; norms, biases and embeddings are left alone. ratio: the share
    of each tensor's weights (`local`) or of all (`global`, each tensor's scores divided by their
    mean unless they compare as they are), counting those already masked. threshold: or, what scores
    less goes. floor: least weights a tensor keeps. exclude: paths of layers (with `*`). calls:
    batches for a criterion that needs data, as in `prune_channels`. Raises `UsageError`.
    """
    if (ratio is None) == (threshold is None):
        raise UsageError("pruning takes either a ratio or a threshold: give exactly one")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio:g}: the share to remove lies between 0 and 1")
    if "weight" not in criterion.granularities:
        raise UsageError(
            f"{type(criterion).__name__} scores channels, not single weights: use granularity: "
            "channel, or criterion: magnitude"
        )
    pruned = student.copy()
    weights = _included(weight_matrices(pruned.module), exclude)
    observe(criterion, pruned.module, calls)
    old = _masks(pruned)
    by_mean = ratio is not None and scope == "global" and not criterion.comparable
    scores = {p: _scores(criterion, p, w.detach(), old.get(p), by_mean) for p, w in weights.items()}
    if ratio is not None and scope == "global":
        every = torch.cat([s.flatten() for s in scores.values()])
        threshold = float(every.kthvalue(int(ratio * every.numel()) + 1).values)

    def kept(score: Tensor) -> int:
        if threshold is not None:
            return int((score >= threshold).sum())
        return score.numel() - int((ratio or 0) * score.numel())

    masks = {}
    for path, score in scores.items():
        masks[path] = _largest(score, max(floor, kept(score)))
    for path, mask in old.items():
        masks[path] = masks[path] & mask.to(masks[path].device) if path in masks else mask
    edit = Masked(masks)
    edit.after_step(pruned.module)
    others = [e for e in pruned.edits if not isinstance(e, Masked)]
    return Student(pruned.module, pruned.spec, [*others, edit])


def _masks(student: Student) -> dict[str, Tensor]:
    """What is masked already: true where a weight stays."""
    masks: dict[str, Tensor] = {}
    for edit in student.edits:
        for path, mask in edit.masks.items() if isinstance(edit, Masked) else ():
            masks[path] = masks[path] & mask.to(masks[path].device) if path in masks else mask
    return masks


def _scores(
    criterion: Criterion, path: str, weight: Tensor, mask: Tensor | None, by_mean: bool
) -> Tensor:
    """A weight's scores, masked elements below all others: what is gone must not be kept."""
    scores = criterion.scores(path, weight, None)
    gone = None if mask is None else ~mask.to(scores.device)
    if by_mean:
        counted = scores if gone is None else scores.masked_fill(gone, 0)
        scores = scores / (counted.mean() or 1.0)
    return scores if gone is None else scores.masked_fill(gone, -1)


def weight_matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are weight matrices or kernels, by path, each tensor once."""
    spared = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            matrix = parameter.dim() >= 2 and name.endswith("weight")
            if matrix and not isinstance(owner, spared):
                found.setdefault(id(parameter), (f"{path}.{name}".lstrip("."), parameter))
    return dict(found.values())


def _included(weights: dict[str, nn.Parameter], exclude: Sequence[str]) -> dict[str, nn.Parameter]:
    excluded = matching((path.rpartition(".")[0] for path in weights), exclude)
    left = {p: w for p, w in weights.items() if p.rpartition(".")[0] not in excluded}
    if not left:
        raise UsageError(
            "nothing is left to prune: every weight matrix is excluded or there is none"
        )
    return left


def _largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest scores, exactly; earlier ones among equals."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)
