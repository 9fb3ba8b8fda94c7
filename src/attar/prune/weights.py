"""Single weights set to zero, and kept there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import CheckpointError, UsageError
from attar.prune.criteria.base import Calls, Criterion, observe
from attar.prune.naming import matching
from attar.prune.patterns import (
    NM,
    Blocks,
    Pattern,
    dense_for,
    input_dim,
    parsed_block,
    parsed_pattern,
    pattern_from,
)
from attar.student import Student
from attar.student.edits import Edit

if TYPE_CHECKING:
    from attar.prune.removal import ChannelsRemoved


class Masked(Edit):
    """Weights that are zero and stay zero. masks: by parameter path, bool, true where a weight
    stays. patterns: what some of these masks keep to besides, N:M or whole blocks, by path.

    Stored as one bit a weight. After every optimizer step the masked weights are set to zero, and
    before it their gradients, so that momentum and weight decay can't move them either.
    """

    kind: ClassVar[str] = "masked"

    def __init__(
        self, masks: Mapping[str, Tensor], patterns: Mapping[str, Pattern] | None = None
    ) -> None:
        self.masks = dict(masks)
        self.patterns = dict(patterns or {})

    def to_json(self) -> dict[str, Any]:
        shapes = {path: list(mask.shape) for path, mask in self.masks.items()}
        patterns = {path: pattern.to_json() for path, pattern in self.patterns.items()}
        return {"shapes": shapes} | ({"patterns": patterns} if patterns else {})

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
            kept = {path: pattern_from(one) for path, one in record.get("patterns", {}).items()}
            if any(masks[path].dim() < 2 for path in kept):
                raise ValueError("a vector has no pattern")
        except (
            KeyError, TypeError, ValueError, RuntimeError, AttributeError, UsageError
        ) as error:  # fmt: skip
            raise CheckpointError(f"the record of masked weights is damaged: {error}") from None
        return cls(masks, kept)

    @classmethod
    def implied(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks that leave out just what is zero."""
        masks = {path: weights[path] != 0 for path in record["shapes"] if path in weights}
        return cls(masks).tensors()

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
        # what is masked is zero, so weights keep to a pattern where their mask does
        for path, pattern in self.patterns.items():
            if not pattern.fits(self.masks[path]):
                broken.append(f"the zeros of {path} are not {pattern} as promised")
        return broken

    def summary(self) -> str:
        zero = sum(int((~mask).sum()) for mask in self.masks.values())
        said = f"{zero} of {sum(m.numel() for m in self.masks.values())} weights masked"
        tensors = Counter(str(pattern) for pattern in self.patterns.values())
        return ", ".join([said, *(f"{p} in {n} tensor{'s' * (n > 1)}" for p, n in tensors.items())])

    def without(self, removal: ChannelsRemoved) -> Masked:
        """The masks of a network that lost these channels; patterns that this broke are gone."""
        masks = {
            path: removal.sliced(path, mask) if path in removal.removed else mask
            for path, mask in self.masks.items()
        }
        return Masked(masks, fitting(masks, self.patterns))

    def outside(self, blocks: Iterable[str]) -> Masked:
        """The masks of a network that lost these modules."""
        gone = tuple(f"{path}." for path in blocks)
        masks = {path: mask for path, mask in self.masks.items() if not path.startswith(gone)}
        return Masked(masks, {p: pattern for p, pattern in self.patterns.items() if p in masks})

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
    pattern: str | None = None,
    block: tuple[int, int] | None = None,
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

    pattern: or N:M, "2:4": of every M consecutive weights along the inputs at most N stay, the
    largest by score, the earlier of equal ones. Inputs are a linear layer's `in_features`, and a
    convolution's input channels, for each kernel position by itself; those of one group, where it
    has groups. A layer whose inputs are no multiple of M (a depthwise convolution: one), or would
    keep less than the floor, stays dense: `left_dense` says which and why.

    block: (rows, columns): whole blocks go. The weight is seen as a matrix (out, in · kernel
    positions), a block scores its weights' mean, and `ratio` counts blocks; blocks at the edges are
    smaller where the matrix ends.

    What is masked already scores below all else (in a block, as zeros), and stays masked. The
    student's `Masked` edit records each tensor's pattern where its zeros keep to it. Sources: `NM`
    and `Blocks` in `attar.prune.patterns`.

    Example:
        >>> from attar.prune import criteria
        >>> l1 = criteria.get("magnitude")()
        >>> sparse = prune_weights(Student(nn.Linear(8, 4)), criterion=l1, pattern="2:4")
        >>> (sparse.module.weight.view(-1, 4) != 0).sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """
    _check(criterion, ratio, threshold, pattern, block, scope)
    pruned = student.copy()
    weights = _included(weight_matrices(pruned.module), exclude)
    patterns = _patterns(pruned.module, weights, pattern, block, floor)
    observe(criterion, pruned.module, calls)
    old = _masks(pruned)
    if pattern is not None:
        masks = {
            path: own.mask(_scores(criterion, path, weights[path].detach(), old.get(path)))
            for path, own in patterns.items()
            if isinstance(own, NM)
        }
    else:
        blocks = {path: own for path, own in patterns.items() if isinstance(own, Blocks)}
        masks = _least(weights, blocks, old, criterion, ratio, threshold, scope, floor)
    for path, mask in old.items():
        masks[path] = masks[path] & mask.to(masks[path].device) if path in masks else mask
    edit = Masked(masks, fitting(masks, _recorded(pruned), patterns))
    edit.after_step(pruned.module)
    others = [e for e in pruned.edits if not isinstance(e, Masked)]
    return Student(pruned.module, pruned.spec, [*others, edit])


def left_dense(
    student: Student,
    *,
    pattern: str | None = None,
    floor: int = 8,
    exclude: Sequence[str] = (),
) -> dict[str, str]:
    """The layers that N:M leaves dense, excluded ones apart, and why: a sentence's end each.

    Arguments as of `prune_weights`. Without a pattern, as after pruning in blocks: layers none of
    whose weights is masked.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3))
        >>> left_dense(Student(net), pattern="2:4")
        {'0': 'its outputs read 1 input each, no multiple of 4'}
    """
    weights = _included(weight_matrices(student.module), exclude)
    if pattern is None:
        masks = _masks(student)
        whole = [path for path in weights if path not in masks or masks[path].all()]
        return {path.removesuffix(".weight"): "none of its blocks was to go" for path in whole}
    n, m = parsed_pattern(pattern)
    reasons = {
        path.removesuffix(".weight"): dense_for(_owner(student.module, path), weight, n, m, floor)
        for path, weight in weights.items()
    }
    return {layer: reason for layer, reason in reasons.items() if reason is not None}


def fitting(masks: Mapping[str, Tensor], *patterns: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """Of several patterns for each path, the last that its mask keeps to, where one does."""
    return {
        path: pattern
        for known in patterns
        for path, pattern in known.items()
        if pattern.fits(masks[path])
    }


def _check(
    criterion: Criterion,
    ratio: float | None,
    threshold: float | None,
    pattern: str | None,
    block: tuple[int, int] | None,
    scope: str,
) -> None:
    """Raises `UsageError` for settings that don't go together."""
    if pattern is not None and block is not None:
        raise UsageError("weights are pruned by a pattern or in blocks: give one of the two")
    if pattern is not None and (ratio is not None or threshold is not None or scope != "local"):
        raise UsageError(
            f"the pattern {pattern} says how many weights stay in every group: it takes no ratio, "
            "threshold or global scope"
        )
    if pattern is None and (ratio is None) == (threshold is None):
        raise UsageError("pruning takes either a ratio or a threshold: give exactly one")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio:g}: the share to remove lies between 0 and 1")
    if "weight" not in criterion.granularities:
        raise UsageError(
            f"{type(criterion).__name__} scores channels, not single weights: use granularity: "
            "channel, or criterion: magnitude"
        )


def _patterns(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    pattern: str | None,
    block: tuple[int, int] | None,
    floor: int,
) -> dict[str, Pattern]:
    """What each weight is pruned by, those apart that stay dense or lose single weights. Raises
    `UsageError` where a pattern leaves all of them dense."""
    if block is not None:
        rows, columns = parsed_block(block)
        dims = {path: input_dim(_owner(module, path)) for path in weights}
        return {p: Blocks(rows, columns, 1 if d is None else d) for p, d in dims.items()}
    if pattern is None:
        return {}
    n, m = parsed_pattern(pattern)
    found: dict[str, Pattern] = {}
    reasons = []
    for path, weight in weights.items():
        layer = _owner(module, path)
        why = dense_for(layer, weight, n, m, floor)
        if why is None:
            found[path] = NM(n, m, input_dim(layer) or 0)
        else:
            reasons.append(f"{path.removesuffix('.weight')}: {why}")
    if not found:
        raise UsageError(f"{n}:{m} leaves every layer dense ({reasons[0]})")
    return found


def _least(
    weights: Mapping[str, Tensor],
    blocks: Mapping[str, Blocks],
    old: Mapping[str, Tensor],
    criterion: Criterion,
    ratio: float | None,
    threshold: float | None,
    scope: str,
    floor: int,
) -> dict[str, Tensor]:
    """The masks that leave out what scores least, weights or blocks, by a ratio or a threshold."""
    by_mean = ratio is not None and scope == "global" and not criterion.comparable
    scores = {
        path: _scores(criterion, path, weight.detach(), old.get(path), by_mean, blocks.get(path))
        for path, weight in weights.items()
    }
    if ratio is not None and scope == "global":
        every = torch.cat([s.flatten() for s in scores.values()])
        threshold = float(every.kthvalue(int(ratio * every.numel()) + 1).values)

    def kept(score: Tensor) -> int:
        if threshold is not None:
            return int((score >= threshold).sum())
        return score.numel() - int((ratio or 0) * score.numel())

    masks = {}
    for path, score in scores.items():
        if path in blocks:
            least = _blocks_for(floor, score, blocks[path].sizes(weights[path]))
            chosen = _largest(score, max(least, kept(score)))
            masks[path] = blocks[path].mask(chosen, weights[path])
        else:
            masks[path] = _largest(score, max(floor, kept(score)))
    return masks


def _blocks_for(floor: int, scores: Tensor, sizes: Tensor) -> int:
    """How many of the best blocks have `floor` weights together."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    return int((sizes.flatten()[order].cumsum(0) < floor).sum()) + 1


def _masks(student: Student) -> dict[str, Tensor]:
    """What is masked already: true where a weight stays."""
    masks: dict[str, Tensor] = {}
    for edit in student.edits:
        for path, mask in edit.masks.items() if isinstance(edit, Masked) else ():
            masks[path] = masks[path] & mask.to(masks[path].device) if path in masks else mask
    return masks


def _recorded(student: Student) -> dict[str, Pattern]:
    """The patterns that masks keep to already."""
    masked = [edit for edit in student.edits if isinstance(edit, Masked)]
    return {path: pattern for edit in masked for path, pattern in edit.patterns.items()}


def _owner(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path.rpartition(".")[0])


def _scores(
    criterion: Criterion,
    path: str,
    weight: Tensor,
    mask: Tensor | None,
    by_mean: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """A weight's scores, or its blocks', masked ones below all others: what is gone must not be
    kept."""
    scores = criterion.scores(path, weight, None)
    gone = None if mask is None else ~mask.to(scores.device)
    if blocks is not None:
        scores = blocks.means(scores if gone is None else scores.masked_fill(gone, 0))
        gone = None if gone is None else blocks.means(gone.float()) == 1
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
