"""Running a network's exported graph on labels, to find what must be pruned together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from attar.prune.exporting import paths_of, whole_program
from attar.prune.labels import NOTHING, Ties, main_dimension, stored, tidy, varying
from attar.prune.operators import LATE, SIZED, SPLITS, find_rule, name_of
from attar.prune.sources import Attribute, frames, sizes

Role = Literal["out", "in", "own", "attribute"]

_FOLLOWED = 1 << 21
"""Elements of the largest parameter that is followed one by one, where an activation needs that."""
OUTPUT = "its channels are the network's output"
_NONE = torch.tensor(NOTHING)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer where an operator takes it whole, or as many of its rows from `start`
    on as `shape` says."""

    path: str
    shape: torch.Size
    start: int = 0
    rows: int = 0

    def chunks(self, lengths: Iterable[int]) -> list[Weight]:
        """Its rows in parts of these lengths."""
        parts, start = [], self.start
        for n in lengths:
            parts.append(Weight(self.path, torch.Size([n, *self.shape[1:]]), start, self.rows))
            start += n
        return parts


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


@dataclass(frozen=True)
class Joint:
    """An operator that computes over channels of its first input: a mean, a norm.

    node: its name in the exported graph. dim: of the input. labels: along it, int64 (size,).
    """

    node: str
    dim: int
    labels: Tensor


class Trace:
    """Labels of every activation of a network, for one example.

    axes: by (path, dimension or attribute). elements: parameters used as activations, with the
    slot of each element. reasons: what keeps slots from being removed. reshapes: operators that
    give channels a new shape, which may be written into the code. joint: operators whose result
    depends on which channels there are. widths: where a reshape's size may have been read off the
    input of its module: the line, the input's channels and the reshape's. program: the exported
    graph; training: whether with branches that only run in training.

    Labels that a reshape spreads over several dimensions (a projection seen as heads and their
    units) stay so until an operator, or the end of the walk, decides along which of them they go:
    attention ties the units of a head, a shuffle's groups stay equal.
    """

    def __init__(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        self.module = module
        self.ties = Ties()
        self.axes: dict[tuple[str, int | str], Axis] = {}
        self.elements: dict[str, Tensor] = {}
        self.reasons: list[tuple[Tensor, str]] = []
        self.reshapes: list[tuple[Tensor, str]] = []
        self.joint: list[Joint] = []
        self.widths: list[tuple[str, Tensor, Tensor]] = []
        self._inputs: dict[str, Tensor] = {}
        self._values: dict[Node, Any] = {}
        self._constant: set[Node] = set()
        self._undecided: dict[Node, list[Tensor]] = {}
        self._shaped: list[tuple[Node, Tensor]] = []
        self._cuts: list[tuple[Node, Tensor, int, list[range]]] = []
        self.program, self.training = whole_program(module, example)
        program = self.program
        signature = program.graph_signature
        self._stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._user_inputs = set(signature.user_inputs)
        with torch.no_grad():
            for node in program.graph.nodes:
                self._visit(node)
        self._decide()
        self._count_by_attributes()
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

    def along(self, weight: Weight, d: int, role: Role) -> Tensor:
        """The slots of a weight's dimension, int64 (weight.shape[d],)."""
        if d:
            return self.axis(weight.path, d, weight.shape[d], role)
        whole = self.axis(weight.path, 0, weight.rows, role)
        return whole[weight.start : weight.start + weight.shape[0]]

    def weight(self, value: Any) -> Weight | None:
        """A stored weight, or `None` for one that is computed."""
        return value if isinstance(value, Weight) else None

    def producer(self, weight: Weight, d: int, bias: Any) -> Tensor:
        """New channels made by dimension `d` of a weight, its bias with them."""
        out = self.along(weight, d, "out")
        if bias is not None:
            self.follow(bias, 0, out)
        return out

    def follow(self, value: Any, d: int, channels: Tensor) -> None:
        """Ties a parameter's dimension to channels whose own it is."""
        if isinstance(value, Weight):
            self.ties.tie(self.along(value, d, "own"), channels)
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

    def whole(self, x: Tensor, dims: Iterable[int], node: Node, why: str) -> Tensor:
        """Labels after an operator that needs these dimensions as they are: channels that also
        change along others are tied along these; those that don't can't be removed."""
        dims = [d for d in varying(tidy(x)) if d in {d % x.dim() for d in dims}]
        if not dims:
            return x
        if len(varying(tidy(x))) == len(dims):
            self.freeze(x, node, why)
            return x
        once = stored(tidy(x))
        settled = once.amax(dim=dims, keepdim=True)
        self.ties.tie(once, settled)
        self._replace(x, settled.expand(x.shape), node)
        return settled.expand(x.shape)

    def _replace(self, labels: Tensor, by: Tensor, node: Node) -> None:
        """Gives all who read these labels, under whatever name, those that ties made of them."""
        for n in {*node.all_input_nodes, *self._undecided}:
            value = self._values[n]
            if isinstance(value, Tensor) and _same(value, labels):
                self._values[n] = by

    def over(self, x: Tensor, d: int, node: Node) -> Tensor:
        """Remembers an operator that computes over channels, the only ones its input has; gives
        one label each along `d`, int64 (size,)."""
        channels = self.channels(x, d)
        self.joint.append(Joint(node.name, d, channels))
        return channels

    def freeze(self, labels: Tensor, node: Node, why: str) -> None:
        """Keeps channels from being removed, because of what an operator does with them."""
        self._freeze(labels, f"{self.describe(node)} {why}")

    def counted(self, node: Node, path: str, attribute: str, count: int) -> Tensor:
        """The slots of an integer attribute that says `count`, int64 (count,): it falls as they are
        removed. Where a module has no such attribute, they stay."""
        if getattr(self.module.get_submodule(path), attribute, None) == count:
            return self.axis(path, attribute, count, "attribute")
        return self.frozen_labels(node, f"counts {count} channels by a fixed number", count)

    def cut(self, node: Node, labels: Tensor, d: int, places: list[range]) -> None:
        """Remembers that an operator counts off these places of dimension `d`, if channels lie
        along it: what their sizes are taken from is found when all ties are known."""
        if d % labels.dim() in varying(tidy(labels)):
            self._cuts.append((node, labels, d % labels.dim(), places))

    def reshaped(self, labels: Tensor, node: Node) -> None:
        """Remembers that these channels get a new shape here."""
        if varying(tidy(labels)):
            self.reshapes.append((torch.unique(stored(labels)), self.describe(node)))

    def frozen_labels(self, node: Node, why: str, size: int) -> Tensor:
        """New labels that can't be removed, int64 (size,)."""
        return self._frozen(size, f"{self.describe(node)} {why}")

    def opaque(self, node: Node, inputs: list[Tensor], why: str) -> Any:
        """The result of an operator that needs its inputs, and is needed, whole."""
        for labels in inputs:
            self.freeze(labels, node, why)
        if not any(bool((stored(i) >= 0).any()) for i in inputs):
            return self.each(node, lambda shape: _NONE.expand(shape))
        label = self.frozen_labels(node, why, 1)[0]
        return self.each(node, lambda shape: label.expand(shape))

    def run(self, node: Node) -> Any:
        """The node's own operator on its inputs' labels."""
        try:
            return self._apply(node, lambda n: _each_tensor(self.labels(n), Tensor.detach))
        except RuntimeError:  # a view that labels stored once for many elements don't have
            return self._apply(node, lambda n: _each_tensor(self.labels(n), Tensor.contiguous))

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
        return paths_of(node)[-1]

    def owner(self, weight: Weight) -> str:
        """The path of the module that holds a weight."""
        return weight.path.rpartition(".")[0]

    def describe(self, node: Node) -> str:
        """An operator for people: its name, module and line."""
        path, line = self.module_path(node), self.line(node)
        where = f" in {path}" if path else ""
        return name_of(node.target) + where + (f" ({line})" if line else "")

    def line(self, node: Node) -> str:
        """The file and line that an operator was written in: `model.py:12`; may be empty."""
        found = frames(node)
        return f"{Path(found[0].file).name}:{found[0].line}" if found else ""

    # --- the walk ---------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self._values[node] = self._placeholder(node)
        elif node.op == "output":
            for labels in _tensors(map_arg(node.args, self.labels)):
                self._freeze(labels, OUTPUT)
        elif node.op == "call_function":
            if node.all_input_nodes and self._constant.issuperset(node.all_input_nodes):
                self._constant.add(node)
            self._note_inputs(node)
            self._values[node] = self._settled(node, self._call(node))
        else:
            self._values[node] = None

    def _note_inputs(self, node: Node) -> None:
        """Keeps the first activation that each module reads."""
        given = [x for n in node.all_input_nodes for x in _tensors(self._values[n])]
        for path in paths_of(node) if given else ():
            self._inputs.setdefault(path, given[0])

    def _settled(self, node: Node, result: Any) -> Any:
        """A node's labels with one dimension to change along, or with several that wait."""
        name = name_of(node.target)
        if name in SIZED:
            self._shaped += [(node, labels) for labels in _tensors(result)]
        if node in self._constant:
            return _each_tensor(result, tidy)
        late = name in LATE and any(n in self._undecided for n in node.all_input_nodes)
        if not (late or name in SPLITS):
            return _each_tensor(result, self.settle)
        result = _each_tensor(result, tidy)
        waiting = [labels for labels in _tensors(result) if len(varying(labels)) > 1]
        if waiting:
            self._undecided[node] = waiting
        return result

    def _decide(self) -> None:
        """Settles what is still spread over several dimensions, as ties have it by now."""
        first = self.ties.representatives()
        for labels in [labels for waiting in self._undecided.values() for labels in waiting]:
            now = tidy(_mapped(first, labels))
            if len(varying(now)) > 1:
                self.settle(now)
                first = self.ties.representatives()

    def _count_by_attributes(self) -> None:
        """Ties the attributes that sizes in the code are taken from to the channels they count; at
        a cut, what is counted by anything else stays."""
        first = self.ties.representatives()
        for node, labels in self._shaped:
            now = tidy(_mapped(first, labels))
            taken = self._taken(node, now)
            for d in varying(now):
                channels = self.channels(now, d)
                if d in taken:
                    self._count(taken[d], channels)
                else:
                    self._maybe_of_input(node, self.module_path(node), channels)
        for node, labels, d, places in self._cuts:
            now = tidy(_mapped(first, labels))
            if d in varying(now):
                self._count_pieces(node, self.channels(now, d), places)

    def _taken(self, node: Node, result: Tensor) -> dict[int, Attribute]:
        """The attributes that the sizes of a result are taken from, by dimension."""
        given, start = [*result.shape], 0
        arguments = self._arguments(node)
        if "sizes" in arguments:  # unflatten
            given = arguments["sizes"]
            start = arguments["dim"] % (result.dim() - len(given) + 1)
        elif "split_size" in arguments:
            given, start = [arguments["split_size"]], arguments["dim"] % result.dim()
        found = sizes(self.module, self.module_path(node), node, _called(node), given)
        return {
            start + i: a for i, a in enumerate(found) if a and a.value == result.shape[start + i]
        }

    def _count_pieces(self, node: Node, channels: Tensor, places: list[range]) -> None:
        lengths = [len(place) for place in places]
        taken = sizes(self.module, self.module_path(node), node, _called(node), lengths)
        for place, attribute in zip(places, taken, strict=True):
            piece = channels[place.start : place.stop]
            if attribute is None:
                self.freeze(piece, node, "cuts channels at a fixed place")
            else:
                self._count(attribute, piece)

    def _count(self, attribute: Attribute, channels: Tensor) -> None:
        axis = self.axis(attribute.path, attribute.name, len(channels), "attribute")
        self.ties.tie(axis, channels)

    def _maybe_of_input(self, node: Node, path: str, channels: Tensor) -> None:
        """Remembers that a size may have been read off the module's input, which is as wide."""
        x = self._inputs.get(path, _NONE)
        for d in varying(x):
            if x.shape[d] == len(channels):
                self.widths.append((self.line(node), self.channels(x, d), channels))

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
            rows = value.shape[0] if value.dim() else 1
            return Weight(self._stored[node.name], value.shape, rows=rows)
        return Constant(value.shape)

    def _call(self, node: Node) -> Any:
        rule = find_rule(node.target)
        if name_of(node.target) not in LATE:
            for n in node.all_input_nodes:
                if self._undecided.pop(n, None):
                    self._values[n] = _each_tensor(self._values[n], self.settle)
        if rule is None:
            inputs = [x for n in node.all_input_nodes for x in _tensors(self.labels(n))]
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
            name = name_of(node.target)
            whole = argument.name in (_WHOLE if name in _TAKES_WEIGHTS else _WHOLE_IN.get(name, ()))
            result[argument.name] = map_arg(
                value, self._values.__getitem__ if whole else self.labels
            )
        return result

    def labels(self, node: Node) -> Any:
        """A node's labels; a stored tensor used as an activation has a slot an element."""
        value = self._values[node]
        if isinstance(value, Constant):
            slots = self.ties.slots(value.shape.numel())
            self._freeze(slots, "its channels meet a constant of the code")
            return slots.view(value.shape) if len(slots) > 1 else _NONE.expand(value.shape)
        if isinstance(value, Weight):
            if value.shape.numel() > _FOLLOWED:
                why = f"{value.path} is used other than as a layer's weight, and large"
                return self._frozen(1, why)[0].expand(value.shape)
            if len(value.shape) == 1:
                return self.along(value, 0, "own")
            if value.path not in self.elements:
                shape = torch.Size([value.rows, *value.shape[1:]]) if value.shape else value.shape
                self.elements[value.path] = self.ties.slots(shape.numel()).view(shape)
            whole = self.elements[value.path]
            return whole[value.start : value.start + value.shape[0]] if value.shape else whole
        return value

    def _frozen(self, size: int, reason: str) -> Tensor:
        slots = self.ties.slots(size)
        self._freeze(slots, reason)
        return slots

    def _freeze(self, labels: Tensor, reason: str) -> None:
        known = torch.unique(stored(labels))
        self.reasons.append((known[known >= 0], reason))


_WHOLE = {"weight", "bias", "running_mean", "running_var"}
_WHOLE_IN = {"addmm": {"self", "mat2"}, "chunk": {"self"}}
_TAKES_WEIGHTS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "linear", "embedding", "batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm",
    "prelu",
}  # fmt: skip


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _called(node: Node) -> str:
    """An operator as it is written in code."""
    written = {"split_with_sizes": "split", "_unsafe_view": "view", "slice": ""}
    name = name_of(node.target)
    return written.get(name, name)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two label tensors are one."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _mapped(first: Tensor, labels: Tensor) -> Tensor:
    """Labels with each slot replaced by the first one of its atom."""
    once = stored(labels)
    return torch.where(once >= 0, first[once.clamp(min=0)], once).expand(labels.shape)


def _each_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return [_each_tensor(item, function) for item in value]
    return value
