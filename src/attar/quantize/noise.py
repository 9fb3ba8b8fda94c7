"""How much noise quantization puts on each layer's answers: the first place to look where accuracy
fell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from attar.errors import DataError
from attar.quantize.edit import Quantized
from attar.quantize.observers import Grid
from attar.quantize.pt2e import prepare
from attar.runtimes.aten import argument, is_constant, module_path, operator
from attar.student import Student

LAYERS = {"conv1d", "conv2d", "conv3d", "linear"}
CLIPS = {"relu", "hardtanh", "relu6"}
"""Part of the layer before them: an integer kernel does both."""
MOVES = {
    "max_pool1d", "max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "squeeze",
    "unsqueeze", "slice", "select", "pad", "constant_pad_nd", "cat", "concat", "getitem", "clone",
    "contiguous", "split", "split_with_sizes", "chunk", "unflatten", "expand",
}  # fmt: skip
"""Hand on the noise that is there."""


@dataclass(frozen=True)
class LayerNoise:
    """The noise on one layer's answers. layer: its module's path. operator: what it does (`conv2d`,
    `add`). number: counts those of one name. own_db, snr_db: signal-to-noise ratios in dB; infinity
    where there is no noise at all, `None` where there is no signal."""

    layer: str
    operator: str
    number: int
    own_db: float | None
    snr_db: float | None


def layer_noise(
    module: nn.Module,
    edit: Quantized,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> list[LayerNoise]:
    """The signal-to-quantization-noise ratio of every layer's answers, in the network's order:
    10·log10(Σ x² / Σ (x − x̂)²) dB, where x is what the layer answers in float and x̂ what it answers
    quantized, summed over all values and examples. Every 6 dB are one bit (Bennett, "Spectra of
    Quantized Signals", 1948).

    `snr_db` is of the whole quantized network against the float one: noise adds up on the way.
    `own_db` is what the layer does itself: it is given its float input, and quantizes that, its
    weights and its answer. A layer whose own ratio is low is one to leave in float; a low `snr_db`
    beside a good own one is inherited from layers before it.

    Layers are convolutions, linear layers, and what else answers on a grid (additions, products,
    pooling), each with the ReLU that follows it; what only moves values is left out. Layers that
    stay in float have the noise of their weights' 8 bits.

    examples: argument tuples, batch first, run once in order; memory is that of one batch's
    activations. example, dynamic_shapes: as in `quantize`. Raises `DataError` where there are no
    examples, `CheckpointError` where the grids are not those of the network.

    Example:
        >>> found = layer_noise(                                     # doctest: +SKIP
        ...     student.module, edit, [(x,)], example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
        >>> min(found, key=lambda one: one.own_db).layer             # doctest: +SKIP
        'stem'
    """
    prepared = prepare(module, example, dynamic_shapes, edit.scheme)
    # From the same network and scheme come the same graphs, node by node.
    quantized: Any = edit.graph(module, example, dynamic_shapes)
    pair = _Pair(_without_observers(prepared), quantized)
    seen = False
    with torch.no_grad():
        for arguments in examples:
            pair.run(arguments)
            seen = True
    if not seen:
        raise DataError("looking at quantization noise needs examples, and there are none")
    return pair.found()


def student_noise(
    student: Student,
    examples: Iterable[tuple[Any, ...]],
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> list[LayerNoise]:
    """`layer_noise` of a student; empty for one that is not quantized."""
    edit = next((e for e in student.edits if isinstance(e, Quantized)), None)
    if edit is None:
        return []
    return layer_noise(
        student.module, edit, examples, example=example, dynamic_shapes=dynamic_shapes
    )


def in_json(value: float | None) -> float | None:
    """A ratio in dB as JSON can hold it: `None` for infinity too."""
    return round(value, 2) if value is not None and math.isfinite(value) else None


class _Ratio:
    """Energies of a signal and of the noise on it, summed up."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, exact: Tensor, noisy: Tensor) -> None:
        self.signal += float(exact.double().square().sum())
        self.noise += float((exact.double() - noisy.double()).square().sum())

    @property
    def db(self) -> float | None:
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else None


class _Pair:
    """A float graph and the quantized one, run side by side, node by node."""

    def __init__(self, exact: GraphModule, quantized: GraphModule) -> None:
        self._exact, self._quantized = exact, quantized
        self._shared = {n.name for n in exact.graph.nodes}
        self._ends = {end: layer for layer in quantized.graph.nodes if (end := self._end(layer))}
        self._ratios = {end: (_Ratio(), _Ratio()) for end in self._ends}

    def found(self) -> list[LayerNoise]:
        counts: dict[tuple[str, str], int] = {}
        rows = []
        for end, layer in self._ends.items():
            named = (module_path(layer), operator(layer))
            counts[named] = counts.get(named, -1) + 1
            own, whole = self._ratios[end]
            rows.append(LayerNoise(*named, counts[named], own.db, whole.db))
        return rows

    def run(self, arguments: tuple[Any, ...]) -> None:
        """Adds one batch to the ratios."""
        exact = _Values(self._exact, arguments).all()
        noisy = _Values(self._quantized, arguments)
        own: dict[str, Any] = {}
        for node in self._quantized.graph.nodes:
            noisy.step(node)
            if node.op == "call_function":
                own[node.name] = _called(node, self._given(node, own, exact, noisy.values))
            if node in self._ratios:
                alone, whole = self._ratios[node]
                alone.add(exact[node.name], _on_grid(node, own[node.name], noisy))
                whole.add(exact[node.name], _on_grid(node, noisy.values[node.name], noisy))

    def _given(
        self, node: Node, own: dict[str, Any], exact: dict[str, Any], noisy: dict[str, Any]
    ) -> dict[str, Any]:
        """What a node reads where only its own layer is quantized: what the float graph knows is
        taken from there, but for the inside of a layer with its ReLU."""
        inside = node in self._ends and operator(node) in CLIPS
        given = {}
        for source in node.all_input_nodes:
            known = source.op != "get_attr" and source.name in self._shared
            values = exact if known and not inside else own if source.name in own else noisy
            given[source.name] = values[source.name]
        return given

    def _end(self, layer: Node) -> Node | None:
        """Where a layer's answer is complete, itself or its ReLU; `None` for what is no layer."""
        name = operator(layer)
        if layer.name not in self._shared or name in CLIPS | MOVES or not name:
            return None
        users = [u for u in layer.users if operator(u) in CLIPS]
        end = users[0] if len(users) == 1 == len(layer.users) else layer
        weighted = name in LAYERS and _weighted(layer)
        return end if weighted or any(map(_quantizes, end.users)) else None


class _Values:
    """The values of a graph's nodes, for one batch."""

    def __init__(self, graph: GraphModule, arguments: tuple[Any, ...]) -> None:
        self._run = torch.fx.Interpreter(graph, garbage_collect_values=False)
        self._given = iter(arguments)
        self.values: dict[str, Any] = {}

    def all(self) -> dict[str, Any]:
        for node in self._run.module.graph.nodes:  # type: ignore[union-attr]
            self.step(node)
        return self.values

    def step(self, node: Node) -> None:
        self.values[node.name] = self._answer(node)
        self._run.env[node] = self.values[node.name]

    def _answer(self, node: Node) -> Any:
        if node.op == "placeholder":
            return next(self._given)
        return self._run.run_node(node)


def _on_grid(end: Node, answer: Any, noisy: _Values) -> Any:
    """A layer's answer as those after it read it: on its grid, where it has one."""
    quantize = next(filter(_quantizes, end.users), None)
    if quantize is None:
        return answer
    back = next(user for user in quantize.users if operator(user).startswith("dequantize"))
    integers = _called(quantize, {**noisy.values, end.name: answer})
    return _called(back, {**noisy.values, quantize.name: integers})


def _called(node: Node, values: dict[str, Any]) -> Any:
    """What a node answers where others have these values, by their names."""
    arguments, named = map_arg((node.args, node.kwargs), lambda source: values[source.name])
    return node.target(*arguments, **named)  # type: ignore[operator]


def _quantizes(node: Node) -> bool:
    return operator(node).startswith("quantize_per_tensor")


def _weighted(layer: Node) -> bool:
    weight = argument(layer, 1)
    if isinstance(weight, Node) and operator(weight).startswith("dequantize"):
        weight = argument(weight)
    return is_constant(weight)


def _without_observers(prepared: GraphModule) -> GraphModule:
    """The graph in float, with nothing looking on."""
    for name, part in list(prepared.named_modules(remove_duplicate=False)):
        if isinstance(part, Grid):
            owner, _, last = name.rpartition(".")
            setattr(prepared.get_submodule(owner), last, nn.Identity())
    return prepared
