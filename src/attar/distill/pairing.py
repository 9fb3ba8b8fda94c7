"""Pairing by itself: which of the student's layers goes with which of the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from attar.data.base import Batch
from attar.distill.criterion import Criterion
from attar.distill.forms import frozen
from attar.distill.pairs import LayerCriterion, Pair
from attar.errors import UsageError
from attar.tasks.base import Task
from attar.training.evaluation import device_of, to_device

MOST_PAIRS = 4
LEAST_EXAMPLES = 4
"""What an unbiased estimate of similarity needs."""


@dataclass(frozen=True)
class Paired:
    """A pair that was chosen, and why. similarity: linear CKA, 1 where two layers tell examples
    apart in the same way, about 0 where they have nothing in common."""

    pair: Pair
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    similarity: float

    def __str__(self) -> str:
        return (
            f"{self.pair.student} {_written(self.student_shape)} with {self.pair.teacher} "
            f"{_written(self.teacher_shape)}, similarity {self.similarity:.2f}"
        )


@dataclass
class _Layer:
    path: str
    shape: tuple[int, ...]
    grams: list[Tensor]

    @property
    def resolution(self) -> tuple[int, ...]:
        """What parts a network into stages: the size of its maps; nothing for tokens."""
        return self.shape[1:] if len(self.shape) == 3 else ()


def pair_layers(
    student: nn.Module, teacher: nn.Module, task: Task, batches: Sequence[Batch]
) -> list[Paired]:
    """Pairs of layers, from shallow to deep, at most four.

    Of the student come the last block at each size of its maps, or, where there are no sizes (a
    transformer), blocks spread evenly; the deepest is always among them. Blocks are modules made of
    others; single layers where a network has none. Each is paired with a block of the teacher of
    the same kind and, where there is one, of the same size, so that pairs keep their order and the
    sum of their similarities is the largest. Similarity is linear centred kernel alignment (CKA),
    from unbiased estimates over the batches.

    batches: real examples, 4 at least in each; two of 128 are plenty. Both networks are called in
    evaluation mode and left as they were.
    Raises `UsageError` where the networks have no layers of one kind.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited",
    section 3; Nguyen, Raghu & Kornblith 2021, "Do Wide and Deep Networks Learn the Same Things?",
    equation 3 (over batches).

    Example:
        >>> for one in pair_layers(student, teacher, task, [batch]):  # doctest: +SKIP
        ...     print(one)
        layer2.2 (32, 16, 16) with layer2.8 (32, 16, 16), similarity 0.83
    """
    if min((len(b.inputs) for b in batches), default=0) < LEAST_EXAMPLES:
        raise UsageError(f"layers are paired by batches of {LEAST_EXAMPLES} examples at least")
    own, wanted = (_blocks(network, task, batches) for network in (student, teacher))
    chosen = _ends_of_stages([s for s in own if any(_comparable(s, t) for t in wanted)])
    similar = [[_similarity(s, t) for t in wanted] for s in chosen]
    places = _in_order([_allowed(s, wanted) for s in chosen], similar)
    if not places:
        raise UsageError(
            f"{type(student).__name__} and {type(teacher).__name__} have no inner layers that can "
            "be compared (maps with maps, tokens with as many tokens): name the pairs, or use "
            "criteria on answers"
        )
    return [
        Paired(
            Pair(student=chosen[i].path, teacher=wanted[j].path),
            chosen[i].shape,
            wanted[j].shape,
            similar[i][j],
        )
        for i, j in places
    ]


def with_pairs(
    criterion: type[Criterion], settings: dict[str, Any], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """A criterion's settings with these pairs where they leave them open (`layers: auto`)."""
    if settings.get("layers") != "auto" or not issubclass(criterion, LayerCriterion):
        return settings
    taken = pairs[-1:] if criterion.auto_deepest else pairs
    return {**settings, "layers": [pair.model_dump() for pair in taken]}


def _blocks(network: nn.Module, task: Task, batches: Sequence[Batch]) -> list[_Layer]:
    """The network's blocks in the order of their execution, one for each value."""
    whole = [n for n, m in network.named_modules() if n and any(True for _ in m.children())]
    leaves = [n for n, m in network.named_modules() if n and n not in whole]
    found = _seen(network, whole, task, batches)
    return found if len(found) > 1 else _seen(network, leaves, task, batches)


def _seen(
    network: nn.Module, paths: Sequence[str], task: Task, batches: Sequence[Batch]
) -> list[_Layer]:
    seen: dict[str, _Layer] = {}
    repeated: set[str] = set()
    for batch in batches:
        now: set[str] = set()

        def keep(path: str, output: Any, now: set[str] = now) -> None:
            if not isinstance(output, Tensor) or output.dim() not in (3, 4):
                return
            if path in now:
                repeated.add(path)  # runs twice: either output could be meant
            now.add(path)
            layer = seen.setdefault(path, _Layer(path, tuple(output.shape[1:]), []))
            layer.grams.append(_gram(output))

        with _watched(network, paths, keep), frozen(list(network.modules())):
            args, kwargs = task.arguments(to_device(batch, device_of(network)))
            network(*args, **kwargs)
    return _apart([layer for path, layer in seen.items() if path not in repeated])


@contextmanager
def _watched(network: nn.Module, paths: Sequence[str], keep: Any) -> Iterator[None]:
    modules = dict(network.named_modules())
    handles = [
        modules[path].register_forward_hook(
            lambda module, args, output, path=path: keep(path, output)
        )
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apart(layers: list[_Layer]) -> list[_Layer]:
    """One layer of those with one value: a container gives what its last part gave."""
    kept: list[_Layer] = []
    for layer in layers:
        if kept and kept[-1].shape == layer.shape and _same(kept[-1], layer):
            kept.pop()
        kept.append(layer)
    return kept


def _same(one: _Layer, other: _Layer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.grams, other.grams, strict=True))


def _comparable(own: _Layer, wanted: _Layer) -> bool:
    if len(own.shape) != len(wanted.shape):
        return False
    return len(own.shape) == 3 or own.shape[0] == wanted.shape[0]


def _ends_of_stages(layers: list[_Layer]) -> list[_Layer]:
    ends = [
        layer
        for layer, after in zip_longest(layers, layers[1:])
        if after is None or not layer.resolution or layer.resolution != after.resolution
    ]
    return [ends[i] for i in _spread(len(ends), MOST_PAIRS)]


def _spread(count: int, most: int) -> list[int]:
    """Places spread evenly over `count`, the last among them.

    >>> _spread(12, 4)
    [2, 5, 8, 11]
    """
    taken = min(count, most)
    return [round((i + 1) * count / taken) - 1 for i in range(taken)]


def _allowed(own: _Layer, wanted: list[_Layer]) -> list[bool]:
    """Which of the teacher's layers a student's may go with."""
    comparable = [_comparable(own, t) for t in wanted]
    sized = [c and own.resolution == t.resolution for c, t in zip(comparable, wanted, strict=True)]
    return sized if any(sized) else comparable


def _in_order(allowed: list[list[bool]], similar: list[list[float]]) -> list[tuple[int, int]]:
    """Pairs (row, column), rows and columns rising, that sum to the most; as many as possible.

    >>> _in_order([[True, True], [True, True]], [[0.1, 0.9], [0.2, 0.8]])
    [(0, 0), (1, 1)]
    """
    rows, columns = len(allowed), len(allowed[0]) if allowed else 0
    best: list[list[tuple[int, float, tuple[tuple[int, int], ...]]]] = [
        [(0, 0.0, ())] * (columns + 1) for _ in range(rows + 1)
    ]
    for i in range(rows):
        for j in range(columns):
            options = [best[i][j + 1], best[i + 1][j]]
            if allowed[i][j]:
                count, total, pairs = best[i][j]
                options.append((count + 1, total + similar[i][j], (*pairs, (i, j))))
            best[i + 1][j + 1] = max(options, key=lambda option: option[:2])
    return list(best[rows][columns][2])


def _gram(output: Tensor) -> Tensor:
    """(N, N): products of the examples' values, the diagonal left out."""
    flat = output.detach().flatten(1).float()
    flat = flat - flat.mean(0)
    return (flat @ flat.T).fill_diagonal_(0).double().cpu()


def _similarity(own: _Layer, wanted: _Layer) -> float:
    """Linear CKA of two layers over the batches that both have seen."""
    if len(own.grams) != len(wanted.grams):
        return 0.0

    def over(a: _Layer, b: _Layer) -> float:
        return sum(_dependence(x, y) for x, y in zip(a.grams, b.grams, strict=True))

    scale = over(own, own) * over(wanted, wanted)
    return over(own, wanted) / scale**0.5 if scale > 0 else 0.0


def _dependence(k: Tensor, m: Tensor) -> float:
    """The unbiased Hilbert-Schmidt independence criterion of two Gram matrices without diagonals
    (Song et al. 2012, equation 5)."""
    n = len(k)
    rows_k, rows_m = k.sum(0), m.sum(0)
    value = (k * m).sum() + rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2))
    value = value - 2 / (n - 2) * rows_k @ rows_m
    return float(value / (n * (n - 3)))


def _written(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
