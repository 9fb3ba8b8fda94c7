"""The graph that is quantized: traced from the network, with its batch norms folded away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from attar.errors import CheckpointError
from attar.runtimes.aten import (
    argument,
    constant,
    is_constant,
    module_path,
    operator,
    rank,
    stable_names,
)
from attar.runtimes.tracing import quiet
from attar.runtimes.tracing import trace as exported

IDENTITIES = {"dropout", "feature_dropout", "alias", "detach", "lift_fresh"}
VIEWS = {"slice", "select", "view", "reshape", "transpose", "permute", "narrow", "flatten"}
FOLDABLE = {"conv1d", "conv2d", "conv3d", "linear"}
OUTPUT_OF = "output_of"
"""A node's mark: the calls of modules, as (call, path), whose output its value may be."""

Tensors = Mapping[str, Tensor]
"""A network's parameters and buffers by path."""
Made = Callable[[Tensors], Tensor]
"""How a tensor is made from the network's, differentiably."""


def capture(
    module: nn.Module, example: tuple[Any, ...], dynamic_shapes: tuple[dict[int, Any], ...]
) -> GraphModule:
    """The network as a graph of ATen operators, in eval mode on the CPU; the module is not touched.

    Nothing in it works in place, does nothing, or is a batch norm: these are folded into the layer
    before them, or become a 1×1 convolution of their own. (PT2E's own folding changes what else
    reads the convolution, and the second use of a shared one.) How the folded constants are made
    is kept with the graph (`folds`). Raises `ExportError`.
    """
    graph = trace(module, example, dynamic_shapes)
    for node in list(graph.graph.nodes):
        if operator(node) == "batch_norm" and is_constant(argument(node, 3)):
            _fold(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def trace(
    module: nn.Module, example: tuple[Any, ...], dynamic_shapes: tuple[dict[int, Any], ...]
) -> GraphModule:
    """As `capture`, with the batch norms where they are: constants are named as the network names
    its parameters and buffers, and a weight that a layer computes from them, by its layer."""
    network = copy.deepcopy(module).cpu().eval()
    with quiet():
        program = exported(network, example, dynamic_shapes, type(module).__name__)
    graph: GraphModule = program.module(check_guards=False)
    graph.meta["originals"] = tensors_of(graph)
    graph.meta["folds"], graph.meta["factors"] = {}, {}
    _mark_outputs(graph)
    _functional(graph)
    for node in list(graph.graph.nodes):
        if operator(node) in IDENTITIES:
            _replace(node, argument(node))
    _compute_weights(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def folds(graph: GraphModule) -> dict[str, Made]:
    """How a captured graph's own constants are made from the network's tensors, by name; each other
    constant is the network's tensor of its name. Results are in float64 where the device has it."""
    made: dict[str, Made] = graph.meta["folds"]
    return made


def factors(graph: GraphModule) -> dict[str, Tensor]:
    """What folding has multiplied each row of a captured graph's weights by, float64 (rows,), by
    the constant's name; others are as they were."""
    found: dict[str, Tensor] = graph.meta["factors"]
    return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _mark_outputs(graph: GraphModule) -> None:
    """Marks what leaves each call of a module, before anything is rewritten."""
    for node in graph.graph.nodes:
        around = set.intersection(*(set(_calls(user)) for user in node.users or [node]))
        left = [(call, path) for call, path in _calls(node).items() if call not in around]
        node.meta[OUTPUT_OF] = left


def _calls(node: Node) -> dict[str, str]:
    """The calls of modules that a node was traced in, and the modules' paths."""
    return {call: path for call, (path, _) in node.meta.get("nn_module_stack", {}).items()}


def layer_keys(graph: GraphModule) -> dict[Node, str]:
    """The convolutions and linear layers with a constant weight, in order, by what outlives the
    graph: the key of their weight's grid, without `/weight`."""
    return {
        node: name
        for node, name in stable_names(graph).items()
        if operator(node) in FOLDABLE and is_weight(argument(node, 1))
    }


def is_weight(node: Any) -> bool:
    """Whether a node reads a parameter, be it by way of an observer."""
    observed = isinstance(node, Node) and node.op == "call_module"
    return is_constant(argument(node) if observed else node)


def add_to_biases(graph: GraphModule, added: Mapping[str, Tensor]) -> None:
    """Adds to layers' biases, in place, by `layer_keys`; layers without one get one.

    Raises `CheckpointError` for a layer that the graph lacks, or that has other channels.
    """
    keys = layer_keys(graph)
    if missing := added.keys() - set(keys.values()):
        raise CheckpointError(
            f"a bias was corrected for {min(missing)}, which the network's graph doesn't have; "
            "quantize the student again with the versions installed now"
        )
    for layer, key in keys.items():
        if key in added:
            _add_to_bias(graph, layer, key, added[key])
    if added:
        graph.graph.eliminate_dead_code()
        graph.recompile()


def _add_to_bias(graph: GraphModule, layer: Node, key: str, by: Tensor) -> None:
    channels = len(constant(graph, argument(layer, 1)))
    if by.shape != (channels,):
        raise CheckpointError(
            f"the bias correction of {key} has shape {tuple(by.shape)}, its layer {channels} "
            "channels; quantize the student again"
        )
    own = argument(layer, 2)
    known = None if own is None else constant(graph, own)

    def bias(tensors: Tensors) -> Tensor:
        return by if known is None else known + by

    number = _new_constant(graph, layer, f"{layer.name}_corrected_bias", bias)
    layer.args = (*layer.args[:2], number, *layer.args[3:])


def _compute_weights(graph: GraphModule) -> None:
    """Puts one constant where a layer's weight is computed from nothing but constants, none of
    which has that weight's name (as where it is standardised: there is a grid for what it was)."""
    for node in list(graph.graph.nodes):
        name = f"{module_path(node) or node.name}.weight"
        known = is_constant(argument(node, 1)) or name in graph.meta["originals"]
        if operator(node) not in FOLDABLE or known:
            continue
        made = _computation(graph, argument(node, 1))
        if made is not None:
            weight = _new_constant(graph, node, name, made)
            node.args = (argument(node), weight, *node.args[2:])


def _computation(graph: GraphModule, last: Node) -> Made | None:
    """How a value is computed from constants alone; `None` where it isn't."""
    needed: set[Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node.op not in ("get_attr", "call_function"):
            return None
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    steps, copied, read = Graph(), dict[Node, Node](), list[tuple[str, Tensor]]()
    for node in graph.graph.nodes:
        if node in needed and is_constant(node):
            copied[node] = steps.placeholder(f"constant{len(read)}")
            read.append((str(node.target), constant(graph, node)))
        elif node in needed:
            copied[node] = steps.node_copy(node, copied.__getitem__)
    steps.output(copied[last])
    compute = GraphModule({}, steps)

    def made(tensors: Tensors) -> Tensor:
        return _wide(compute(*(tensors.get(name, fixed) for name, fixed in read)))

    return made


def _replace(node: Node, by: Node) -> None:
    by.meta[OUTPUT_OF] = [*by.meta.get(OUTPUT_OF, []), *node.meta.get(OUTPUT_OF, [])]
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _functional(graph: GraphModule) -> None:
    """In-place operators as ordinary ones, whose result is read by all that came after them."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        name = operator(node)
        plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
        overload = getattr(node.target, "_overloadname", "default")
        if plain is None or overload not in plain.overloads() or _seen_elsewhere(argument(node)):
            continue
        node.target = getattr(plain, overload)
        after = order[node]
        argument(node).replace_all_uses_with(node, lambda user, after=after: order[user] > after)


def _seen_elsewhere(changed: Node) -> bool:
    """Whether what is changed is a view of something that others read."""
    while operator(changed) in VIEWS:
        changed = argument(changed)
        if len(changed.users) > 1:
            return True
    return False


def _fold(graph: GraphModule, norm: Node) -> None:
    factor, offset = _affine(graph, norm)
    layer = argument(norm)
    if not _takes(layer, norm):
        _as_layer(graph, norm, factor, offset)
        return
    unfolded, bias = _made(graph, argument(layer, 1)), _maybe_made(graph, argument(layer, 2))

    def weight(tensors: Tensors) -> Tensor:
        value = unfolded(tensors)
        return value * factor(tensors).reshape(-1, *[1] * (value.dim() - 1))

    def shifted(tensors: Tensors) -> Tensor:
        moved = offset(tensors)
        return moved if bias is None else moved + bias(tensors) * factor(tensors)

    before = factors(graph).get(str(argument(layer, 1).target), 1)
    _set_constants(graph, layer, norm, weight, shifted)
    with torch.no_grad():
        by = before * factor(graph.meta["originals"])
    factors(graph)[str(argument(layer, 1).target)] = by
    layer.meta[OUTPUT_OF] = []  # what it answered without the norm is computed no more
    _replace(norm, layer)


def _made(graph: GraphModule, node: Node) -> Made:
    """How the constant that a node reads is made, as wide as folding wants it."""
    name, fixed = str(node.target), constant(graph, node)
    return folds(graph).get(name, lambda tensors: _wide(tensors.get(name, fixed)))


def _maybe_made(graph: GraphModule, node: Node | None) -> Made | None:
    return None if node is None else _made(graph, node)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # which has no float64


def _takes(layer: Node, norm: Node) -> bool:
    """Whether the batch norm may be folded into what comes before it."""
    same_axis = operator(layer) != "linear" or rank(layer) == 2
    constants = [a for a in layer.args[1:3] if a is not None]
    return (
        operator(layer) in FOLDABLE
        and same_axis
        and list(layer.users) == [norm]
        and all(map(is_constant, constants))
    )


def _affine(graph: GraphModule, norm: Node) -> tuple[Made, Made]:
    """An evaluating batch norm as `factor · x + offset`, (channels,) each."""
    gamma, beta = (_maybe_made(graph, argument(norm, i)) for i in (1, 2))
    mean, variance = (_made(graph, argument(norm, i)) for i in (3, 4))
    epsilon = argument(norm, 7)

    def factor(tensors: Tensors) -> Tensor:
        scale = (variance(tensors) + epsilon).rsqrt()
        return scale if gamma is None else scale * gamma(tensors)

    def offset(tensors: Tensors) -> Tensor:
        moved = -mean(tensors) * factor(tensors)
        return moved if beta is None else moved + beta(tensors)

    return factor, offset


def _as_layer(graph: GraphModule, norm: Node, factor: Made, offset: Made) -> None:
    """A convolution with one weight a channel, which its grid holds exactly; arithmetic where there
    is nothing to convolve, on (N, channels)."""
    spatial = rank(norm) - 2
    if not spatial:
        scaled = _arithmetic(graph, norm, torch.ops.aten.mul, argument(norm), factor)
        _replace(norm, _arithmetic(graph, norm, torch.ops.aten.add, scaled, offset))
        return
    convolve = getattr(torch.ops.aten, f"conv{spatial}d").default
    one, none = [1] * spatial, [0] * spatial
    channels = len(constant(graph, argument(norm, 3)))
    with graph.graph.inserting_before(norm):
        layer = graph.graph.call_function(
            convolve, (argument(norm), None, None, one, none, one, channels)
        )
    layer.meta = dict(norm.meta)
    layer.meta[OUTPUT_OF] = []

    def weight(tensors: Tensors) -> Tensor:
        return factor(tensors).reshape(-1, 1, *one)

    _set_constants(graph, layer, norm, weight, offset)
    _replace(norm, layer)


def _arithmetic(graph: GraphModule, norm: Node, target: Any, source: Node, by: Made) -> Node:
    number = _new_constant(graph, norm, f"{norm.name}_{target.__name__}", by)
    with graph.graph.inserting_before(norm):
        node = graph.graph.call_function(target.Tensor, (source, number))
    node.meta = {**norm.meta, OUTPUT_OF: []}
    return node


def _set_constants(graph: GraphModule, layer: Node, norm: Node, weight: Made, bias: Made) -> None:
    """Gives a layer constants of its own, named by its module: another layer may read the old."""
    path = module_path(layer) or layer.name
    weight_name = f"{path}.weight"
    if any(user not in (layer, norm) for user in _readers(graph, weight_name)):
        path = f"{path}.{layer.name}"
    constants = [
        _new_constant(graph, layer, f"{path}.{name}", made)
        for name, made in (("weight", weight), ("bias", bias))
    ]
    layer.args = (layer.args[0], *constants, *layer.args[3:])


def _readers(graph: GraphModule, name: str) -> set[Node]:
    nodes = [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == name]
    return {user for node in nodes for user in node.users}


def _new_constant(graph: GraphModule, before: Node, name: str, made: Made) -> Node:
    folds(graph)[name] = made
    with torch.no_grad():
        value = made(graph.meta["originals"]).float()
    owner: nn.Module = graph
    *path, last = name.split(".")
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, last):
        delattr(owner, last)
    owner.register_buffer(last, value)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(name)
    mode = before.meta["val"].fake_mode
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node
