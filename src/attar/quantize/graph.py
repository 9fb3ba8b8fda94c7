"""The graph that is quantized: traced from the network, with its batch norms folded away."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attar.errors import ExportError

IDENTITIES = {"dropout", "alias", "contiguous", "clone", "detach", "feature_dropout", "lift_fresh"}


def capture(
    module: nn.Module, example: tuple[Any, ...], dynamic_shapes: tuple[dict[int, Any], ...]
) -> GraphModule:
    """The network as a graph of ATen operators, in eval mode on the CPU; the module is not touched.

    Nothing in it works in place, does nothing, or is a batch norm: these are folded into the layer
    before them, or become a 1×1 convolution of their own. (PT2E's own folding changes what else
    reads the convolution, and the second use of a shared one.) Raises `ExportError`.
    """
    network = copy.deepcopy(module).cpu().eval()
    try:
        with torch.no_grad():
            program = torch.export.export(
                network, example, dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"can't trace {type(module).__name__} to quantize it: {reason}"
        ) from error
    graph = program.module(check_guards=False)
    _functional(graph)
    _drop_identities(graph)
    for node in list(graph.graph.nodes):
        if _operator(node) in ("batch_norm", "cudnn_batch_norm"):
            _fold(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def pad_integers(graph: GraphModule) -> None:
    """Zero padding between equal grids, done on the integers (with the zero point): runtimes leave
    such a padding in float, with a conversion on either side."""
    for pad in list(graph.graph.nodes):
        if _operator(pad) not in ("pad", "constant_pad_nd"):
            continue
        before, after = pad.args[0], next(iter(pad.users), None)
        if _operator(before) != "dequantize_per_tensor" or after is None:
            continue
        if _operator(after) != "quantize_per_tensor" or before.args[1:] != after.args[1:]:
            continue
        integers, zero = before.args[0], before.args[2]
        with graph.graph.inserting_before(pad):
            padded = graph.graph.call_function(
                torch.ops.aten.constant_pad_nd.default, (integers, pad.args[1], zero)
            )
        after.replace_all_uses_with(padded)
        graph.graph.erase_node(after)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _operator(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
    return packet.__name__ if packet is not None else ""


def _functional(graph: GraphModule) -> None:
    """In-place operators as ordinary ones, whose result is read by all that came after them."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        name = _operator(node)
        if not name.endswith("_") or name.startswith("_"):
            continue
        overload = getattr(node.target, "_overloadname", "default")
        plain = getattr(torch.ops.aten, name.rstrip("_"), None)
        changed = node.args[0]
        if plain is None or overload not in plain.overloads() or not isinstance(changed, Node):
            continue
        node.target = getattr(plain, overload)
        later = lambda user, after=order[node]: order[user] > after  # noqa: E731
        changed.replace_all_uses_with(node, later)


def _drop_identities(graph: GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if _operator(node) in IDENTITIES and isinstance(node.args[0], Node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _fold(graph: GraphModule, norm: Node) -> None:
    factor, offset = _affine(graph, norm)
    layer = norm.args[0]
    assert isinstance(layer, Node)
    if _takes(graph, layer, norm):
        weight = _constant(graph, layer.args[1])
        shape = [-1] + [1] * (weight.dim() - 1)
        shift = offset
        if len(layer.args) > 2 and layer.args[2] is not None:
            shift = offset + _constant(graph, layer.args[2]).double() * factor
        name = str(layer.args[1].target)  # type: ignore[union-attr]
        _set_layer(graph, layer, name, weight.double() * factor.reshape(shape), shift)
        layer.meta["val"] = norm.meta.get("val")
        norm.replace_all_uses_with(layer)
        graph.graph.erase_node(norm)
    else:
        _as_convolution(graph, norm, factor, offset)


def _takes(graph: GraphModule, layer: Node, norm: Node) -> bool:
    """Whether the batch norm may be folded into what comes before it."""
    name = _operator(layer)
    value = layer.meta.get("val")
    fits = name in ("conv1d", "conv2d", "conv3d") or (name == "linear" and value.dim() == 2)
    if not fits or list(layer.users) != [norm]:
        return False
    constants = [a for a in layer.args[1:3] if a is not None]
    return all(isinstance(a, Node) and a.op == "get_attr" for a in constants)


def _affine(graph: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """An evaluating batch norm as `factor · x + offset`, float64 (channels,)."""
    _, weight, bias, mean, variance, _, _, eps = norm.args[:8]
    mean, variance = _constant(graph, mean), _constant(graph, variance)
    factor = (variance.double() + eps).rsqrt()  # type: ignore[operator]
    if weight is not None:
        factor = factor * _constant(graph, weight).double()
    offset = -mean.double() * factor
    if bias is not None:
        offset = offset + _constant(graph, bias).double()
    return factor, offset


def _as_convolution(graph: GraphModule, norm: Node, factor: Tensor, offset: Tensor) -> None:
    """One weight a channel, which its grid holds exactly; plain arithmetic on (N, channels)."""
    spatial = norm.meta["val"].dim() - 2
    if not spatial:
        _as_arithmetic(graph, norm, factor, offset)
        return
    source = norm.args[0]
    convolve = getattr(torch.ops.aten, f"conv{spatial}d").default
    one, none = [1] * spatial, [0] * spatial
    with graph.graph.inserting_before(norm):
        layer = graph.graph.call_function(
            convolve, (source, None, None, one, none, one, len(factor))
        )
    layer.meta = dict(norm.meta)
    name = str(norm.args[3].target).rpartition(".")[0] + ".weight"  # type: ignore[union-attr]
    _set_layer(graph, layer, name, factor.reshape(-1, 1, *one), offset)
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)


def _as_arithmetic(graph: GraphModule, norm: Node, factor: Tensor, offset: Tensor) -> None:
    result = norm.args[0]
    for tensor, target in ((factor, torch.ops.aten.mul), (offset, torch.ops.aten.add)):
        constant = _own_constant(graph, norm, f"{norm.name}_{target.__name__}", tensor)
        with graph.graph.inserting_before(norm):
            result = graph.graph.call_function(target.Tensor, (result, constant))
        result.meta = dict(norm.meta)
    norm.replace_all_uses_with(result)
    graph.graph.erase_node(norm)


def _set_layer(graph: GraphModule, layer: Node, name: str, weight: Tensor, bias: Tensor) -> None:
    """Gives a layer constants of its own: another layer may read the old ones."""
    weight_node = _own_constant(graph, layer, f"{name}_{layer.name}_weight", weight)
    bias_node = _own_constant(graph, layer, f"{name}_{layer.name}_bias", bias)
    layer.args = (layer.args[0], weight_node, bias_node, *layer.args[3:])


def _own_constant(graph: GraphModule, before: Node, name: str, tensor: Tensor) -> Node:
    name, tensor = name.replace(".", "_"), tensor.float()
    graph.register_buffer(name, tensor)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(name)
    node.meta["val"] = before.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
    return node


def _constant(graph: GraphModule, node: Any) -> Tensor:
    tensor: Any = graph
    for part in str(node.target).split("."):
        tensor = getattr(tensor, part)
    return tensor.detach()
