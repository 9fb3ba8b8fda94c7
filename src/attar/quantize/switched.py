"""A calibrated graph whose layers can be put on their integer grids and taken off, one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from attar.quantize.edit import Grids
from attar.quantize.observers import Grid
from attar.runtimes.aten import argument, constant, module_path, operator

LAYERS = {"conv1d", "conv2d", "conv3d", "linear"}
CLIPS = {"relu", "relu6", "hardtanh"}
"""Are computed by the kernel before them."""

Values = dict[Node, Any]


class Switched(Interpreter):
    """Computes in float what an exported network computes in integers, layer by layer.

    A layer in int8 has on grids what its kernel has there: what it reads, its weight, and what it
    answers. A grid that no layer's kernel has (that of a residual sum no layer reads) goes with the
    nearest layer before it. A layer that isn't in int8 computes in float with its weight as it is
    stored, rounded to 8 bits. Biases aren't rounded: their steps are far finer.

    prepared: with observers everywhere, their grids chosen; layers that stay float by its scheme
    do. stored: the grids of the same network all in float.
    """

    def __init__(self, prepared: GraphModule, stored: Grids) -> None:
        super().__init__(prepared)
        self._nodes = list(prepared.graph.nodes)
        modules = dict(prepared.named_modules(remove_duplicate=False))  # moves share observers
        observers = ((n, modules.get(str(n.target))) for n in self._nodes if n.op == "call_module")
        self._grids = {n: grid for n, grid in observers if isinstance(grid, Grid)}
        self._weights: dict[Node, tuple[Tensor, Tensor]] = {}
        self._paths: dict[Node, str] = {}
        for node in self._nodes:
            weight = self._grids.get(argument(node, 1)) if operator(node) in LAYERS else None
            if weight is not None:
                values = constant(prepared, argument(argument(node, 1)))
                kept = on_grid(values, *stored[weight.key], 1, 255)
                self._weights[node] = (kept, _on(weight, values))
                if weight.dtype == torch.int8:
                    self._paths[node] = module_path(node)
        self._owners = self._owned()

    @property
    def layers(self) -> list[str]:
        """The layers that can be switched, by path, in the order in which they compute."""
        return list(dict.fromkeys(self._paths.values()))

    def answers(self, arguments: tuple[Any, ...], int8: Collection[str] = ()) -> Any:
        """The network's output with these layers in int8, for arguments that are batch first."""
        values = self._given(arguments)
        self._advance(values, 0, len(self._nodes), frozenset(int8))
        return self._answer(values)

    def answers_of_each(self, arguments: tuple[Any, ...]) -> Iterator[tuple[str | None, Any]]:
        """The output with each layer alone in int8, and last, as `None`, with none. What comes
        before a layer is computed once for all after it."""
        values, at = self._given(arguments), 0
        for layer in self.layers:
            first = next(i for i, n in enumerate(self._nodes) if self._paths.get(n) == layer)
            self._advance(values, at, first, frozenset())
            at, alone = first, dict(values)
            self._advance(alone, first, len(self._nodes), frozenset({layer}))
            yield layer, self._answer(alone)
        self._advance(values, at, len(self._nodes), frozenset())
        yield None, self._answer(values)

    def _owned(self) -> dict[Node, str]:
        """By observer: the layer whose kernel answers on its grid, or that it goes with."""
        read = {self._grids.get(argument(n)) for n in self._paths}
        owners: dict[Node, str] = {}
        for observer, grid in self._grids.items():
            node, own = argument(observer), True
            while isinstance(node, Node) and node not in self._paths:
                own = own and (operator(node) in CLIPS or node in self._grids)
                node = argument(node)
            if isinstance(node, Node) and (own or grid not in read):
                owners[observer] = self._paths[node]
        return owners

    def _given(self, arguments: tuple[Any, ...]) -> Values:
        graph: Any = self.module.graph
        given = iter(graph.process_inputs(*arguments))
        return {n: next(given) for n in self._nodes if n.op == "placeholder"}

    def _answer(self, values: Values) -> Any:
        graph: Any = self.module.graph
        return graph.process_outputs(values[self._nodes[-1]])

    def _advance(self, values: Values, start: int, end: int, int8: frozenset[str]) -> None:
        """Computes nodes from `start` up to `end`, and lets go of what no later one reads."""
        self.env = values
        with torch.no_grad():
            for node in self._nodes[start:end]:
                if node not in values:
                    values[node] = self._value(node, values, int8)
                for done in self.user_to_last_uses.get(node, []):
                    del values[done]

    def _value(self, node: Node, values: Values, int8: frozenset[str]) -> Any:
        if node.op == "call_module":
            value, grid = values[argument(node)], self._grids.get(node)
            if grid is not None and self._owners.get(node) in int8:
                return _on(grid, value)
            return value  # observers look no longer
        if node not in self._weights:
            return self.run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        source, _, *rest = args
        inside = self._paths.get(node) in int8
        if inside:
            source = _on(self._grids[argument(node)], source)
        return self.call_function(node.target, (source, self._weights[node][inside], *rest), kwargs)


def _on(grid: Grid, values: Tensor) -> Tensor:
    return on_grid(values, grid.scale, grid.zero_point, grid.quant_min, grid.quant_max)


def on_grid(values: Tensor, scale: Tensor, zero_point: Tensor, least: int, most: int) -> Tensor:
    """Float values moved to their nearest places on a grid `scale · (integer - zero_point)`.

    scale, zero_point: one each, or (channels,) for the first dimension. least, most: the integers.

    >>> on_grid(torch.tensor([0.2, 0.9, 9.0]), torch.tensor(0.5), torch.tensor(0), 0, 3).tolist()
    [0.0, 1.0, 1.5]
    """
    if scale.dim():
        zeros = zero_point.to(torch.int32)
        return torch.fake_quantize_per_channel_affine(values, scale, zeros, 0, least, most)
    return torch.fake_quantize_per_tensor_affine(values, float(scale), int(zero_point), least, most)
