"""Sharing a whole network's weights, with or without a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from attar.errors import UsageError
from attar.registry import near
from attar.share.codebook import Codebook, cluster, distortion, finite
from attar.share.edit import Assignment, Gradient, Shared
from attar.share.importance import checked_importance
from attar.share.numbering import numbered_by_group
from attar.share.vectors import Vectors, cluster_vectors, unfit

Scope = Literal["tensor", "network"]


@dataclass(frozen=True)
class Sharing:
    """What was done to one tensor.

    values: in its codebook, the largest where it has several. bits: of one index. weights: their
    number. distortion: mean squared error over the mean square. codebooks: how many of its own;
    0 where it takes its values from one for several tensors. length: weights an index stands for.
    single: why it shares single weights though vectors were asked for, a sentence's end.
    """

    values: int
    bits: int
    weights: int
    distortion: float
    codebooks: int = 1
    length: int = 1
    single: str | None = None


def shareable(module: nn.Module, exclude: Iterable[str] = ()) -> list[str]:
    """The paths of the parameters that sharing takes: all but vectors (biases, norms), empty ones
    and those whose path fits a pattern of `exclude` (`classifier.*`). Raises `UsageError` for a
    pattern that fits nothing."""
    weights = [n for n, p in module.named_parameters() if _has_weights(p)]
    left_out = fitting(weights, exclude, "exclude")
    return [name for name in weights if name not in left_out]


def share_weights(
    module: nn.Module,
    bits: int | None = None,
    exclude: Iterable[str] = (),
    *,
    values: int | None = None,
    scope: Scope = "tensor",
    channels: int | None = None,
    importance: Mapping[str, Tensor] | None = None,
    vectors: Vectors | None = None,
    gradient: Gradient = "mean",
) -> tuple[Shared, dict[str, Sharing]]:
    """Gives the weight tensors of `module`, in place, a few values.

    bits, values: 2**bits values (1 to 8) in a codebook, or so many (2 to 256); one of the two.
    scope: `tensor`, a codebook for each; `network`, one for all tensors of a dtype: its values
        follow the layers of most weights, so layers of another spread lose more.
    channels: instead, so many consecutive output channels (indices of the first dimension; of a
        transposed convolution, its inputs, of an embedding, its entries) have a codebook of theirs.
    importance: how much each weight's error counts, by path (`fisher_importance`); tensors without
        one count all their weights alike.
    vectors: layers that share runs of weights instead; those that can't share single weights, as
        `Sharing.single` says.
    gradient: how the shared values are trained, as of `Shared`.

    Tied parameters are shared once. Returns the edit that keeps it so and what was done, by path.
    Raises `UsageError` for settings that don't fit, `AttarError` for weights that are no numbers;
    the network is then as it was.

    Example:
        >>> network = nn.Linear(64, 8)
        >>> edit, done = share_weights(network, bits=4)
        >>> done["weight"].values, network.weight.unique().numel()
        (16, 16)
        >>> edit.after_step(network)  # after every optimizer step of one's own loop
    """
    size = _size(bits, values)
    if channels is not None and (channels < 1 or scope != "tensor"):
        raise UsageError(
            "channels is how many channels, at least 1, have a codebook of their own: it doesn't "
            "go with a codebook for the whole network"
        )
    weights = {path: module.get_parameter(path) for path in shareable(module, exclude)}
    masses = _importances(importance or {}, module)
    single = {} if vectors is None else _unfit(weights, vectors)
    plain = {
        path: weight
        for path, weight in weights.items()
        if vectors is None or path not in single or single[path] is not None
    }
    found: dict[str, _Found] = {}
    if vectors is not None:
        for path in weights.keys() - plain.keys():
            found[path] = _vectors(path, weights[path], vectors, masses.get(path))
    if scope == "network":
        found |= _across(plain, size, masses)
    elif channels is not None:
        found |= {p: _by_channels(p, w, size, channels, masses.get(p)) for p, w in plain.items()}
    else:
        for path, weight in plain.items():
            book = cluster(weight, size, name=path, importance=masses.get(path))
            found[path] = _of(weight, book, Assignment.of(book))
    for path, weight in weights.items():
        with torch.no_grad():
            weight.copy_(found[path].weights)
    done = {path: found[path].sharing(single.get(path)) for path in weights}
    return Shared({path: found[path].assignment for path in weights}, gradient), done


class _Found(NamedTuple):
    """What a tensor becomes: its new weights, who shares with whom, and what is lost."""

    weights: Tensor
    assignment: Assignment
    distortion: float

    def sharing(self, single: str | None) -> Sharing:
        own = self.assignment
        return Sharing(
            own.size,
            own.bits,
            self.weights.numel(),
            self.distortion,
            own.codebooks if own.book is None else 0,
            own.length,
            single,
        )


def _of(weight: Tensor, book: Codebook, assignment: Assignment) -> _Found:
    weights = book.values[assignment.indices.long()].reshape(weight.shape)
    return _Found(weights, assignment, book.distortion)


def _vectors(path: str, weight: Tensor, vectors: Vectors, importance: Tensor | None) -> _Found:
    book = cluster_vectors(weight, vectors, name=path, importance=importance)
    size, length = book.values.shape
    kept = Assignment(size, book.indices, book.zero, length=length, shape=weight.shape)
    return _of(weight, book, kept)


def _by_channels(
    path: str, weight: Tensor, size: int, channels: int, importance: Tensor | None
) -> _Found:
    """Codebooks for some channels each. Where the tensor has zeros, zero is one of the values of
    all of them, so that it has the same place everywhere."""
    zero = bool((weight == 0).any())
    parts, lost, energy = [], 0.0, 0.0
    for begin in range(0, len(weight), channels):
        part = weight.detach()[begin : begin + channels]
        mass = None if importance is None else importance[begin : begin + channels]
        room = size - 1 if zero and bool((part != 0).all()) else size
        book = cluster(part, room, name=path, importance=mass)
        parts.append(book.values[book.indices.long()])
        squares = float(part.double().square().sum())
        lost, energy = lost + book.distortion * squares, energy + squares
    weights = torch.cat(parts)
    indices, most = numbered_by_group(weights, channels, zero)
    kept = Assignment(most, indices.to(weight.device), 0 if zero else None, channels)
    return _Found(weights, kept, lost / energy if energy else 0.0)


def _across(
    weights: Mapping[str, Tensor], size: int, importance: Mapping[str, Tensor]
) -> dict[str, _Found]:
    """One codebook for all tensors of a dtype. A tensor without importance weighs as the others do
    on average."""
    found = {}
    for dtype in {weight.dtype: None for weight in weights.values()}:
        paths = [path for path, weight in weights.items() if weight.dtype == dtype]
        numbers = {path: finite(weights[path], path) for path in paths}
        masses = {p: importance[p].detach().cpu().double() for p in paths if p in importance}
        mean = torch.cat([m.flatten() for m in masses.values()]).mean() if masses else 1.0
        mass = [
            masses[p].flatten() if p in masses else torch.full((numbers[p].size,), float(mean))
            for p in paths
        ]
        every = torch.cat([weights[path].detach().cpu().flatten() for path in paths])
        book = cluster(
            every, size, name="the network", importance=torch.cat(mass) if masses else None
        )
        shares = book.indices.split([numbers[path].size for path in paths])
        for path, flat in zip(paths, shares, strict=True):
            weight = weights[path]
            indices = flat.reshape(weight.shape).to(weight.device)
            name = f"network.{dtype}".replace("torch.", "")
            kept = Assignment(len(book.values), indices, book.zero, book=name)
            loss = distortion(numbers[path], book.values.double().numpy(), flat.numpy())
            own = Codebook(book.values.to(weight.device), indices, loss, book.zero)
            found[path] = _of(weight, own, kept)
    return found


def _size(bits: int | None, values: int | None) -> int:
    """The values in a codebook. Raises `UsageError`."""
    if (bits is None) == (values is None):
        raise UsageError("sharing takes either bits or values: give exactly one")
    if bits is not None and not 1 <= bits <= 8:
        raise UsageError(f"an index has 1 to 8 bits, not {bits}")
    size = 2**bits if bits is not None else values or 0
    if not 2 <= size <= 256:
        raise UsageError(f"a codebook has 2 to 256 values, not {values}")
    return size


def _importances(importance: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The importances by path, looked through. Raises `UsageError` for one of no parameter."""
    parameters = dict(module.named_parameters())
    for path in importance:
        if path not in parameters:
            raise UsageError(
                f"importance: the network has no parameter {path!r}{near(path, list(parameters))}"
            )
        checked_importance(importance[path], parameters[path], path)
    return dict(importance)


def _unfit(weights: Mapping[str, Tensor], vectors: Vectors) -> dict[str, str | None]:
    """Why each tensor that was to share vectors can't; `None` where it can."""
    wanted = fitting(weights, vectors.layers, "vectors.layers")
    return {path: unfit(weights[path], vectors) for path in weights if path in wanted}


def fitting(names: Iterable[str], patterns: Iterable[str], setting: str) -> set[str]:
    """The weights, or those of the layers, that patterns name. Raises `UsageError` for a pattern
    that names none."""
    known, found = list(names), set()
    for pattern in patterns:
        hits = {name for name in known if _fits(name, pattern)}
        if not hits:
            raise UsageError(
                f"{setting}: {pattern!r} fits no weight of the network; it has " + ", ".join(known)
            )
        found |= hits
    return found


def _has_weights(parameter: Tensor) -> bool:
    return parameter.dim() > 1 and parameter.numel() > 0 and parameter.is_floating_point()


def _fits(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name.rpartition(".")[0], pattern)
