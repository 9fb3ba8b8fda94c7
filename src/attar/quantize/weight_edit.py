"""What the edits have in common that keep a network's weights on grids of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attar.errors import CheckpointError, UsageError
from attar.quantize.edit import changed_weights
from attar.quantize.graph import capture, factors
from attar.registry import near
from attar.runtimes.aten import argument, constant, forget_unused, is_constant, operator
from attar.student import Edit

READERS = {"linear": 1, "embedding": 0} | {
    f"{kind}{n}d": 1 for kind in ("conv", "conv_transpose") for n in (1, 2, 3)
}
"""By operator: which argument is the weight. (Transposed convolutions with a batch of any size are
`conv_transpose2d.input`, of the same name.)"""


@dataclass(frozen=True)
class Held:
    """A weight as a graph reads it.

    path: the parameter's. node: the graph's constant. own: the parameter, float32 on the CPU.
    factor: (rows, 1), what folding a batch norm has multiplied each row by.
    """

    path: str
    node: Node
    own: Tensor
    factor: Tensor


class WeightEdit(Edit):
    """Weights that are rounded when the graph is made, and stay as they were in the student.

    So the promise is that they are still those that the grids were made for. Grids are kept for the
    network's own weights; where a batch norm is folded into one, its factors scale the steps.

    weights: parameter paths. scales: by path, (rows, groups).
    """

    scheme_class: ClassVar[type[Any]]

    def __init__(
        self, scheme: Any, weights: Collection[str], scales: dict[str, Tensor], sha256: str
    ) -> None:
        self.scheme = scheme
        self.weights = tuple(weights)
        self.scales = scales
        self.weights_sha256 = sha256

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": asdict(self.scheme),
            "weights": list(self.weights),
            "weights_sha256": self.weights_sha256,
        }

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.scales)

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> WeightEdit:
        known = record["scheme"]
        scheme = cls.scheme_class(**{**known, "float_layers": tuple(known["float_layers"])})
        weights = [str(path) for path in record["weights"]]
        scales = {path: tensors[path] for path in weights if path in tensors}  # in their order
        edit = cls(scheme, weights, scales, str(record["weights_sha256"]))
        if edit.has_scales and (missing := set(weights) ^ set(tensors)):
            raise CheckpointError(f"the student's quantization lacks the scales of {min(missing)}")
        return edit

    @property
    def has_scales(self) -> bool:
        """Whether the weights lie on grids (halves don't)."""
        return True

    def check(self, module: nn.Module) -> list[str]:
        return changed_weights(module, self.weights_sha256)

    def graph(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
    ) -> nn.Module | None:
        """The traced network with its weights as they are stored.

        Raises `CheckpointError` when the network's graph is not the one that was quantized.
        """
        graph = capture(module, example, dynamic_shapes)
        found = {held.path for held in held_weights(graph, module)}
        if missing := set(self.weights) - found:
            raise CheckpointError(
                f"the network's graph is not the one that was quantized: it doesn't read "
                f"{min(missing)}; quantize the student again with the versions installed now"
            )
        for held in list(held_weights(graph, module)):
            if held.path in self.weights:
                self.store(graph, held)
        forget_unused(graph)
        return graph

    @abstractmethod
    def store(self, graph: GraphModule, held: Held) -> None:
        """Puts what is stored in a weight's stead."""

    def scale_of(self, held: Held) -> Tensor:
        """The steps of a weight as the graph reads it."""
        return self.scales[held.path] * held.factor


def held_weights(
    graph: GraphModule, module: nn.Module, readers: Mapping[str, int] = READERS
) -> Iterator[Held]:
    """The parameters that these operators read as they are, or times a batch norm's factors."""
    read = {
        argument(node, readers[operator(node)])
        for node in graph.graph.nodes
        if operator(node) in readers
    }
    for node in graph.graph.nodes:
        if node not in read or not is_constant(node):
            continue
        value = constant(graph, node)
        path, own = parameter_of(module, str(node.target))
        if own is not None and own.shape == value.shape and value.dim() > 1:
            factor = factors(graph).get(str(node.target), torch.ones(len(own)))
            yield Held(path, node, own, factor.float()[:, None])


def parameter_of(module: nn.Module, target: str) -> tuple[str, Tensor | None]:
    """A graph's constant in the network. A layer that is called twice, each time with a batch norm
    of its own, has constants named by its calls."""
    layer, _, name = target.rpartition(".")
    for path in (target, f"{layer.rpartition('.')[0]}.{name}"):
        try:
            return path, module.get_parameter(path).detach().cpu().float()
        except AttributeError:
            continue
    return target, None


def put(graph: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    """A new constant beside one that the graph has: `conv.weight` and `int4` make
    `conv.weight_int4`."""
    path, _, last = str(before.target).rpartition(".")
    graph.get_submodule(path).register_buffer(f"{last}_{name}", value)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(f"{before.target}_{name}")
    mode = before.meta["val"].fake_mode
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node


def refuse_unknown_layers(module: nn.Module, float_layers: Collection[str]) -> None:
    """Raises `UsageError` for a path that is no layer's."""
    paths = [path for path, _ in module.named_modules() if path]
    for layer in float_layers:
        if layer != "*" and layer not in paths:
            raise UsageError(
                f"float_layers: the student has no layer {layer!r}{near(layer, paths)}"
            )


def inside(path: str, layers: Collection[str]) -> bool:
    """Whether a parameter is one of these layers', or inside of one; `*` stands for all."""
    return any(layer == "*" or path.startswith(f"{layer}.") for layer in layers)
