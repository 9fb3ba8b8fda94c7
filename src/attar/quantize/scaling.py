"""Where a network's channels may be scaled without changing what it computes: made smaller by one
layer, and larger again by all that read them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from attar.errors import ConstraintBroken, UsageError
from attar.quantize.graph import FOLDABLE
from attar.runtimes.aten import argument, constant, is_constant, module_path, operator, rank
from attar.student import Student

PASSES = {
    "relu", "leaky_relu", "prelu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "clone", "contiguous",
}  # fmt: skip
"""Give `c·f(x)` for `c·x`, c > 0, channel by channel."""
CLIPS = {"relu6": 6.0, "hardtanh": None}
NORMS = {"layer_norm", "rms_norm", "mul"}
"""Multiply each feature by a parameter."""
TOLERANCE = 1e-3
"""How far answers may move by rounding, as a share of the largest."""


@dataclass(frozen=True)
class Reader:
    """A layer whose input channels can be multiplied.

    weight: its parameter's path. repeat: neighbouring inputs that belong to one channel (a
    flattened image's). source, channel: what it reads, and along which dimension.
    """

    layer: Node
    weight: str
    repeat: int
    source: Node
    channel: int


@dataclass(frozen=True)
class Clip:
    """A ReLU that clips from above too: exact only where values stay below `limit`."""

    source: Node
    channel: int
    limit: float


@dataclass(frozen=True)
class Link:
    """Channels that one layer makes and others read.

    maker: a convolution, linear layer, or norm. norm: its batch norm. divided: the parameters whose
    first dimension is these channels, divided by the factors.
    """

    name: str
    maker: Node
    norm: Node | None
    divided: tuple[str, ...]
    readers: tuple[Reader, ...]
    clips: tuple[Clip, ...]


def links(graph: GraphModule, module: nn.Module, fixed: Collection[str]) -> list[Link]:
    """The links of a traced graph (`attar.quantize.graph.trace`), in order.

    fixed: parameters that must not be scaled. Nor are those that the graph reads twice, or that
    aren't the network's own parameters (a weight that is computed).
    """
    reads = Counter(
        constant(graph, node).data_ptr()
        for node in graph.graph.nodes
        if is_constant(node)
        for _ in node.users
    )
    own = dict(module.named_parameters(remove_duplicate=False))

    def free(node: Any) -> bool:
        return (
            is_constant(node)
            and node.target in own
            and node.target not in fixed
            and reads[constant(graph, node).data_ptr()] == 1
        )

    found = (_link(node, free) for node in graph.graph.nodes)
    return [link for link in found if link is not None]


def _link(maker: Node, free: Callable[[Any], bool]) -> Link | None:
    made = _made(maker)
    if made is None:
        return None
    end, channel, constants = made
    constants = [c for c in constants if c is not None]
    followed = _followed(end, channel, 1)
    if followed is None or not all(map(free, constants)):
        return None
    readers, clips = followed
    if not readers or not all(free(argument(r.layer, 1)) for r in readers):
        return None
    divided = tuple(str(c.target) for c in constants)
    name = module_path(maker) or divided[0]
    return Link(name, maker, end if end is not maker else None, divided, readers, clips)


def _made(node: Node) -> tuple[Node, int, list[Any]] | None:
    """Where the channels that a node makes come out, along which dimension, and what scales them;
    `None` for a node that makes none."""
    name = operator(node)
    if name in FOLDABLE:
        users = list(node.users)
        channel = rank(node) - 1 if name == "linear" else 1
        normed = len(users) == 1 and operator(users[0]) == "batch_norm"
        if normed and channel == 1:
            norm = users[0]
            # Without an affine there is nothing after the normalisation that could be scaled.
            return (norm, 1, [argument(norm, 1), argument(norm, 2)]) if argument(norm, 1) else None
        return node, channel, [argument(node, 1), argument(node, 2)]
    if name not in NORMS:
        return None
    places = (0, 1) if name == "mul" else (2,)
    factors = [argument(node, place) for place in places if is_constant(argument(node, place))]
    if len(factors) != 1 or rank(node) < 2 or not _is_by_feature(factors[0], node):
        return None
    return node, rank(node) - 1, [*factors, argument(node, 3) if name == "layer_norm" else None]


def _is_by_feature(factor: Node, node: Node) -> bool:
    return list(factor.meta["val"].shape) == list(node.meta["val"].shape[-1:])


def _followed(
    node: Node, channel: int, repeat: int
) -> tuple[tuple[Reader, ...], tuple[Clip, ...]] | None:
    """All that reads these channels in the end; `None` where something does that scaling would
    change."""
    readers: list[Reader] = []
    clips: list[Clip] = []
    for user in node.users:
        if _reads(user, node, channel):
            readers.append(Reader(user, str(argument(user, 1).target), repeat, node, channel))
            continue
        passed = _passed(user, node, channel)
        if passed is None:
            return None
        limit = _limit(user)
        if limit is not None:
            clips.append(Clip(node, channel, limit))
        further = _followed(user, passed[0], repeat * passed[1])
        if further is None:
            return None
        readers.extend(further[0])
        clips.extend(further[1])
    return tuple(readers), tuple(clips)


def _reads(user: Node, source: Node, channel: int) -> bool:
    """Whether a layer reads these channels as its input channels, and as nothing else."""
    at = rank(source) - 1 if operator(user) == "linear" else 1
    reads = operator(user) in FOLDABLE and argument(user) is source and channel == at
    return reads and is_constant(argument(user, 1))


def _passed(user: Node, source: Node, channel: int) -> tuple[int, int] | None:
    """Where the channels are after an operator that scaling passes, and how many neighbours each
    has become; `None` for any other."""
    name = operator(user)
    dims = rank(source)
    if argument(user) is not source:
        return None
    if name in PASSES or _limit(user) is not None:
        return channel, 1
    if name == "mean" and isinstance(argument(user, 1), (list, tuple)):
        over = {d % dims for d in argument(user, 1)}
        return (channel, 1) if min(over) > channel else None
    if name == "transpose":
        one, other = (argument(user, i) % dims for i in (1, 2))
        return {one: other, other: one}.get(channel, channel), 1
    if name == "flatten" and channel == 1 and argument(user, 1, 0) == 1 and rank(user) == 2:
        sides = source.meta["val"].shape[2:]
        return (1, int(sides.numel())) if all(isinstance(s, int) for s in sides) else None
    return None


def _limit(node: Node) -> float | None:
    """Where a ReLU clips from above; `None` for what is no such ReLU."""
    if operator(node) == "hardtanh":
        return float(argument(node, 2, 1.0)) if argument(node, 1, -1.0) == 0 else None
    return CLIPS.get(operator(node))


def input_peaks(weight: Tensor, groups: int, repeat: int) -> Tensor:
    """The largest magnitude of a reader's weights by the channel they read, (channels,).

    weight: (out, in/groups, *kernel).

    Example:
        >>> input_peaks(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), groups=1, repeat=1).tolist()
        [2.0, 3.0]
    """
    inputs = weight.shape[1]
    split = weight.detach().abs().reshape(groups, -1, inputs, weight[0, 0].numel())
    return split.amax((1, 3)).reshape(-1, repeat).amax(1)


def groups_of(layer: Node) -> int:
    """A layer's groups; one for a linear layer."""
    return 1 if operator(layer) == "linear" else int(argument(layer, 6, 1))


def scale(module: nn.Module, link: Link, factors: Tensor) -> None:
    """Divides a link's channels by the factors, (channels,), and has their readers multiply."""
    with torch.no_grad():
        for path in link.divided:
            parameter = module.get_parameter(path)
            parameter.div_(_along_first(factors.to(parameter), parameter))
        for reader in link.readers:
            weight = module.get_parameter(reader.weight)
            groups, inputs = groups_of(reader.layer), weight.shape[1]
            each = factors.repeat_interleave(reader.repeat).to(weight).reshape(groups, 1, inputs)
            each = each.expand(groups, len(weight) // groups, inputs).reshape(-1, inputs)
            weight.mul_(each.reshape(*each.shape, *[1] * (weight.dim() - 2)))


def _along_first(factors: Tensor, parameter: Tensor) -> Tensor:
    return factors.reshape(-1, *[1] * (parameter.dim() - 1))


def peaks(
    graph: GraphModule,
    examples: Iterable[tuple[Any, ...]],
    wanted: Mapping[Node, int],
    *,
    signed: bool = False,
) -> dict[Node, Tensor]:
    """The largest magnitude (or value, `signed`) that nodes take over the examples, by channel.

    wanted: the dimension of the channels by node.
    """
    watching = _Peaks(graph, wanted, signed)
    with torch.no_grad():
        for arguments in examples:
            watching.run(*arguments)
    return watching.found


class _Peaks(Interpreter):
    def __init__(self, graph: GraphModule, wanted: Mapping[Node, int], signed: bool) -> None:
        super().__init__(graph)
        self.found: dict[Node, Tensor] = {}
        self._wanted, self._signed = wanted, signed

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._wanted:
            kept = value if self._signed else value.abs()
            peak = kept.transpose(0, self._wanted[n]).flatten(1).amax(1)
            self.found[n] = torch.maximum(self.found.get(n, peak), peak)
        return value


def scale_all(
    student: Student,
    graph: GraphModule,
    chosen: list[tuple[Link, Tensor]],
    probe: tuple[Any, ...],
) -> list[str]:
    """Scales links by their factors, in place, held against the traced graph's answers to `probe`
    and the student's promises. Where these break, links are tried one at a time, and those at which
    they do are undone: their names are returned."""
    with torch.no_grad():
        expected = graph(*probe)
    if _scaled(student, expected, chosen, probe):
        return []
    return [
        link.name
        for link, factors in chosen
        if not _scaled(student, expected, [(link, factors)], probe)
    ]


def _scaled(
    student: Student, expected: Any, chosen: list[tuple[Link, Tensor]], probe: tuple[Any, ...]
) -> bool:
    """Scales links, and undoes it unless the network answers as before."""
    before = weights_of(student.module, [link for link, _ in chosen])
    for link, factors in chosen:
        scale(student.module, link, factors)
    if _answers(student.module, expected, probe) and _keeps_promises(student):
        return True
    restore(student.module, before)
    return False


def weights_of(module: nn.Module, scaled: Iterable[Link]) -> dict[str, Tensor]:
    """Copies of the parameters that links scale, by path."""
    paths = {p for link in scaled for p in (*link.divided, *(r.weight for r in link.readers))}
    return {path: module.get_parameter(path).detach().clone() for path in sorted(paths)}


def restore(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts parameters back, in place."""
    with torch.no_grad():
        for path, weight in weights.items():
            module.get_parameter(path).copy_(weight)


def _answers(module: nn.Module, expected: Any, probe: tuple[Any, ...]) -> bool:
    network = copy.deepcopy(module).cpu().eval()
    with torch.no_grad():
        answers = network(*probe)
    pairs = zip(pytree.tree_leaves(answers), pytree.tree_leaves(expected), strict=True)
    return all(
        bool((new - old).abs().max() <= TOLERANCE * old.abs().max())
        for new, old in pairs
        if isinstance(old, Tensor) and old.numel()
    )


def _keeps_promises(student: Student) -> bool:
    try:
        student.check()
    except ConstraintBroken:
        return False
    return True


def refuse_quantized(student: Student, what: str) -> None:
    """Raises `UsageError` for a student whose grids a change of its weights would not fit."""
    if student.find("quantized"):
        raise UsageError(f"{what} changes the weights: do it before the student is quantized")
