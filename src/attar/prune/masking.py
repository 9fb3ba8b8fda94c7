"""The masked network: what a network without some channels must answer like.

Every weight, bias and norm parameter that a removal takes out is zero: nothing is made there and
nothing read. Where an operator computes over channels (a layer norm, a mean over them), the masked
network computes over those that stay: a channel that is gone has no share in a mean.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from attar.prune.operators import name_of
from attar.training.evaluation import evaluating

if TYPE_CHECKING:
    from attar.prune.groups import ChannelGraph
    from attar.prune.removal import ChannelsRemoved


def masked(module: nn.Module, removal: ChannelsRemoved) -> nn.Module:
    """A copy of the network with zeros at all that the removal takes out."""
    zeroed = copy.deepcopy(module)
    tensors: dict[str, Tensor] = dict(zeroed.named_parameters(remove_duplicate=False))
    tensors.update(zeroed.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for path, dims in removal.removed.items():
            for d, indices in dims.items():
                tensors[path].index_fill_(d, torch.tensor(indices, device=tensors[path].device), 0)
    return zeroed


def masked_answers(
    zeroed: nn.Module,
    removal: ChannelsRemoved,
    example: tuple[Any, ...],
    graph: ChannelGraph | None,
) -> list[Tensor]:
    """What a masked network answers. graph: for operators that compute over removed channels."""
    staying = _staying(graph, removal) if graph is not None else {}
    with evaluating(zeroed) if graph is None else graph.mode(zeroed):
        if graph is None or not staying:
            return list(outputs(zeroed(*example)))
        rows = [list(_Staying(zeroed, graph, staying).answers(row)) for row in _rows(example)]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def outputs(value: Any) -> Iterator[Tensor]:
    """The tensors of a network's answer, floating, one after the other."""
    if isinstance(value, Tensor):
        yield value.detach().to(torch.promote_types(value.dtype, torch.float32))
    elif isinstance(value, Mapping):
        yield from outputs(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from outputs(item)


def _staying(graph: ChannelGraph, removal: ChannelsRemoved) -> dict[str, tuple[int, Tensor]]:
    """Of each operator over channels some of which go: the dimension, and those that stay."""
    gone = [
        place.atoms[removal.removed[place.path][place.at]]
        for place in graph.places
        if isinstance(place.at, int) and place.at in removal.removed.get(place.path, {})
    ]
    atoms = np.unique(np.concatenate(gone)) if gone else np.empty(0, np.int64)
    return {
        joint.node: (joint.dim, torch.from_numpy(np.flatnonzero(~np.isin(joint.atoms, atoms))))
        for joint in graph.joint
        if np.isin(joint.atoms, atoms).any()
    }


def _rows(example: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """An example as several of batch one, which is what graphs are exported for."""
    count = max(len(x) for x in example if isinstance(x, Tensor) and x.dim())
    for i in range(count):
        yield tuple(x[i : i + 1] if isinstance(x, Tensor) and x.dim() else x for x in example)


class _Staying(Interpreter):
    """Runs an exported graph with a network's weights, over the channels that stay."""

    def __init__(
        self, module: nn.Module, graph: ChannelGraph, staying: dict[str, tuple[int, Tensor]]
    ) -> None:
        super().__init__(graph.program.graph_module)
        self._program, self._staying = graph.program, staying
        self._tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        self._tensors.update(module.named_buffers(remove_duplicate=False))

    def answers(self, example: tuple[Any, ...]) -> Iterator[Tensor]:
        given = iter(tree_leaves((example, {})))
        inputs = [
            next(given) if spec.kind is InputKind.USER_INPUT else self._stored(spec.target)
            for spec in self._program.graph_signature.input_specs
        ]
        results = self.run(*inputs)
        for spec, value in zip(self._program.graph_signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                yield from outputs(value)

    def _stored(self, path: str) -> Any:
        if path in self._tensors:
            return self._tensors[path]
        constant = self._program.constants[path]
        like = next(iter(self._tensors.values()))
        return constant.to(like.device) if isinstance(constant, Tensor) else constant

    def run_node(self, n: Node) -> Any:
        if n.name not in self._staying:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        dim, kept = self._staying[n.name]
        x, rest = args[0], list(args[1:])
        kept = kept.to(x.device)
        name = name_of(n.target)
        if name in ("layer_norm", "rms_norm"):
            rest[0] = [len(kept)]
        if name.endswith("_norm") and name != "linalg_vector_norm":
            rest = [v.index_select(0, kept) if isinstance(v, Tensor) else v for v in rest]
            kwargs = {
                k: v.index_select(0, kept) if isinstance(v, Tensor) else v
                for k, v in kwargs.items()
            }
        assert callable(n.target)
        result = n.target(x.index_select(dim, kept), *rest, **kwargs)
        if result.dim() != x.dim() or result.shape[dim] != len(kept):
            return result
        return torch.zeros_like(x).index_copy(dim, kept, result)
