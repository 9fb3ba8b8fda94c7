"""What a network costs as a sum of what its layers cost, by what is removed of each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from attar.planning.layers import Shape
from attar.planning.solver import Cost
from attar.prune.blocks import within
from attar.prune.groups import ChannelGraph, Place

Options = Sequence[np.ndarray]
"""Of one part of a network: the atoms that each option removes."""
Prices = Callable[[Iterable[Any]], Mapping[Any, float]]
"""What pieces of a network cost, all asked for at once."""


@dataclass(frozen=True)
class Piece:
    """A layer, or a tensor, whose cost depends on how many channels are left at a few places.

    path: of the layer or tensor. at: what to ask a price for, by the channels left at each place.
    """

    path: str
    places: tuple[Place, ...]
    at: Callable[[tuple[int, ...]], Any]


def layers(graph: ChannelGraph, shapes: Mapping[str, Shape]) -> list[Piece]:
    """A piece for each layer, priced by its `Shape`."""
    return [_layer(graph, path, shape) for path, shape in shapes.items()]


def _layer(graph: ChannelGraph, path: str, shape: Shape) -> Piece:
    weight = f"{path}.weight" if path else "weight"
    places = tuple(
        p
        for p in graph.places
        if (p.path == weight and p.at in (0, 1)) or (p.path == path and p.at == "groups")
    )

    def at(left: tuple[int, ...]) -> Shape:
        counts = {p.at: n for p, n in zip(places, left, strict=True)}
        groups = counts.get("groups", shape.groups)
        each = counts.get(1, shape.inputs // shape.groups)
        outputs = counts.get(0, shape.outputs)
        return replace(shape, inputs=each * groups, outputs=outputs, groups=groups)

    return Piece(path, places, at)


def tensors(graph: ChannelGraph, module: nn.Module) -> list[Piece]:
    """A piece for each parameter, priced by its number of elements."""
    sizes = {path: tuple(p.shape) for path, p in module.named_parameters()}
    return [_tensor(graph, path, size) for path, size in sizes.items()]


def _tensor(graph: ChannelGraph, path: str, size: tuple[int, ...]) -> Piece:
    places = tuple(p for p in graph.places if p.path == path and isinstance(p.at, int))
    counted = {int(p.at) for p in places}
    rest = int(np.prod([n for d, n in enumerate(size) if d not in counted], dtype=np.int64))
    return Piece(path, places, lambda left: rest * int(np.prod(left, dtype=np.int64)))


def costs(
    pieces: Sequence[Piece],
    parts: Sequence[Options],
    prices: Prices,
    switches: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[Cost], float]:
    """The solver's costs, and what is paid whatever is chosen.

    switches: by block that can be taken out, the solver's part whose second option does that; what
    is within it costs nothing then.

    A piece that hangs on one or two parts is priced at every pair of their options. One that hangs
    on more (a layer that reads a concatenation) is priced at the pairs with the part that it makes,
    as if what each other part saves added up.
    """
    asked = [(_switch(piece, switches), a) for piece in pieces for a in _asked(piece, parts)]
    found = prices(dict.fromkeys(key for _, a in asked for key in a.keys.reshape(-1)))
    terms, fixed = [], 0.0
    for switch, a in asked:
        table = a.times * np.vectorize(found.__getitem__, otypes=[float])(a.keys)
        if a.parts:
            b = a.parts[1] if len(a.parts) > 1 else None
            terms.append(Cost(a.parts[0], b, table, switch))
        elif switch is not None:
            terms.append(Cost(switch, None, np.array([float(table), 0.0])))
        else:
            fixed += float(table)
    return terms, fixed


def each_cost(
    pieces: Sequence[Piece], gone: np.ndarray, out: Iterable[str], prices: Prices
) -> dict[str, tuple[float, float]]:
    """What each piece costs, by path, whole and without the atoms in `gone` and the blocks in
    `out`; what then costs nothing included."""
    out = list(out)
    before = {piece.path: piece.at(_counts(piece, _whole(piece))) for piece in pieces}
    after = {
        piece.path: piece.at(_counts(piece, _whole(piece) - _removed(piece, gone)))
        for piece in pieces
        if not within(piece.path, out)
    }
    found = prices(dict.fromkeys([*before.values(), *after.values()]))
    return {
        path: (float(found[key]), float(found[after[path]]) if path in after else 0.0)
        for path, key in before.items()
    }


def _switch(piece: Piece, switches: Mapping[str, int]) -> int | None:
    """The part that takes a piece out."""
    return next((n for path, n in switches.items() if within(piece.path, [path])), None)


@dataclass(frozen=True)
class _Asked:
    """A table of things to price, by the options of the parts that it hangs on; counted `times`."""

    parts: tuple[int, ...]
    keys: np.ndarray
    times: float = 1.0


def _asked(piece: Piece, parts: Sequence[Options]) -> list[_Asked]:
    removed = [[_removed(piece, gone) for gone in options] for options in parts]
    owners = [n for n, counts in enumerate(removed) if np.any(counts)]

    def table(*of: int) -> np.ndarray:
        keys = np.empty([len(parts[n]) for n in of], dtype=object)
        for chosen in np.ndindex(keys.shape):
            gone = sum((removed[n][i] for n, i in zip(of, chosen, strict=True)), _whole(piece) * 0)
            keys[chosen] = piece.at(_counts(piece, _whole(piece) - gone))
        return keys

    if len(owners) < 2:
        return [_Asked(tuple(owners), table(*owners))]
    made = _maker(piece, owners, removed)
    pairs = [_Asked((n, made), table(n, made)) for n in owners if n != made]
    if len(owners) == 2:
        return pairs
    return [*pairs, _Asked((made,), table(made), float(2 - len(owners)))]


def _maker(piece: Piece, owners: list[int], removed: list[list[np.ndarray]]) -> int:
    """The part that a piece makes channels of, else the first."""
    made = [i for i, place in enumerate(piece.places) if place.role == "out"]
    for n in owners:
        if any(counts[i] for counts in removed[n] for i in made):
            return n
    return owners[0]


def _counts(piece: Piece, left: np.ndarray) -> tuple[int, ...]:
    """How many channels are left at each place, at least one."""
    return tuple(int(n) for n in np.maximum(left, 1))


def _whole(piece: Piece) -> np.ndarray:
    return np.array([len(place.atoms) for place in piece.places], dtype=np.int64)


def _removed(piece: Piece, gone: np.ndarray) -> np.ndarray:
    """How many channels go at each of a piece's places."""
    return np.array([np.isin(p.atoms, gone).sum() for p in piece.places], dtype=np.int64)
