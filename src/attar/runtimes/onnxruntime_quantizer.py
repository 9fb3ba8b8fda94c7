"""What ONNX Runtime's int8 kernels want: a PT2E `Quantizer` that marks a graph so that it fuses.

ONNX Runtime turns `DequantizeLinear -> op -> QuantizeLinear` into one int8 kernel where every
input and the output of the op are on grids; one unmarked edge leaves the op in float with
conversions around it, slower than no quantization at all. So marks are decided over the whole
graph: convolutions and linear layers first, then whatever lies between them and has an int8
kernel; operators that only move values share the grid of what they move.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverOrFakeQuantize
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, EdgeOrNode

from attar.runtimes.aten import argument, is_constant, module_path, operator, rank, stable_names

CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
ACTIVATIONS = {"relu", "hardtanh", "relu6"}
"""Vanish into the kernel before them: a grid from zero up is a ReLU."""
ELEMENTWISE = {"add", "mul"}
"""QLinearAdd, QLinearMul: both inputs on grids."""
UNARY = {"avg_pool2d", "sigmoid", "leaky_relu"}
"""QLinearAveragePool, QLinearSigmoid, QLinearLeakyRelu: one input, a grid of their own after."""
MOVES = {
    "max_pool1d", "max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "squeeze",
    "unsqueeze", "slice", "select", "pad", "constant_pad_nd", "cat", "concat", "getitem", "clone",
    "contiguous",
}  # fmt: skip
"""Hand values on as they are: one grid before and after, and the kernel runs on the integers."""
SPLITS = {"split", "split_with_sizes", "chunk"}
"""Moves whose parts come out through `getitem`."""
MONOTONE = {"max_pool1d", "max_pool2d", "flatten", "reshape", "view"}
"""Moves that a ReLU after them may be done before, where it fuses into a convolution."""

WeightObserver = Callable[..., ObserverOrFakeQuantize]


class OnnxRuntimeQuantizer(Quantizer):
    """Marks what ONNX Runtime computes in int8.

    Activations are uint8, affine, a grid a tensor; weights int8, symmetric, a grid an output
    channel. (int8 activations run slower than float on x86.) A convolution's output is marked after
    the ReLU that follows it. A linear layer on (N, features) is marked like a convolution, one
    on a longer shape at its input and weight only: its output goes back to float, as attention and
    layer normalisation want it.

    activation, weight: make the observers, as `QuantizationSpec` wants them.
    weight_bits: 8, or 7 where a CPU's kernels would saturate (`attar.quantize.cpu`).
    float_layers: paths of modules that compute in float, with everything inside them; `*` means the
    whole network. Their weights still lie on grids, so that they are stored in bytes.

    Each observer gets a `key` that outlives the graph: the module path and operator that makes its
    value, and a number where there are several (`layer1.0:relu`, `layer1.0:relu.1`); a weight's is
    its layer's path and operator with `/weight`.

    Example: `prepare_pt2e(graph, OnnxRuntimeQuantizer(activation=Histogram, weight=PerChannel))`.
    """

    def __init__(
        self,
        *,
        activation: WeightObserver,
        weight: WeightObserver,
        weight_bits: int = 8,
        float_layers: Collection[str] = (),
    ) -> None:
        self._float_layers = tuple(float_layers)
        limit = 127 if weight_bits == 8 else 2 ** (weight_bits - 1)
        self._activation = QuantizationSpec(
            torch.uint8, activation, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine
        )
        self._weight = QuantizationSpec(
            torch.int8,
            weight,
            quant_min=-limit,
            quant_max=limit,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )
        self._stored = QuantizationSpec(
            torch.uint8,
            weight,
            quant_min=1,
            quant_max=255,
            qscheme=torch.per_channel_affine,
            ch_axis=0,
        )
        self._on_grid: set[Node] = set()

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Puts ReLUs next to what they fuse with, and SiLUs and global means into a form with
        kernels."""
        for node in list(model.graph.nodes):
            if operator(node) in ACTIVATIONS:
                _hoist(node)
            elif operator(node) == "silu":
                _as_product(model, node)
            elif operator(node) in ("mean", "adaptive_avg_pool2d"):
                _pool_globally(model, node)
        model.graph.eliminate_dead_code()
        model.recompile()
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Marks the graph's nodes in place."""
        nodes = list(model.graph.nodes)
        wanted = self._wanted(nodes)
        carriers: set[Node] = set()
        self._on_grid = set()
        for node in nodes:
            if node in self._on_grid:  # a ReLU, marked with what it belongs to
                carriers.add(node)
                continue
            if self._carries(node, carriers):
                carriers.add(node)
            if self._is_float(node):
                self._mark_stored(node)
                continue
            name = operator(node)
            if name in CONVOLUTIONS or name == "linear":
                self._mark_layer(node, wanted)
            elif name in ELEMENTWISE and self._joins(node, carriers):
                self._mark(node, self._activation)
            elif name in MOVES | SPLITS and self._joins(node, carriers) and _moves_exactly(node):
                self._mark_move(node)
            elif (self._is_unary(node) or name in ACTIVATIONS) and argument(node) in self._on_grid:
                self._mark(node, self._activation)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing is marked that has no kernel, so there is nothing to refuse."""

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict
    ) -> None:
        """Gives each observer its key."""
        names = stable_names(model)
        for place, observer in edge_or_node_to_obs_or_fq.items():
            if observer is None or getattr(observer, "key", None):
                continue
            if isinstance(place, Node):
                observer.key = names[place]
            else:
                source, user = place
                weight = source.op == "get_attr"
                observer.key = f"{names[user]}/weight" if weight else names[source]

    def _is_float(self, node: Node) -> bool:
        path = module_path(node)
        if "*" in self._float_layers:
            return True
        return any(path == layer or path.startswith(layer + ".") for layer in self._float_layers)

    def _is_unary(self, node: Node) -> bool:
        return operator(node) in UNARY

    def _wanted(self, nodes: list[Node]) -> set[Node]:
        """Values that some int8 kernel would read, if only they were on a grid."""
        wanted: set[Node] = set()
        readers = CONVOLUTIONS | ELEMENTWISE | {"linear"}
        for node in reversed(nodes):
            for user in node.users:
                name = operator(user)
                if self._is_float(user):
                    continue
                reads = name in readers or self._is_unary(user)
                if reads or (name in MOVES | SPLITS | ACTIVATIONS and user in wanted):
                    wanted.add(node)
        return wanted

    def _carries(self, node: Node, carriers: set[Node]) -> bool:
        """Whether the value may go onto a grid without harm: it comes from the input or from
        layers, by way of nothing but int8 kernels, even where these were told to stay float."""
        name = operator(node)
        if node.op == "placeholder":
            value = node.meta.get("val")
            return isinstance(value, torch.Tensor) and value.dtype == torch.float32
        if name == "linear":
            return rank(node) == 2
        if self._is_unary(node) or name in ELEMENTWISE | ACTIVATIONS | MOVES | SPLITS:
            return all(source in carriers for source in _sources(node))
        return name in CONVOLUTIONS

    def _joins(self, node: Node, carriers: set[Node]) -> bool:
        sources = _sources(node)
        if operator(node) in ELEMENTWISE and not _plain_binary(node):
            return False
        return any(s in self._on_grid for s in sources) and all(s in carriers for s in sources)

    def _mark_layer(self, node: Node, wanted: set[Node]) -> None:
        source, weight, bias = (argument(node, place) for place in range(3))
        if not is_constant(weight):
            return
        inputs: dict[Node, QuantizationSpecBase | None] = {
            source: self._activation,
            weight: self._weight,
        }
        if is_constant(bias):
            inputs[bias] = _bias_grid((source, node), (weight, node))
        self._mark(node, self._activation if self._answers_on_grid(node, wanted) else None, inputs)

    def _answers_on_grid(self, layer: Node, wanted: set[Node]) -> bool:
        end = _end(layer)
        # A ReLU left in float after it would take the whole linear layer with it.
        return operator(layer) in CONVOLUTIONS or (
            rank(layer) == 2 and (end in wanted or end is not layer)
        )

    def _mark_stored(self, node: Node) -> None:
        """A layer that computes in float keeps its weight in a byte: uint8 around 128, which tells
        it from the int8 of integer kernels (see `onnxruntime_float`)."""
        weight = argument(node, 1)
        if operator(node) in CONVOLUTIONS | {"linear"} and is_constant(weight):
            self._mark(node, None, {weight: self._stored})

    def _mark_move(self, node: Node) -> None:
        sources = _sources(node)
        if operator(node) == "getitem":
            split = sources[0]
            self._mark(node, SharedQuantizationSpec((_sources(split)[0], split)), {})
            return
        if operator(node) in SPLITS:
            self._mark(node, None)
            self._on_grid.add(node)
            return
        shared = SharedQuantizationSpec((sources[0], node))
        inputs: dict[Node, QuantizationSpecBase | None] = dict.fromkeys(sources, shared)
        inputs[sources[0]] = self._activation
        self._mark(node, shared, inputs)

    def _mark(
        self,
        node: Node,
        output: QuantizationSpecBase | None,
        inputs: dict[Node, QuantizationSpecBase | None] | None = None,
    ) -> None:
        """Marks a node's inputs, and its output where its ReLU (if one follows) has computed it."""
        if inputs is None:
            inputs = dict.fromkeys(_sources(node), self._activation)
        end = _end(node) if operator(node) not in MOVES | SPLITS | ACTIVATIONS else node
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=output if end is node else None, _annotated=True
        )
        if end is not node:
            end.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
                output_qspec=output, _annotated=True
            )
        if output is not None:
            self._on_grid.add(end)


def _bias_grid(source: EdgeOrNode, weight: EdgeOrNode) -> DerivedQuantizationSpec:
    """The grid in which the runtime sums: steps of the input's scale times the weight's."""

    def derive(grids: list[ObserverOrFakeQuantize]) -> tuple[torch.Tensor, torch.Tensor]:
        (input_scale, _), (weight_scale, _) = (g.calculate_qparams() for g in grids)
        scale = input_scale * weight_scale
        return scale, torch.zeros_like(scale, dtype=torch.int64)

    limit = 2**31 - 1
    return DerivedQuantizationSpec(
        derived_from=[source, weight],
        derive_qparams_fn=derive,
        dtype=torch.int32,
        quant_min=-limit,
        quant_max=limit,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _sources(node: Node) -> list[Node]:
    """The tensors a node reads, each once, without numbers and sizes."""
    first = node.args[0] if node.args else None
    if isinstance(first, (list, tuple)):  # cat
        return list(dict.fromkeys(a for a in first if isinstance(a, Node)))
    count = 2 if operator(node) in ELEMENTWISE else 1
    return list(dict.fromkeys(a for a in node.args[:count] if isinstance(a, Node)))


def _end(node: Node) -> Node:
    """The ReLU after a node, if that is all that reads it; else the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and _is_relu(users[0]) else node


def _is_relu(node: Node) -> bool:
    """Clips below at zero (and perhaps above, as the grid does too)."""
    name = operator(node)
    return name in ACTIVATIONS and (name != "hardtanh" or argument(node, 1, -1) == 0)


def _plain_binary(node: Node) -> bool:
    """Two tensors, neither scaled nor a number."""
    tensors = all(isinstance(a, Node) for a in node.args[:2])
    return tensors and "alpha" not in node.kwargs


def _moves_exactly(node: Node) -> bool:
    """Padding with anything but zeros brings in values of its own."""
    if operator(node) == "pad":
        return argument(node, 2, "constant") == "constant" and not argument(node, 3)
    return operator(node) != "constant_pad_nd" or not argument(node, 2)


def _hoist(relu: Node) -> None:
    """`relu(max_pool(x))` is `max_pool(relu(x))`, and there the ReLU fuses into what makes x."""
    if not _is_relu(relu):
        return
    last: Node = argument(relu)
    first, moves = last, []
    while operator(first) in MONOTONE and len(first.users) == 1:
        moves.append(first)
        first = argument(first)
    if not moves or len(first.users) != 1:
        return
    relu.replace_all_uses_with(last)
    relu.args = (first, *relu.args[1:])
    moves[-1].replace_input_with(first, relu)
    first.append(relu)
    relu.meta = {**relu.meta, "val": first.meta.get("val")}


def _as_product(model: GraphModule, silu: Node) -> None:
    """A SiLU as the product of its input and the sigmoid of it, which both have int8 kernels."""
    source: Node = argument(silu)
    with model.graph.inserting_before(silu):
        gate = _call(model, silu, torch.ops.aten.sigmoid.default, source)
        product = _call(model, silu, torch.ops.aten.mul.Tensor, source, gate)
    silu.replace_all_uses_with(product)


def _pool_globally(model: GraphModule, node: Node) -> None:
    """A mean over a whole image as the average pooling that has an int8 kernel."""
    source: Node = argument(node)
    if rank(source) != 4 or not _is_global(node):
        return
    window = list(source.meta["val"].shape[2:])
    if not all(isinstance(side, int) for side in window):
        return
    keeps = operator(node) != "mean" or bool(argument(node, 2))
    with model.graph.inserting_before(node):
        pool = _call(model, node, torch.ops.aten.avg_pool2d.default, source, window)
        last = pool if keeps else _call(model, node, torch.ops.aten.flatten.using_ints, pool, 1)
    node.replace_all_uses_with(last)


def _call(model: GraphModule, like: Node, target: Any, source: Node, *args: Any) -> Node:
    """A new node that computes `target(source, *args)`, with the meta of the one it replaces."""
    node = model.graph.call_function(target, (source, *args))
    values = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    node.meta = {**like.meta, "val": target(*values)}
    return node


def _is_global(node: Node) -> bool:
    sizes = argument(node, 1)
    if operator(node) == "adaptive_avg_pool2d":
        return list(sizes) == [1, 1]
    return isinstance(sizes, (list, tuple)) and sorted(d % 4 for d in sizes) == [2, 3]
