"""Reading graphs of ATen operators, as `torch.export` makes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node


def operator(node: Node) -> str:
    """The operator's name without namespace and overload: `conv2d`; `""` for nodes that aren't."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "")


def argument(node: Node, place: int = 0, default: Any = None) -> Any:
    """A node's argument, with the loose type that graph code needs."""
    return node.args[place] if len(node.args) > place else default


def module_path(node: Node) -> str:
    """The path of the innermost module that a node was traced in; `""` for the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def rank(node: Node) -> int:
    """The number of dimensions of a node's value; 0 where it is no tensor."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def is_constant(node: Any) -> bool:
    """Whether a node reads a parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def constant(graph: GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a node reads."""
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()


def stable_names(model: GraphModule) -> dict[Node, str]:
    """What each node is called in terms that outlive the graph (see `OnnxRuntimeQuantizer`)."""
    names: dict[Node, str] = {}
    seen: dict[str, int] = {}
    for node in model.graph.nodes:
        name = f"{module_path(node)}:{operator(node) or node.op}"
        count = seen[name] = seen.get(name, -1) + 1
        names[node] = f"{name}.{count}" if count else name
    return names


def forget_unused(graph: GraphModule) -> None:
    """Drops, in place, the constants that no node reads: they would count as the graph's, and be
    exported too."""
    graph.graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for path, module in graph.named_modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name in [n for n in held if f"{path}.{n}".lstrip(".") not in used]:
                del held[name]
    graph.recompile()
