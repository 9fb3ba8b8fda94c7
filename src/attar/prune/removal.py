"""Removing channels for real, with everything tied to them, and proving that it was right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from attar.errors import AttarError, CheckpointError
from attar.prune.exporting import where_failed
from attar.prune.groups import ChannelGraph
from attar.prune.masking import masked, masked_answers, outputs
from attar.student.edits import Edit, submodule
from attar.training.evaluation import evaluating

REMOVED = "channels were removed from"


class RemovalFailed(AttarError):
    """A removal after which the network doesn't answer as it does with those channels masked."""


@dataclass(frozen=True)
class ChannelsRemoved(Edit):
    """Channels that are gone, with everything tied to them.

    removed: by parameter or buffer, by dimension: the indices taken out, sorted.
    attributes: by module, by integer attribute, or item of a tuple (`shape[0]`): how many units it
        fell by (a grouped convolution's `groups`, a padded shortcut's `before` and `after`).
    """

    kind: ClassVar[str] = "channels-removed"

    removed: Mapping[str, Mapping[int, list[int]]]
    attributes: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        return {
            "removed": {
                path: {str(d): list(indices) for d, indices in dims.items()}
                for path, dims in self.removed.items()
            },
            "attributes": {path: dict(counts) for path, counts in self.attributes.items()},
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> ChannelsRemoved:
        try:
            removed = {
                str(path): {int(d): [int(i) for i in indices] for d, indices in dims.items()}
                for path, dims in record["removed"].items()
            }
            attributes = {
                str(path): {str(name): int(n) for name, n in counts.items()}
                for path, counts in record["attributes"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the record of removed channels is damaged: {error}") from None
        return cls(removed, attributes)

    def replay(self, module: nn.Module) -> None:
        """Takes the channels out of a network that still has them, in place. Raises
        `CheckpointError` for a network they don't fit."""
        for path, counts in self.attributes.items():
            self._lower(submodule(module, path, REMOVED), path, counts)
        touched = set()
        done: dict[int, nn.Parameter | Tensor] = {}
        for path, dims in self.removed.items():
            place, _, name = path.rpartition(".")
            owner = submodule(module, place, REMOVED)
            tensor = getattr(owner, name, None)
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"channels were removed from {path}, which the network lacks")
            done[id(tensor)] = _without(tensor, path, dims)
        for owner in module.modules():
            for store in (owner._parameters, owner._buffers):
                for name, tensor in store.items():
                    if tensor is not None and id(tensor) in done:
                        store[name] = done[id(tensor)]  # type: ignore[assignment]
                        touched.add(owner)
        for owner in touched:
            _refresh(owner)

    def sliced(self, path: str, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the shape that `path` had."""
        return _without(tensor, path, self.removed[path])

    def summary(self) -> str:
        layers = sum(1 for path in self.removed if path.endswith(".weight"))
        return f"channels removed from {layers} weights"

    @staticmethod
    def _lower(owner: nn.Module, path: str, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            attribute, _, place = name.rstrip("]").partition("[")
            held: Any = getattr(owner, attribute, None)
            items = list(held) if place and isinstance(held, (tuple, list)) else [held]
            i = int(place or 0)
            value = items[i] if i < len(items) else None
            if not isinstance(value, int) or value < count:
                raise CheckpointError(f"{path}.{name} is {value}, which can't fall by {count}")
            items[i] = value - count
            setattr(owner, attribute, type(held)(items) if place else items[0])


def removal_of(graph: ChannelGraph, atoms: Iterable[int]) -> ChannelsRemoved:
    """The edit that removes these atoms from everything they occur in."""
    gone = np.fromiter(atoms, dtype=np.int64)
    removed: dict[str, dict[int, list[int]]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for place in graph.places:
        indices = np.flatnonzero(np.isin(place.atoms, gone))
        if not indices.size:
            continue
        if isinstance(place.at, str):
            attributes.setdefault(place.path, {})[place.at] = len(indices)
        else:
            removed.setdefault(place.path, {})[place.at] = indices.tolist()
    return ChannelsRemoved(removed, attributes)


def remove_verified(
    module: nn.Module,
    removal: ChannelsRemoved,
    example: tuple[Any, ...],
    tolerance: float = 1e-4,
    graph: ChannelGraph | None = None,
) -> nn.Module:
    """A copy of the network without those channels, proven to answer as the masked network does
    (see `attar.prune.masking`).

    Both must give the same answers on `example` within `tolerance` of the largest. graph: needed
    where the removal goes through operators that compute over channels, such as layer norms.
    Raises `RemovalFailed`, naming the operator it hangs on.
    """
    removed = copy.deepcopy(module)
    mode = evaluating if graph is None else graph.mode
    try:
        removal.replay(removed)
        with mode(removed):
            answers = list(outputs(removed(*example)))
    except CheckpointError:
        raise
    except Exception as error:  # whatever the person's forward raises on the smaller network
        raise RemovalFailed(f"the smaller network fails at {where_failed(error)}") from None
    zeroed = masked(module, removal)
    difference = _difference(answers, masked_answers(zeroed, removal, example, graph))
    if difference > tolerance:
        # rounding in deep networks can be as large: double precision tells it from a mistake
        precise = copy.deepcopy(removed).double()
        inputs = _each(example, lambda x: x.double() if x.is_floating_point() else x)
        with mode(precise):
            answers = list(outputs(precise(*inputs)))
        wanted = masked_answers(zeroed.double(), removal, inputs, graph)
        difference = _difference(answers, wanted)
    if not difference <= tolerance:
        raise RemovalFailed(
            "the smaller network doesn't answer as the masked one does "
            f"(they differ by {difference:.2g} of the largest answer)"
        )
    return removed


def answers_alike(
    module: nn.Module, other: nn.Module, example: tuple[Any, ...], tolerance: float = 1e-4
) -> bool:
    """Whether two networks give the same answers, within `tolerance` of the largest."""
    with evaluating(module), evaluating(other):
        pair = [list(outputs(m(*example))) for m in (module, other)]
    return _difference(*pair) <= tolerance


def guilty(
    families: list[np.ndarray], fails: Callable[[np.ndarray], str | None]
) -> list[tuple[np.ndarray, str]]:
    """The families that a failure hangs on, with each one's message, by halving.

    fails: the message when these atoms' removal fails, `None` when it succeeds.
    """
    if not families:
        return []
    message = fails(np.concatenate(families))
    if message is None:
        return []
    if len(families) == 1:
        return [(families[0], message)]
    half = len(families) // 2
    return guilty(families[:half], fails) + guilty(families[half:], fails)


def _without(tensor: Tensor, path: str, dims: Mapping[int, list[int]]) -> Tensor:
    kept = tensor.detach()
    for d, indices in dims.items():
        if d >= kept.dim() or max(indices) >= kept.shape[d]:
            raise CheckpointError(
                f"channel {max(indices)} was removed from dimension {d} of {path}, which has shape "
                f"{tuple(tensor.shape)}: the network is not the one that was pruned"
            )
        stays = torch.ones(kept.shape[d], dtype=torch.bool, device=kept.device)
        stays[indices] = False
        kept = kept.index_select(d, stays.nonzero().squeeze(1))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(kept, requires_grad=tensor.requires_grad)
    return kept


def _refresh(owner: nn.Module) -> None:
    """Makes a layer's counts say what its tensors are."""
    for kind, counts in _COUNTS.items():
        if isinstance(owner, kind):
            for name, count in counts(owner).items():
                setattr(owner, name, count)
            return


def _conv(m: Any) -> dict[str, Any]:
    return {"out_channels": m.weight.shape[0], "in_channels": m.weight.shape[1] * m.groups}


def _conv_transpose(m: Any) -> dict[str, Any]:
    return {"in_channels": m.weight.shape[0], "out_channels": m.weight.shape[1] * m.groups}


def _features(m: Any) -> dict[str, Any]:
    tensor = next(t for t in (m.weight, m.running_mean) if t is not None)
    return {"num_features": tensor.shape[0]}


def _attention(m: Any) -> dict[str, Any]:
    if m.in_proj_weight is None:  # other widths of keys and values: its heads stay
        return {"embed_dim": m.q_proj_weight.shape[1]}
    rows, width = m.in_proj_weight.shape
    return {"embed_dim": width, "num_heads": rows // 3 // m.head_dim}


_COUNTS: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    _ConvTransposeNd: _conv_transpose,
    _ConvNd: _conv,
    nn.Linear: lambda m: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]},
    _NormBase: _features,
    nn.LayerNorm: lambda m: {"normalized_shape": tuple(m.weight.shape)},
    nn.RMSNorm: lambda m: {"normalized_shape": tuple(m.weight.shape)},
    nn.GroupNorm: lambda m: {"num_channels": m.weight.shape[0]},
    nn.PReLU: lambda m: {"num_parameters": m.weight.shape[0]},
    nn.MultiheadAttention: _attention,
    nn.Embedding: lambda m: {"embedding_dim": m.weight.shape[1]},
}


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference relative to the largest answer; infinite for other shapes or NaN."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            scale = float(y.abs().max()) or 1.0
            difference = float((x - y).abs().max()) / scale
            worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_each(item, function) for item in value)
    return value
