"""The edit that sharing leaves: which weights of which tensors are one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attar.errors import CheckpointError
from attar.share.codebook import Codebook, bits_of, pack, unpack
from attar.share.numbering import numbered, numbered_by_group
from attar.student import Edit

MOST = 1 << 16
"""The largest codebook that a record may have."""

Gradient = Literal["mean", "sum"]


@dataclass(frozen=True)
class Assignment:
    """Who shares with whom in one tensor.

    size: the number of values in a codebook. indices: each weight's place in its codebook, the
    tensor's shape; of vectors, each run's, (runs,). zero: the place, in every codebook of the
    tensor, of the value that stays exactly zero, or `None`.

    channels: how many consecutive channels (indices of the first dimension) have a codebook of
    their own; `None`: the tensor has one. book: the name of a codebook that other tensors take
    their values from too; `None`: no other does. length: how many weights, contiguous in the
    flattened tensor, one place stands for; shape: the tensor's, where `length` is above 1.
    """

    size: int
    indices: Tensor
    zero: int | None
    channels: int | None = None
    book: str | None = None
    length: int = 1
    shape: torch.Size | None = None

    @classmethod
    def of(cls, codebook: Codebook) -> Assignment:
        """The assignment of a fresh codebook of single weights; a value of zero stays zero."""
        places = (codebook.values == 0).nonzero().flatten().tolist()
        return cls(len(codebook.values), codebook.indices, places[0] if places else None)

    @property
    def bits(self) -> int:
        """What one index takes."""
        return bits_of(self.size)

    @property
    def codebooks(self) -> int:
        """How many codebooks the tensor has."""
        return -(-self.indices.shape[0] // self.channels) if self.channels else 1

    @property
    def tensor_shape(self) -> torch.Size:
        """The shape of the tensor itself."""
        return self.indices.shape if self.shape is None else self.shape

    def clusters(self) -> Tensor:
        """Which cluster each run belongs to, int32 (runs,): the codebooks' places in a row."""
        places = self.indices.to(torch.int32)
        if self.channels:
            books = torch.arange(len(places), dtype=torch.int32, device=places.device)
            offsets = books // self.channels * self.size
            places = places + offsets.reshape(-1, *[1] * (places.dim() - 1))
        return places.flatten()

    def to_json(self) -> dict[str, Any]:
        """All but the indices; what is as in most assignments is left out."""
        record = {"size": self.size, "shape": list(self.tensor_shape), "zero": self.zero}
        further = {"channels": self.channels, "book": self.book}
        record |= {key: value for key, value in further.items() if value is not None}
        return record | ({"length": self.length} if self.length > 1 else {})


class Shared(Edit):
    """Tensors whose weights take a few values: equal weights stay equal, zeros stay zero.

    Values are a tensor's own, those of a few of its channels, or of several tensors; they are
    single weights, or vectors that runs of weights take whole.

    Only the assignment is the edit's; the values live in the network's own weights, where they are
    trained. gradient: what the gradient of every weight becomes, `mean` or `sum` over its cluster.
    The mean projects the step onto the networks that share. Deep Compression (Han et al., ICLR
    2016) sums: the same direction times the cluster's size, the gradient by the shared value
    itself, which makes one learning rate mean thousands of them. An optimizer that scales each
    weight's step (Adam) takes the two alike.
    """

    kind: ClassVar[str] = "shared"

    def __init__(self, assignments: dict[str, Assignment], gradient: Gradient = "mean") -> None:
        self.assignments = assignments
        """By parameter path."""
        self.gradient = gradient
        self._together = _together(assignments)
        self._placed: dict[tuple[str, torch.device], Tensor] = {}
        self._counted: dict[tuple[str, torch.device], Tensor] = {}

    def to_json(self) -> dict[str, Any]:
        tensors = {path: assignment.to_json() for path, assignment in self.assignments.items()}
        return {"tensors": tensors} | ({"gradient": "sum"} if self.gradient == "sum" else {})

    def tensors(self) -> dict[str, Tensor]:
        return {path: pack(a.indices, a.bits) for path, a in self.assignments.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Shared:
        assignments = {
            path: _assignment(path, entry, tensors.get(path))
            for path, entry in record["tensors"].items()
        }
        return cls(assignments, "sum" if record.get("gradient") == "sum" else "mean")

    def before_step(self, module: nn.Module) -> None:
        """Every weight's gradient becomes the mean, or the sum, over its cluster."""
        found = {path: module.get_parameter(path).grad for path in self.assignments}
        self._tie(
            {path: gradient for path, gradient in found.items() if gradient is not None},
            self.gradient,
        )

    @torch.no_grad()
    def after_step(self, module: nn.Module) -> None:
        """Every weight becomes its cluster's mean."""
        self._tie({path: module.get_parameter(path) for path in self.assignments}, "mean")

    def check(self, module: nn.Module) -> list[str]:
        return [sentence for paths in self._together for sentence in self._broken(module, paths)]

    def codebook(self, module: nn.Module, path: str) -> Tensor:
        """The values of one shared tensor as they are now, of its dtype: (size,); of vectors,
        (size, length); with codebooks by channels, (codebooks, size), 0 where one has fewer."""
        assignment = self.assignments[path]
        paths = next(paths for paths in self._together if path in paths)
        values = self._members({p: module.get_parameter(p).detach() for p in paths})
        values = values.to(module.get_parameter(path).device)
        if assignment.channels:
            return values.reshape(assignment.codebooks, assignment.size)
        return values if assignment.length > 1 else values[:, 0]

    def settled(self, module: nn.Module) -> Shared:
        """This edit with the values of each codebook rising and all different: clusters whose
        values became equal are one. Vectors rise by the first coordinate that differs; with
        codebooks by channels, zero comes before the others. The network stays as it is."""
        settled: dict[str, Assignment] = {}
        for paths in self._together:
            first = self.assignments[paths[0]]
            weights = [module.get_parameter(path).detach() for path in paths]
            ranks, size = _ranked(weights, first.length, first.channels, first.zero is not None)
            zero = None if first.zero is None else _place_of_zero(weights, ranks, first)
            for path, places in zip(paths, ranks, strict=True):
                settled[path] = replace(
                    self.assignments[path], size=size, indices=places, zero=zero
                )
        return Shared({path: settled[path] for path in self.assignments}, self.gradient)

    @classmethod
    def implied(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The packed indices of a settled edit, as equal weights tell them. Raises
        `CheckpointError` for weights that lack a shared tensor."""
        entries = record["tensors"]
        missing = sorted(set(entries) - set(weights))
        if missing:
            raise CheckpointError(f"the student's shared tensor {missing[0]} is missing")
        packed: dict[str, Tensor] = {}
        for paths in _by_book({path: entry.get("book") for path, entry in entries.items()}):
            entry = entries[paths[0]]
            ranks, size = _ranked(
                [weights[path] for path in paths],
                entry.get("length", 1),
                entry.get("channels"),
                entry["zero"] is not None,
            )
            if size == entry["size"]:
                bits = bits_of(size)
                packed |= {p: pack(r, bits) for p, r in zip(paths, ranks, strict=True)}
        return packed

    @classmethod
    def shortened(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Only the tensors' names, where each has one codebook of all the values that it takes."""
        entries = record["tensors"]
        if any(entry != _entry(weights[path]) for path, entry in entries.items()):
            return record
        return {**record, "tensors": list(entries)}

    @classmethod
    def lengthened(cls, record: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
        paths = record["tensors"]
        if isinstance(paths, dict):
            return record
        if missing := [path for path in paths if path not in weights]:
            raise CheckpointError(f"the student's shared tensor {missing[0]} is missing")
        return {**record, "tensors": {path: _entry(weights[path]) for path in paths}}

    def runs(self) -> dict[str, int]:
        """The length of the vectors, by path, of tensors that share vectors."""
        return {path: a.length for path, a in self.assignments.items() if a.length > 1}

    def per_tensor_weights(self) -> set[str]:
        """The shared tensors: quantized with one scale for the whole tensor, equal weights stay
        equal and the number of values holds; with a scale a channel, it would grow."""
        return set(self.assignments)

    def summary(self) -> str:
        every = list(self.assignments.values())
        if not every:
            return "no tensor shared"
        sizes = [a.size for a in every]
        span = str(max(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        said = [f"{len(sizes)} tensors of {span} values"]
        common = sum(a.book is not None for a in every)
        own = Counter(a.channels for a in every if a.channels)
        vectors = Counter(a.length for a in every if a.length > 1)
        said += [f"{common} of them from common codebooks"] if common else []
        said += [f"{n} with codebooks for every {c} channels" for c, n in sorted(own.items())]
        said += [f"{n} in vectors of {length}" for length, n in sorted(vectors.items())]
        return ", ".join(said)

    def _tie(self, tensors: Mapping[str, Tensor], how: Gradient) -> None:
        """Each number becomes the mean, or the sum, over its cluster in all of these tensors, in
        place; what stays zero becomes zero."""
        for paths in self._together:
            found = {path: tensors[path] for path in paths if path in tensors}
            if not found:
                continue
            values = self._sums(found)
            if how == "mean":
                values /= self._counts(paths, values.device)
            first = self.assignments[paths[0]]
            if first.zero is not None:
                values[first.zero :: first.size] = 0
            for path, tensor in found.items():
                own = values.to(tensor.device, tensor.dtype)
                tensor.copy_(own.index_select(0, self._clusters(path, own)).view(tensor.shape))

    def _sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Each cluster's sum in float64, where equal float32 numbers add up without rounding:
        (clusters, length), on the first tensor's device."""
        sums = self._table(tensors, torch.float64)
        single = sums.shape[1] == 1
        for path, tensor in tensors.items():
            rows = tensor.detach().reshape(-1, sums.shape[1]).double()
            part = torch.zeros_like(sums, device=tensor.device)
            # the same, several times as fast without the dimension of one
            to, each = (part[:, 0], rows[:, 0]) if single else (part, rows)
            to.index_add_(0, self._clusters(path, rows), each)
            sums += part.to(sums.device)
        return sums

    def _members(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Each cluster's value as one of its members has it, 0 for a cluster of none: (clusters,
        length), of the first tensor's dtype and on its device. No rounding, whatever the dtype."""
        values = self._table(weights, next(iter(weights.values())).dtype)
        for path, weight in weights.items():
            rows = weight.reshape(-1, values.shape[1]).to(values)
            values[self._clusters(path, values).long()] = rows
        return values

    def _table(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        path, tensor = next(iter(tensors.items()))
        assignment = self.assignments[path]
        shape = (assignment.size * assignment.codebooks, assignment.length)
        return torch.zeros(shape, dtype=dtype, device=tensor.device)

    def _broken(self, module: nn.Module, paths: Sequence[str]) -> list[str]:
        weights: dict[str, Tensor] = {}
        broken = []
        for path in paths:
            shape = self.assignments[path].tensor_shape
            try:
                weight = module.get_parameter(path).detach()
            except AttributeError:
                broken.append(f"{path} is shared but no longer in the network")
                continue
            if weight.shape == shape:
                weights[path] = weight
            else:
                was, now = tuple(shape), tuple(weight.shape)
                broken.append(f"{path} was shared as {was} and is {now} now")
        if not weights:
            return broken
        values = self._members(weights)
        return broken + [
            sentence
            for path, weight in weights.items()
            for sentence in self._left(path, weight, values)
        ]

    def _left(self, path: str, weight: Tensor, values: Tensor) -> list[str]:
        """Whether weights left their shared values, or what is to stay zero didn't."""
        clusters = self._clusters(path, weight)
        assignment = self.assignments[path]
        rows = weight.reshape(-1, assignment.length)
        spread = int((rows != values.to(rows).index_select(0, clusters)).sum())
        if spread:
            return [f"{path} has {spread} weights that left their shared value"]
        if assignment.zero is not None:
            zeros = rows[clusters % assignment.size == assignment.zero]
            if zeros.any():
                return [f"{path}'s zeros are {float(zeros[zeros != 0][0]):.3g} now"]
        return []

    def _clusters(self, path: str, where: Tensor) -> Tensor:
        """Which cluster each run belongs to, on a tensor's device; kept from step to step."""
        key = (path, where.device)
        if key not in self._placed:
            self._placed[key] = self.assignments[path].clusters().to(where.device)
        return self._placed[key]

    def _counts(self, paths: Sequence[str], device: torch.device) -> Tensor:
        """How many runs each cluster has, float64 (clusters, 1), at least 1; kept likewise."""
        key = (paths[0], device)
        if key not in self._counted:
            first = self.assignments[paths[0]]
            counts = sum(
                self.assignments[path].clusters().bincount(minlength=first.size * first.codebooks)
                for path in paths
            )
            assert isinstance(counts, Tensor)
            self._counted[key] = counts.clamp(min=1).to(device, torch.float64)[:, None]
        return self._counted[key]


def _by_book(books: Mapping[str, str | None]) -> list[tuple[str, ...]]:
    """The paths that share a codebook, together."""
    together: dict[tuple[bool, str], list[str]] = {}
    for path, book in books.items():
        key = (False, path) if book is None else (True, book)
        together.setdefault(key, []).append(path)
    return [tuple(paths) for paths in together.values()]


def _together(assignments: Mapping[str, Assignment]) -> list[tuple[str, ...]]:
    together = _by_book({path: a.book for path, a in assignments.items()})
    for paths in together:
        kinds = {(a.size, a.zero, a.length, a.channels) for a in map(assignments.get, paths) if a}
        if len(kinds) > 1 or (len(paths) > 1 and assignments[paths[0]].channels):
            raise ValueError(f"{', '.join(paths)} can't share a codebook: they differ in its form")
    return together


def _ranked(
    weights: Sequence[Tensor], length: int, channels: int | None, zero: bool
) -> tuple[list[Tensor], int]:
    """The place of each run among the different ones, as `Shared.settled` orders them, and how
    many there are."""
    if channels:
        places, size = numbered_by_group(weights[0], channels, zero)
        return [places], size
    flat, size = numbered(weights, length)
    if length > 1:
        return flat, size
    return [places.reshape(w.shape) for places, w in zip(flat, weights, strict=True)], size


def _place_of_zero(
    weights: Sequence[Tensor], ranks: Sequence[Tensor], assignment: Assignment
) -> int | None:
    """The rank of zero; `None` where no run is."""
    for weight, places in zip(weights, ranks, strict=True):
        zeros = (weight.reshape(-1, assignment.length) == 0).all(1).cpu()
        if zeros.any():
            return 0 if assignment.channels else int(places.flatten()[zeros][0])
    return None


def _entry(weight: Tensor) -> dict[str, Any]:
    """The record of a tensor that has one codebook, of all the values that it takes."""
    values = weight.unique()
    zero = (values == 0).nonzero().flatten().tolist()
    entry = {"size": len(values), "shape": list(weight.shape)}
    return entry | {"zero": zero[0] if zero else None}


def _assignment(path: str, entry: dict[str, Any], packed: Tensor | None) -> Assignment:
    size, shape = int(entry["size"]), torch.Size(entry["shape"])
    length, zero, channels = int(entry.get("length", 1)), entry["zero"], entry.get("channels")
    damaged = CheckpointError(
        f"the student's shared tensor {path} is damaged: its indices don't fit"
    )
    places_fit = 1 <= size <= MOST and (zero is None or 0 <= zero < size)
    if not places_fit or length < 1 or shape.numel() % length or (channels or 1) < 1:
        raise damaged
    bits, runs = bits_of(size), shape.numel() // length
    if packed is None or packed.numel() != -(-runs * bits // 8):
        raise damaged
    indices = unpack(packed, bits, runs)
    if int(indices.max()) >= size:
        raise damaged
    if length == 1:
        return Assignment(size, indices.reshape(shape), zero, channels, entry.get("book"))
    return Assignment(size, indices, zero, None, entry.get("book"), length, shape)
