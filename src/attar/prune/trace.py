"""Running a network's exported graph on labels, to find what must be pruned together."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from attar.errors import ExportError
from attar.prune.labels import NOTHING, Ties, main_dimension, stored, tidy, varying
from attar.prune.operators import find_rule, name_of
from attar.training.evaluation import evaluating

Role = Literal["out", "in", "own", "attribute"]

OUTPUT = "its channels are the network's output"
_NONE = torch.tensor(NOTHING)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer where an operator takes it whole."""

    path: str
    shape: torch.Size


@dataclass(frozen=True)
class Constant:
    """A tensor of the code's own, which no removal can change."""

    shape: torch.Size


@dataclass(frozen=True)
class Axis:
    """Slots `start` to `start + size`: the indices of one dimension of a tensor, or the units of a
    module's integer attribute.

    path: of the parameter or buffer; for an attribute, of the module. at: dimension or attribute.
    role: `out` makes channels, `in` reads them, `own` is theirs (a norm's weight, a bias).
    """

    path: str
    at: int | str
    start: int
    size: int
    role: Role


class Trace:
    """Labels of every activation of a network, for one example.

    axes: by (path, dimension or attribute). elements: parameters used as activations, with the
    slot of each element. reasons: what keeps slots from being removed. reshapes: operators that
    give channels a new shape, which may be written into the code.
    """

    def __init__(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        self.module = module
        self.ties = Ties()
        self.axes: dict[tuple[str, int | str], Axis] = {}
        self.elements: dict[str, Tensor] = {}
        self.reasons: list[tuple[Tensor, str]] = []
        self.reshapes: list[tuple[Tensor, str]] = []
        self._values: dict[Node, Any] = {}
        self._constant: set[Node] = set()
        program = export(module, example)
        signature = program.graph_signature
        self._stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._user_inputs = set(signature.user_inputs)
        with torch.no_grad():
            for node in program.graph.nodes:
                self._visit(node)
        self._values.clear()

    # --- for rules --------------------------------------------------------------------------------

    def axis(self, path: str, at: int | str, size: int, role: Role) -> Tensor:
        """The slots of one axis, int64 (size,); the same ones however often it is used."""
        known = self.axes.get((path, at))
        if known is None:
            start = int(self.ties.slots(size)[0]) if size else self.ties.count
            known = self.axes[path, at] = Axis(path, at, start, size, role)
        elif role == "out" and known.role != "out":
            known = self.axes[path, at] = Axis(path, at, known.start, size, role)
        return torch.arange(known.start, known.start + known.size)

    def weight(self, value: Any) -> Weight | None:
        """A stored weight, or `None` for one that is computed."""
        return value if isinstance(value, Weight) else None

    def producer(self, weight: Weight, d: int, bias: Any) -> Tensor:
        """New channels made by dimension `d` of a weight, its bias with them."""
        out = self.axis(weight.path, d, weight.shape[d], "out")
        if bias is not None:
            self.follow(bias, 0, out)
        return out

    def follow(self, value: Any, d: int, channels: Tensor) -> None:
        """Ties a parameter's dimension to channels whose own it is."""
        if isinstance(value, Weight):
            self.ties.tie(self.axis(value.path, d, value.shape[d], "own"), channels)
        elif isinstance(value, Constant):
            self._freeze(channels, "a constant of the code is as wide as they are many")
        else:
            self.ties.tie(value, channels)

    def channels(self, x: Tensor, d: int) -> Tensor:
        """One label each along dimension `d`, int64 (size,): whatever shares an index is tied."""
        x = self.settle(x, keep=d)
        for other in range(x.dim()):
            if other != d:
                x = x.narrow(other, 0, 1)
        return x.reshape(-1)

    def settle(self, x: Tensor, keep: int | None = None) -> Tensor:
        """Labels that change along one dimension only, so that removing an atom leaves a tensor:
        along the others they are tied. `keep`: which; by default the one with most channels."""
        x = tidy(x)
        moving = varying(x)
        if keep is None:
            if len(moving) < 2:
                return x
            keep = main_dimension(x)
        rest = [d for d in moving if d != keep]
        if not rest:
            return x
        once = stored(x)
        settled = once.amax(dim=rest, keepdim=True)
        self.ties.tie(once, settled)
        return settled.expand(x.shape)

    def freeze(self, labels: Tensor, node: Node, why: str) -> None:
        """Keeps channels from being removed, because of what an operator does with them."""
        self._freeze(labels, f"{self.describe(node)} {why}")

    def counted(self, node: Node, path: str, attribute: str, count: int) -> Tensor:
        """The slots of an integer attribute that says `count`, int64 (count,): it falls as they are
        removed. Where a module has no such attribute, they stay."""
        if getattr(self.module.get_submodule(path), attribute, None) == count:
            return self.axis(path, attribute, count, "attribute")
        return self.frozen_labels(node, f"counts {count} channels by a fixed number", count)

    def reshaped(self, labels: Tensor, node: Node) -> None:
        """Remembers that these channels get a new shape here."""
        if varying(tidy(labels)):
            self.reshapes.append((torch.unique(stored(labels)), self.describe(node)))

    def frozen_labels(self, node: Node, why: str, size: int) -> Tensor:
        """New labels that can't be removed, int64 (size,)."""
        slots = self.ties.slots(size)
        self.freeze(slots, node, why)
        return slots

    def opaque(self, node: Node, inputs: list[Tensor], why: str) -> Any:
        """The result of an operator that needs its inputs, and is needed, whole."""
        for labels in inputs:
            self.freeze(labels, node, why)
        if node in self._constant and not any(bool((i >= 0).any()) for i in inputs):
            return self.each(node, lambda shape: _NONE.expand(shape))
        label = self.frozen_labels(node, why, 1)[0]
        return self.each(node, lambda shape: label.expand(shape))

    def run(self, node: Node) -> Any:
        """The node's own operator on its inputs' labels."""
        try:
            return self._apply(node, lambda n: _each_tensor(self._labels(n), Tensor.detach))
        except RuntimeError:  # a view that labels stored once for many elements don't have
            return self._apply(node, lambda n: _each_tensor(self._labels(n), Tensor.contiguous))

    def each(self, node: Node, make: Callable[[torch.Size], Tensor]) -> Any:
        """A label tensor for the node's result, or for each of its several results."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [make(v.shape) if isinstance(v, Tensor) else v for v in value]
        return make(value.shape) if isinstance(value, Tensor) else value

    def shapes(self, node: Node) -> list[torch.Size]:
        """The shapes of the node's results."""
        value = node.meta["val"]
        return [v.shape for v in (value if isinstance(value, (tuple, list)) else [value])]

    def activations(self, arguments: dict[str, Any]) -> list[Tensor]:
        """The label tensors among a node's arguments."""
        return [v for v in arguments.values() if isinstance(v, Tensor)]

    def module_path(self, node: Node) -> str:
        """The path of the innermost module that a node was written in."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0].split("@")[0] if stack else ""

    def owner(self, weight: Weight) -> str:
        """The path of the module that holds a weight."""
        return weight.path.rpartition(".")[0]

    def describe(self, node: Node) -> str:
        """An operator for people: its name, module and line."""
        path = self.module_path(node)
        lines = [
            line.strip()
            for line in (node.meta.get("stack_trace") or "").splitlines()
            if "File" in line
        ]
        own = [line for line in lines if "/torch/" not in line] or lines
        where = f" in {path}" if path else ""
        if own:
            file, _, rest = own[-1].removeprefix("File ").partition(", line ")
            where += f" ({file.strip(chr(34)).rpartition('/')[2]}:{rest.partition(',')[0]})"
        return name_of(node.target) + where

    # --- the walk ---------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self._values[node] = self._placeholder(node)
        elif node.op == "output":
            for labels in _tensors(map_arg(node.args, self._labels)):
                self._freeze(labels, OUTPUT)
        elif node.op == "call_function":
            if node.all_input_nodes and self._constant.issuperset(node.all_input_nodes):
                self._constant.add(node)
            result = self._call(node)
            raw = node in self._constant
            self._values[node] = _each_tensor(result, tidy if raw else self.settle)
        else:
            self._values[node] = None

    def _placeholder(self, node: Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        if node.name in self._user_inputs:
            label = self.ties.slots(1)
            self._freeze(label, "its channels are the network's input")
            return label[0].expand(value.shape)
        self._constant.add(node)
        if node.name in self._stored:
            return Weight(self._stored[node.name], value.shape)
        return Constant(value.shape)

    def _call(self, node: Node) -> Any:
        rule = find_rule(node.target)
        if rule is None:
            inputs = [x for n in node.all_input_nodes for x in _tensors(self._labels(n))]
            return self.opaque(node, inputs, "is an operator whose channels Attar can't follow")
        return rule(self, node, self._arguments(node))

    def _apply(self, node: Node, value: Callable[[Node], Any]) -> Any:
        assert callable(node.target)
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    def _arguments(self, node: Node) -> dict[str, Any]:
        """By schema name. Weights stay `Weight`s only where an operator takes a weight."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return {}
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        result = {}
        for argument in schema.arguments:
            value = given.get(argument.name, argument.default_value)
            whole = argument.name in _WHOLE and name_of(node.target) in _TAKES_WEIGHTS
            result[argument.name] = map_arg(
                value, self._values.__getitem__ if whole else self._labels
            )
        return result

    def _labels(self, node: Node) -> Any:
        """A node's labels; a stored tensor used as an activation has a slot an element."""
        value = self._values[node]
        if isinstance(value, Constant):
            slots = self.ties.slots(value.shape.numel())
            self._freeze(slots, "its channels meet a constant of the code")
            return slots.view(value.shape) if len(slots) > 1 else _NONE.expand(value.shape)
        if isinstance(value, Weight):
            if value.path not in self.elements:
                slots = self.ties.slots(value.shape.numel())
                self.elements[value.path] = slots.view(value.shape)
            return self.elements[value.path]
        return value

    def _freeze(self, labels: Tensor, reason: str) -> None:
        known = torch.unique(stored(labels))
        self.reasons.append((known[known >= 0], reason))


_WHOLE = {"weight", "bias", "running_mean", "running_var"}
_TAKES_WEIGHTS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "linear", "embedding", "batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm",
    "prelu",
}  # fmt: skip


def export(module: nn.Module, example: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The network's graph in eval mode, for one example. Raises `ExportError`."""
    try:
        with evaluating(module), torch.inference_mode(False), torch.no_grad():
            return torch.export.export(module, example, strict=False)
    except Exception as error:  # whatever the person's forward raises under tracing
        raise ExportError(
            f"the network's graph can't be read by torch.export, which stops at "
            f"{where_failed(error)}; its channels can't be pruned, but granularity: weight works"
        ) from None


def where_failed(error: Exception) -> str:
    """The line of the network's own code that failed, and what it said."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/attar/prune/" not in f.filename]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line} " if own else ""
    said = str(error).strip().splitlines()
    return f"{place}({said[0].strip() if said else type(error).__name__})"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _each_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return [_each_tensor(item, function) for item in value]
    return value
