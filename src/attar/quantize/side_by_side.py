"""The float and the quantized network run together, node by node, on the same examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate
from torchao.quantization.pt2e.observer import ObserverBase

from attar.quantize.graph import layer_keys
from attar.quantize.observers import Grid


@dataclass(frozen=True)
class Pair:
    """What a node gives in float, and as the quantized network would have it."""

    in_float: Any
    quantized: Any


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as it is met: its node, key, arguments and answers.

    inputs: what it reads first (a tensor), on either side. arguments: the quantized side's, all.
    """

    node: Node
    key: str
    inputs: Pair
    arguments: tuple[Any, ...]
    answers: Pair


class SideBySide(Interpreter):
    """Runs a prepared graph whose grids are settled: once in float, once with every observed tensor
    rounded to its grid. Values are let go as soon as nothing reads them.

    at_layer: sees each layer in order, and gives the quantized side's answer, which may be another
    than the layer's own: all that follows sees it. Without observers both sides are float.

    Example:
        >>> both = SideBySide(edit.prepared(module, example, shapes))  # doctest: +SKIP
        >>> both.run(images).quantized  # doctest: +SKIP
    """

    def __init__(
        self, prepared: GraphModule, at_layer: Callable[[Layer], Tensor] | None = None
    ) -> None:
        super().__init__(prepared)
        self._keys = layer_keys(prepared)
        self._at_layer = at_layer or (lambda layer: layer.answers.quantized)

    def run(self, *arguments: Any) -> Pair:  # type: ignore[override]
        """The network's answers, in float and quantized."""
        graph = self.graph
        pair = super().run(*graph.process_inputs(*arguments), enable_io_processing=False)
        return Pair(*(graph.process_outputs(o) for o in (pair.in_float, pair.quantized)))

    def run_node(self, n: Node) -> Any:
        if n.op in ("placeholder", "get_attr"):
            value = super().run_node(n)
            return Pair(value, value)
        given, named = self.fetch_args_kwargs_from_env(n)
        in_float, quantized = (_side(given, side) for side in ("in_float", "quantized"))
        if n.op == "output":
            return Pair(in_float[0], quantized[0])
        if n.op == "call_module":
            return self._observed(n, in_float, quantized)
        call = getattr(self, n.op)
        answers = Pair(
            call(n.target, in_float, _side(named, "in_float")),
            call(n.target, quantized, _side(named, "quantized")),
        )
        if n not in self._keys:
            return answers
        layer = Layer(n, self._keys[n], given[0], quantized, answers)
        return Pair(answers.in_float, self._at_layer(layer))

    def _observed(self, n: Node, in_float: tuple[Any, ...], quantized: tuple[Any, ...]) -> Pair:
        observer = self.fetch_attr(str(n.target))
        if isinstance(observer, Grid):
            return Pair(in_float[0], observer.simulated(quantized[0]))
        assert isinstance(observer, ObserverBase)  # a bias: its steps are too fine to matter
        return Pair(in_float[0], quantized[0])


def _side(values: Any, side: str) -> Any:
    return map_aggregate(values, lambda v: getattr(v, side) if isinstance(v, Pair) else v)
