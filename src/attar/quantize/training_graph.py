"""The graph that is exported, as something that can be trained: its constants are computed from
the live network, its grids are fake quantizers, and its inner layers have the network's names."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

from attar.quantize.calibration import channel_factors, look, settle
from attar.quantize.edit import Grids, Scheme
from attar.quantize.fake_quantizers import FakeBias, FakeQuantizer
from attar.quantize.graph import OUTPUT_OF, Tensors, folds, tensors_of
from attar.quantize.observers import Grid
from attar.quantize.pt2e import grids_of, prepare
from attar.runtimes.aten import argument, constant, is_constant, operator

Examples = Callable[[], Iterable[tuple[Any, ...]]]
"""Gives argument tuples, batch first: the same ones whenever it is called."""

LAYERS = "attar_layers"
ALIKE = 1e-3
"""How far a node's value may be from a layer's output, as a share of the largest, to be it."""


class TrainingGraph:
    """A network's quantized graph, computed from that network's parameters as they are.

    Batch norms are folded anew in every call, by the arithmetic of `capture`, with their running
    statistics as they are and never updated; dropout is gone. So gradients reach every parameter
    through the very graph that is exported.

    per_tensor: weights by path that share one grid over all their channels. learned: whether steps
    are. quantizers: what has them, to be registered with an objective. layers: a module whose
    submodules are called with the outputs of the network's layers, under the same paths. lost: the
    layers that run but whose output this graph doesn't have.
    Raises `ExportError` for a network that can't be traced, `DataError` without examples.
    """

    def __init__(
        self,
        network: nn.Module,
        scheme: Scheme,
        examples: Examples,
        *,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
        per_tensor: Collection[str] = (),
        learned: bool = True,
    ) -> None:
        self._observed = prepare(network, example, dynamic_shapes, scheme)
        self._folds = folds(self._observed)
        self._examples = (lambda: [example]) if scheme.all_float else examples
        self._per_tensor = frozenset(per_tensor)
        known = self._folds.keys() | tensors_of(network).keys()
        read = (str(n.target) for n in self._observed.graph.nodes if is_constant(n))
        self._read = [name for name in dict.fromkeys(read) if name in known]
        outputs, self.lost = _outputs(network, self._observed, example)
        self._look(network)
        self._fakes = {
            key: FakeQuantizer(grid, learned=learned, shared=_weight_of(key) in per_tensor)
            for key, grid in grids_of(self._observed).items()
        }
        self.quantizers = nn.ModuleList(self._fakes.values())
        self._graph, self.layers = self._trainable(), Passing()
        _tap(self._graph, self.layers, outputs)
        _drop_idle_relus(self._graph)
        self._device = torch.device("cpu")
        self._take(network)

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The graph's answer with the network's parameters."""
        tensors = tensors_of(network)
        constants = self._constants(tensors)
        self._follow(next(iter(constants.values())).device)
        self._fit(tensors, constants)
        return functional_call(self._graph, constants, args, kwargs, tie_weights=False)

    def calibrate(self, network: nn.Module) -> None:
        """Chooses every grid anew from the examples, and steps begin there."""
        self._look(network)
        self._take(network)

    def grids(self, network: nn.Module) -> Grids:
        """The grids as they are now, as `Quantized` keeps them."""
        tensors = tensors_of(network)
        self._follow(next(iter(tensors.values())).device)
        self._fit(tensors, self._constants(tensors))
        return {key: fake.grid() for key, fake in self._fakes.items()}

    def _constants(self, tensors: Tensors) -> dict[str, Tensor]:
        """What the graph's constants are, made of these tensors, by name."""
        return {
            name: self._folds[name](tensors).float() if name in self._folds else tensors[name]
            for name in self._read
        }

    def _look(self, network: nn.Module) -> None:
        """Lets the observers choose their grids, on the CPU."""
        tensors = {name: value.detach().cpu() for name, value in tensors_of(network).items()}
        constants = self._constants(tensors)
        for node in self._observed.graph.nodes:
            if is_constant(node) and str(node.target) in constants:
                constant(self._observed, node).copy_(constants[str(node.target)])
        for grid in grids_of(self._observed).values():
            grid.forget()
        look(self._observed, self._examples())
        settle(self._observed, {path: tensors[path] for path in self._per_tensor})

    def _take(self, network: nn.Module) -> None:
        tensors = tensors_of(network)
        self._follow(next(iter(tensors.values())).device)
        for grid in grids_of(self._observed).values():
            grid.fix(grid.scale.to(self._device), grid.zero_point.to(self._device))
        constants = self._constants(tensors)
        self._fold_steps(tensors, constants)
        for key, grid in grids_of(self._observed).items():
            self._fakes[key].take(grid)
        self._fit(tensors, constants)

    def _fit(self, tensors: Tensors, constants: Tensors) -> None:
        """Brings up to date what of the grids follows from the weights."""
        self._fold_steps(tensors, constants)
        for name, stands in self._standing():
            if isinstance(stands, FakeBias):
                stands.make_room(constants[name].detach())

    def _fold_steps(self, tensors: Tensors, constants: Tensors) -> None:
        """Lets steps, which are those of the network's own weights, follow their folding."""
        for name, stands in self._standing():
            if isinstance(stands, FakeBias) or not stands.per_channel:
                continue
            own, folded = tensors.get(_weight_of(stands.key)), constants[name].detach()
            if own is not None and own.shape == folded.shape:
                stands.factors = channel_factors(_largest(own.detach()), _largest(folded))

    def _standing(self) -> list[tuple[str, FakeQuantizer | FakeBias]]:
        """The names of the constants that lie on grids, and what stands there."""
        found = [(self._stands_at(node), node) for node in self._graph.graph.nodes]
        return [
            (str(argument(node).target), stands)
            for stands, node in found
            if stands is not None and is_constant(argument(node))
        ]

    def _stands_at(self, node: Node) -> FakeQuantizer | FakeBias | None:
        stands = self._graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return stands if isinstance(stands, FakeQuantizer | FakeBias) else None

    def _trainable(self) -> GraphModule:
        """The observed graph with fake quantizers for observers."""
        graph = copy.deepcopy(self._observed)
        for name, module in list(graph.named_modules(remove_duplicate=False)):
            if isinstance(module, Grid):
                graph.set_submodule(name, self._fakes[module.key])
            elif isinstance(module, DerivedObserverOrFakeQuantize):
                source, weight = (self._fakes[grid.key] for grid in module.obs_or_fqs)
                graph.set_submodule(name, FakeBias(source, weight))
        return graph

    def _follow(self, device: torch.device) -> None:
        """Moves the graph, and what it makes of its own, to where the network is."""
        if device == self._device:
            return
        self._device = device
        self._graph.to(device)
        for node in self._graph.graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": device}
        self._graph.recompile()


class Passing(nn.Module):
    """Hands a value on: a place for hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _weight_of(key: str) -> str:
    """The path of the weight whose grid has this key, where it is a layer's own; else nothing's."""
    return f"{key.partition(':')[0]}.weight" if key.endswith("/weight") else ""


def _largest(weight: Tensor) -> Tensor:
    return weight.abs().flatten(1).amax(1)


def _outputs(
    network: nn.Module, graph: GraphModule, example: tuple[Any, ...]
) -> tuple[list[tuple[str, str]], set[str]]:
    """Which nodes have the outputs of which layers: (path, node's name); and the paths of the
    layers that run but whose output no node has. Folding and moving operators change what a node
    computes, so that each is held against what the network computes."""
    wanted = _answers_of_layers(network, example)
    watch = _Watch(graph)
    with torch.no_grad():
        watch.run(*example)
    found: dict[str, tuple[str, str]] = {}
    for node in graph.graph.nodes:
        for call, path in node.meta.get(OUTPUT_OF, []):
            if any(_alike(watch.seen[node.name], value) for value in wanted.get(path, [])):
                found[call] = (path, node.name)
    calls = Counter(path for path, _ in found.values())
    whole = {path for path, values in wanted.items() if calls[path] == len(values)}
    return [(path, name) for path, name in found.values() if path in whole], wanted.keys() - whole


class _Watch(Interpreter):
    """Runs a graph and keeps the values of nodes that may be layers' outputs."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.meta.get(OUTPUT_OF):
            self.seen[n.name] = value
        return value


def _answers_of_layers(network: nn.Module, example: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """What each layer answers when the network is called with the example, call by call."""
    answers: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor):
                answers.setdefault(path, []).append(first.detach().clone())

        return hook

    still = copy.deepcopy(network).cpu().eval()
    for path, layer in still.named_modules():
        if path:
            layer.register_forward_hook(keep(path))
    with torch.no_grad():
        still(*example)
    return answers


def _alike(found: Any, wanted: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    reach = float(wanted.abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found.double(), wanted.double(), rtol=0, atol=ALIKE * max(reach, 1e-9))


def _tap(graph: GraphModule, layers: nn.Module, outputs: list[tuple[str, str]]) -> None:
    """Puts a place for hooks after each layer, on the values that the graph hands on."""
    nodes = {node.name: node for node in graph.graph.nodes}
    graph.add_module(LAYERS, layers)
    for path, name in sorted(outputs):
        owner = layers
        for part in path.split("."):
            if not hasattr(owner, part):
                owner.add_module(part, Passing())
            owner = getattr(owner, part)
        node = nodes[name]
        rounded = [u for u in node.users if u.op == "call_module"]
        source = rounded[0] if len(rounded) == 1 else node
        with graph.graph.inserting_after(source):
            graph.graph.call_module(f"{LAYERS}.{path}", (source,))
    graph.recompile()


def _drop_idle_relus(graph: GraphModule) -> None:
    """Takes out ReLUs whose values are next rounded to a grid from zero up: it clips them alike,
    values and gradients, and a CPU is spared two passes over each."""
    for node in list(graph.graph.nodes):
        if node.op != "call_module":
            continue
        relu, fake = argument(node), graph.get_submodule(str(node.target))
        if operator(relu) != "relu" or len(relu.users) > 1:
            continue
        if isinstance(fake, FakeQuantizer) and fake.starts_at_zero:
            node.args = (argument(relu),)
            graph.graph.erase_node(relu)
    graph.recompile()
