"""What each operator does to channels: one rule an operator, over label tensors.

A rule takes the trace, the node and the node's arguments by their schema names, with label tensors
where the operator takes activations and `Weight`s where it takes parameters; it returns the labels
of the result. An operator without a rule freezes the channels that reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from attar.prune.labels import NOTHING, stored, tidy, varying

if TYPE_CHECKING:
    from attar.prune.trace import Trace, Weight

Rule = Callable[["Trace", Node, dict[str, Any]], Any]
SPLITS = {"view", "_unsafe_view", "reshape", "unflatten"}
"""Operators that may spread channels over several dimensions."""
SIZED = SPLITS | {"split"}
"""Operators whose sizes may be written into the code."""
LATE = SPLITS | {
    "view_as", "reshape_as", "flatten", "permute", "transpose", "t", "mT", "squeeze", "unsqueeze",
    "expand", "expand_as", "movedim", "swapaxes", "swapdims", "repeat_interleave", "stack", "cat",
    "select", "slice", "narrow", "split", "chunk", "unbind", "split_with_sizes", "getitem",
    "contiguous", "clone", "to", "_to_copy", "type_as", "dropout", "_assert_tensor_metadata", "mul",
    "add", "sub", "div", "neg", "pow", "rsqrt", "sqrt", "clamp_min", "relu", "linalg_vector_norm",
    "norm", "sum", "mean", "layer_norm", "rms_norm", "softmax", "_softmax", "masked_fill", "where",
    "scaled_dot_product_attention", "matmul", "bmm", "einsum",
}  # fmt: skip
"""Operators that take labels still spread over several dimensions."""
_REDUCED_JOINTLY = {"mean", "sum", "var", "std", "linalg_vector_norm"}
_ATTENDS = "weighs values by how queries fit keys"
_COMPUTED = "has a weight that is computed, not stored"
_JOINTLY = "normalises channels by one another"
rules: dict[str, Rule] = {}
"""By operator name without namespace, overload or in-place underscore: `relu`, `conv2d`."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for these operators."""

    def add(function: Rule) -> Rule:
        rules.update(dict.fromkeys(names, function))
        return function

    return add


def name_of(target: Any) -> str:
    """An operator's name without namespace, overload or in-place underscore."""
    schema = getattr(target, "_schema", None)
    name = schema.name.split("::")[-1] if schema else getattr(target, "__name__", str(target))
    return name.rstrip("_") if not name.startswith("_") else name


def find_rule(target: Any) -> Rule | None:
    """The rule for a node's target; pointwise operators are known by their tag."""
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return rules.get(name_of(target), elementwise)
    return rules.get(name_of(target))


# --- layers ---------------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Outputs are new channels; the weight's inputs go with the input's channels.

    Grouped: whole groups go where they are many and small (depthwise), else one channel of every
    group, so that groups stay equal.
    """
    weight = trace.weight(a["weight"])
    if weight is None:
        return trace.opaque(node, [a["input"]], _COMPUTED)
    x = trace.channels(a["input"], _channel_dim(a["input"], weight))
    out = trace.producer(weight, 0, a["bias"])
    groups = a["groups"]
    if groups == 1:
        trace.ties.tie(trace.axis(weight.path, 1, len(x), "in"), x)
    else:
        inputs, outputs = x.view(groups, -1), out.view(groups, -1)
        if inputs.shape[1] == 1 or groups >= max(inputs.shape[1], outputs.shape[1]):
            count = trace.counted(node, trace.owner(weight), "groups", groups)
            for rows in (inputs, outputs):
                trace.ties.tie(rows, count[:, None])
        else:
            trace.ties.tie(outputs, outputs[:1])
            trace.ties.tie(inputs, trace.axis(weight.path, 1, inputs.shape[1], "in"))
    return _along(out, node.meta["val"].shape, _channel_dim(node.meta["val"], weight))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """As a convolution, with the weight's first two dimensions exchanged."""
    weight = trace.weight(a["weight"])
    if weight is None or a["groups"] != 1:
        return trace.opaque(node, [a["input"]], "is grouped or has a computed weight")
    out = trace.producer(weight, 1, a["bias"])
    x = trace.channels(a["input"], _channel_dim(a["input"], weight))
    trace.ties.tie(trace.axis(weight.path, 0, len(x), "in"), x)
    return _along(out, node.meta["val"].shape, _channel_dim(node.meta["val"], weight))


@rule("linear")
def linear(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Outputs are new channels; the weight's columns go with the input's last dimension. Where
    channels lie along another, it mixes their positions, which all stay."""
    return _dense(trace, node, a["input"], a["weight"], a["bias"], inputs=1)


@rule("addmm")
def dense(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """A linear layer whose weight has its inputs first."""
    return _dense(trace, node, a["mat1"], a["mat2"], a["self"], inputs=0)


def _dense(trace: Trace, node: Node, x: Tensor, w: Any, bias: Any, inputs: int) -> Tensor:
    """x · W + b, with a weight that has its inputs along dimension `inputs`."""
    weight, shape = trace.weight(w), node.meta["val"].shape
    if weight is None:
        return trace.opaque(node, [x, *_labels_among(w, bias)], _COMPUTED)
    last = x.dim() - 1
    if varying(x) and last not in varying(x):
        return _first(x, [last]).expand(shape)
    channels = trace.channels(x, last)
    trace.ties.tie(trace.axis(weight.path, inputs, len(channels), "in"), channels)
    return _along(trace.producer(weight, 1 - inputs, bias), shape, len(shape) - 1)


def _labels_among(*values: Any) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


@rule("embedding")
def embedding(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """The embedding's width is new channels."""
    weight = trace.weight(a["weight"])
    if weight is None:
        return trace.opaque(node, [], _COMPUTED)
    shape = node.meta["val"].shape
    return _along(trace.producer(weight, 1, None), shape, len(shape) - 1)


@rule("batch_norm", "instance_norm")
def norm_per_channel(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Each channel is normalised by itself: its parameters go with it."""
    x = trace.channels(a["input"], 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            trace.follow(a[name], 0, x)
    return a["input"]


@rule("prelu")
def prelu(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """A slope a channel goes with its channel; one slope for all stays."""
    if a["weight"].shape[0] > 1:
        trace.follow(a["weight"], 0, trace.channels(a["self"], 1))
    return a["self"]


@rule("layer_norm", "rms_norm")
def norm_over_channels(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Channels are normalised by one another: those that stay, by those that stay. The width is
    written into the code where the norm has no parameters, and where it is over positions too."""
    x, width = a["input"], len(a["normalized_shape"])
    last = x.dim() - 1
    parameters = [a[name] for name in ("weight", "bias") if a.get(name) is not None]
    if width > 1 or varying(x) != [last] or not any(trace.weight(p) for p in parameters):
        return trace.whole(x, range(x.dim() - width, x.dim()), node, _JOINTLY)
    channels = trace.over(x, last, node)
    for parameter in parameters:
        trace.follow(parameter, 0, channels)
    return x


@rule("group_norm")
def group_norm(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Groups of one channel are channels by themselves, one group of all is a norm over them;
    others must stay whole."""
    if a["num_groups"] == 1 < a["input"].shape[1] and 1 in varying(a["input"]):
        x = trace.over(a["input"], 1, node)
        for name in ("weight", "bias"):
            if a[name] is not None:
                trace.follow(a[name], 0, x)
        return a["input"]
    x = trace.channels(a["input"], 1)
    if a["num_groups"] != len(x):
        return trace.whole(a["input"], [1], node, _JOINTLY)
    for name in ("weight", "bias"):
        if a[name] is not None:
            trace.follow(a[name], 0, x)
    trace.ties.tie(trace.counted(node, trace.module_path(node), "num_groups", len(x)), x)
    return a["input"]


# --- what keeps channels as they are --------------------------------------------------------------


@rule(
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "to", "_to_copy", "alias", "detach", "lift_fresh_copy", "lift_fresh", "hardswish",
    "relu6", "__and__", "__or__", "floor_divide", "masked_fill", "where", "rsub", "log_sigmoid",
    "celu", "mish",
)  # fmt: skip
def elementwise(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Channels that meet in one element are tied."""
    shape = node.meta["val"].shape
    inputs = [v for v in trace.activations(a) if v.dim() <= len(shape)]
    if not inputs:
        return nothing(trace, node, a)
    if len(inputs) == 1 and inputs[0].shape == shape:
        return inputs[0]
    return _meet(trace, node, [_broadcast(v, shape) for v in inputs])


def _meet(trace: Trace, node: Node, inputs: list[tuple[Tensor, list[int]]]) -> Tensor:
    """Ties operands of one shape, each with the dimensions it was repeated along to get it."""
    inputs = _beside_fixed(trace, node, inputs)
    moving = {d for labels, _ in inputs for d in varying(labels)}
    result: Tensor | None = None
    for labels, repeated in sorted(inputs, key=lambda pair: len(varying(pair[0]))):
        if moving.intersection(repeated):
            if bool((stored(labels) >= 0).any()):
                trace.freeze(labels, node, "spreads one channel over several")
            continue
        if result is not None:
            trace.ties.tie(result, labels)
        result = labels if result is None else _filled(result, labels)
    return (
        trace.opaque(node, [v for v, _ in inputs], "crosses channels") if result is None else result
    )


def _beside_fixed(
    trace: Trace, node: Node, inputs: list[tuple[Tensor, list[int]]]
) -> list[tuple[Tensor, list[int]]]:
    """Operands spread over several dimensions, tied along those in which another, that is repeated
    along the rest, has its own extent: a rotation of each head's units leaves heads free."""
    result = []
    for x, repeated in inputs:
        mine = varying(x)
        for labels, others in inputs if len(mine) > 1 else ():
            fixed = [d for d in mine if d not in others]
            if 0 < len(fixed) < len(mine) and bool((stored(labels) >= 0).any()):
                x = trace.whole(x, fixed, node, "meets what is as wide as they are many")
        result.append((x, repeated))
    return result


def _filled(labels: Tensor, others: Tensor) -> Tensor:
    """The labels, and others' where they have none."""
    bare = labels < 0
    return torch.where(bare, others, labels) if bool(bare.any()) else labels


@rule("type_as")
def as_it_is(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """The same elements; the other tensor says but their type."""
    kept: Tensor = a["self"]
    return kept


@rule("copy", "fill")
def write(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Writing channels into a part of another tensor ties both."""
    source = a.get("src", a.get("value"))
    if isinstance(source, Tensor) and bool((source >= 0).any()):
        return trace.opaque(node, [a["self"], source], "writes channels into another tensor")
    return a["self"]


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool2d_with_indices", "lp_pool2d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
def resize(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Height and width change, channels don't."""
    x = a["self"] if "self" in a else a["input"]
    return trace.each(node, lambda shape: _resized(trace, node, x, shape))


def _resized(trace: Trace, node: Node, x: Tensor, shape: torch.Size) -> Tensor:
    changed = [d for d in range(x.dim()) if x.shape[d] != shape[d]]
    if set(changed) & set(varying(x)):
        return trace.opaque(node, [x], "mixes channels with positions")
    return _first(x, changed).expand(shape)


@rule("im2col")
def unfold(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Each channel becomes as many rows as a window has places, one after the other."""
    x = trace.channels(a["self"], a["self"].dim() - 3)
    shape = node.meta["val"].shape
    return _along(x.repeat_interleave(shape[-2] // len(x)), shape, len(shape) - 2)


@rule("col2im")
def fold(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """The rows of a channel's window go together."""
    shape = node.meta["val"].shape
    rows = trace.channels(a["self"], a["self"].dim() - 2).view(shape[-3], -1)
    trace.ties.tie(rows, rows[:, :1])
    return _along(rows[:, 0], shape, len(shape) - 3)


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "std", "var", "var_mean", "prod", "argmax",
    "linalg_vector_norm", "norm", "logsumexp", "any", "all",
)  # fmt: skip
def reduce(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine over positions. A mean or a sum over all channels is one over those that stay; for
    others, all of them count."""
    if "other" in a:  # max and min of two tensors
        return elementwise(trace, node, a)
    x = a["self"] if "self" in a else a["x"]
    given = a.get("dim")
    dims = range(x.dim()) if given in (None, []) else ([given] if isinstance(given, int) else given)
    dims = [d % max(x.dim(), 1) for d in dims]
    if set(dims) & set(varying(x)):
        if name_of(node.target) in _REDUCED_JOINTLY and varying(x) == dims:
            trace.over(x, dims[0], node)
            return trace.each(node, lambda shape: torch.tensor(NOTHING).expand(shape))
        if len(varying(x)) == 1:
            return trace.opaque(node, [x], "reduces over channels")
        x = trace.whole(x, dims, node, "reduces over channels")
    kept = _first(x, dims)
    if not a.get("keepdim", False):
        kept = kept.squeeze(dims)
    return trace.each(node, lambda shape: kept.expand(shape))


@rule("softmax", "log_softmax", "_softmax", "cumsum", "sort")
def along(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine along positions; along channels, all of them count."""
    x = trace.whole(a["self"], [a["dim"]], node, "weighs channels against one another")
    return trace.each(node, lambda shape: x)


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Heads go whole, queries with their keys and values. The units of a head must stay: by their
    number the scores are scaled; those of a value may go where there is one head only."""
    q, k = (trace.whole(a[name], [-1, -2], node, _ATTENDS) for name in ("query", "key"))
    v = trace.whole(a["value"], [-2], node, _ATTENDS)
    if len(varying(v)) > 1:
        v = trace.whole(v, [-1], node, _ATTENDS)
    shape = node.meta["val"].shape
    heads = [_first(x, [x.dim() - 1, x.dim() - 2]) for x in (q, k)]
    if v.dim() - 1 not in varying(v):
        heads.append(_first(v, [v.dim() - 1, v.dim() - 2]))
    if a["attn_mask"] is not None and a["attn_mask"].dim() > 2:
        mask = trace.whole(a["attn_mask"], [-1, -2], node, _ATTENDS)
        heads.append(_first(mask, [mask.dim() - 1, mask.dim() - 2]))
    joined = heads[0]
    for other in heads[1:]:
        if other.shape[-3:-2] != joined.shape[-3:-2] and other.shape[-3] > 1:
            shared = other.repeat_interleave(joined.shape[-3] // other.shape[-3], dim=-3)
            trace.ties.tie(joined, shared)
        else:
            joined = _meet(trace, node, [_broadcast(x, joined.shape) for x in (joined, other)])
    return (
        _first(v, [v.dim() - 2]).expand(shape)
        if v.dim() - 1 in varying(v)
        else (joined.expand(shape))
    )


@rule("matmul", "bmm")
def product(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Rows of the first with columns of the second; in attention, heads with heads."""
    x, y = a["self"], a["other"] if "other" in a else a["mat2"]
    if x.dim() < 2 or y.dim() < 2:
        return trace.opaque(node, [x, y], "is a product whose channels Attar can't follow")
    return _contracted(
        trace, node, _letters(x, -1, "row", "inner"), _letters(y, -1, "inner", "column"),
        [*range(node.meta["val"].dim() - 2), "row", "column"],
    )  # fmt: skip


@rule("einsum")
def einsum(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """As a product, of two operands."""
    equation, operands = a["equation"].replace(" ", ""), list(a["tensors"])
    given, _, result = equation.partition("->")
    terms = given.split(",")
    plain = result and "." not in equation and all(len(set(t)) == len(t) for t in terms)
    if len(operands) != 2 or not plain:
        return trace.opaque(node, operands, "is a product whose channels Attar can't follow")
    (x, y), (of_x, of_y) = operands, terms
    return _contracted(trace, node, (x, list(of_x)), (y, list(of_y)), list(result))


Named = tuple[Tensor, list[Any]]
"""Labels with a name for each of their dimensions; equal names meet."""


def _letters(x: Tensor, d: int, row: str, column: str) -> Named:
    """A matrix' dimensions by name; those of the batch by their place from the right."""
    batch = x.dim() - 2
    return x, [*range(-batch, 0), row, column]


def _contracted(trace: Trace, node: Node, a: Named, b: Named, result: list[Any]) -> Tensor:
    """A sum of products over the names that the result lacks: along a shared name the operands are
    tied, along one summed over they end. Of the others only one operand's may be channels."""
    batch = len(result) - 2
    result = [n - batch if isinstance(n, int) else n for n in result]
    inner = {n for n in a[1] if n in b[1] and n not in result}
    tied = []
    for x, names in (a, b):
        summed = [d for d, n in enumerate(names) if n in inner]
        if len(varying(x)) > 1:
            x = trace.whole(x, summed, node, "sums over channels")
        alone = [d for d, n in enumerate(names) if n not in result and n not in inner]
        tied.append((trace.whole(x, alone, node, "sums over channels"), names))
    tied = [_by_shared(trace, node, tied[0], tied[1]), _by_shared(trace, node, tied[1], tied[0])]
    (x, of_x), (y, of_y) = tied
    every = [*dict.fromkeys([*of_x, *of_y])]
    sizes = {n: max(t.shape[m.index(n)] for t, m in tied if n in m) for n in every}
    wide = [_aligned(t, names, every, sizes) for t, names in tied]
    free = [{n for n in names if n not in other} for names, other in ((of_x, of_y), (of_y, of_x))]
    moves = [{every[d] for d in varying(tidy(t))} for t in wide]
    if (moves[0] & free[0] and moves[1]) or (moves[1] & free[1] and moves[0]):
        for labels in (x, y):
            trace.freeze(labels, node, "pairs channels with channels")
        return trace.each(node, lambda shape: torch.tensor(NOTHING).expand(shape))
    for i, names in enumerate((of_x, of_y)):
        if moves[1 - i] - set(names) and not moves[i] and bool((stored(wide[i]) >= 0).any()):
            trace.freeze(wide[i], node, "spreads one channel over several")
            wide[i] = torch.full_like(wide[i], NOTHING)
    trace.ties.tie(*wide)
    kept = _filled(*sorted(wide, key=lambda t: -len(varying(tidy(t)))))
    gone = [d for d, n in enumerate(every) if n not in result]
    kept = _first(tidy(kept), gone)
    if set(gone) & {d for t in wide for d in varying(tidy(t))}:
        kept = torch.full_like(kept, NOTHING)
    names = [n for n in every if n in result]
    kept = kept.squeeze(gone).permute([names.index(n) for n in result])
    return kept.expand(node.meta["val"].shape)


def _by_shared(trace: Trace, node: Node, one: Named, other: Named) -> Named:
    """An operand that moves along its own names and along shared ones: by the shared ones only,
    where the other operand has channels too."""
    x, names = one
    own = [d for d in varying(x) if names[d] not in other[1]]
    if own and len(own) < len(varying(x)) and varying(other[0]):
        x = trace.whole(x, own, node, "pairs channels with channels")
    return x, names


def _aligned(x: Tensor, names: list[Any], every: list[Any], sizes: dict[Any, int]) -> Tensor:
    """Labels with a dimension for every name, in their order."""
    mine = [n for n in every if n in names]
    x = x.permute([names.index(n) for n in mine])
    x = x.reshape([sizes[n] if n in mine and x.shape[mine.index(n)] > 1 else 1 for n in every])
    return x.expand([sizes[n] for n in every])


@rule(
    "zeros", "ones", "full", "empty", "arange", "scalar_tensor", "new_zeros", "new_ones",
    "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like", "linspace",
    "eye", "rand", "randn", "rand_like", "randn_like", "tril", "triu", "sym_size",
    "_assert_tensor_metadata",
)  # fmt: skip
def nothing(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """A constant belongs to no channel."""
    return trace.each(node, lambda shape: torch.tensor(NOTHING).expand(shape))


# --- what moves elements about --------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "unflatten", "expand")
def reshape(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """The operator itself, run on the labels; sizes written into the code are found out later."""
    trace.reshaped(a["self"], node)
    result: Tensor = trace.run(node)
    return result


@rule(
    "view_as", "reshape_as", "flatten", "permute",
    "transpose", "t", "numpy_T", "mT", "squeeze", "unsqueeze", "expand_as", "movedim",
    "swapaxes", "swapdims", "flip", "repeat", "tile", "repeat_interleave", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "stack", "cat", "concat", "atleast_2d", "broadcast_to",
    "moveaxis", "ravel", "unfold", "diagonal", "rot90",
)  # fmt: skip
def move(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """The operator itself, run on the labels."""
    return trace.run(node)


@rule("getitem")
def getitem(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """One of several results."""
    return trace.run(node)


@rule("roll")
def roll(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Fine over positions; rolling channels by a fixed count needs them all."""
    dims = a["dims"] or range(a["self"].dim())
    trace.whole(a["self"], dims, node, "shifts channels by a fixed count")
    return trace.run(node)


@rule("slice")
def slice_of(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Fine over positions; channels up to where it begins and ends are counted off."""
    x, d = a["self"], a["dim"]
    size = x.shape[d]
    bounds = [_within(b, size) for b in (a["start"], a["end"]) if b is not None]
    if a["step"] != 1:
        trace.whole(x, [d], node, "picks channels at fixed places")
    else:
        trace.cut(node, x, d, [range(0, b) for b in bounds if 0 < b < size])
    result: Tensor = trace.run(node)
    return result


def _within(bound: int, size: int) -> int:
    """A bound of a slice as a place from 0 to `size`."""
    return min(max(bound + size if bound < 0 else bound, 0), size)


@rule("split_with_sizes")
def split_by_sizes(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine over positions; the channels of each piece are counted off."""
    ends = [*accumulate(a["split_sizes"])]
    places = [range(e - n, e) for e, n in zip(ends, a["split_sizes"], strict=True)]
    trace.cut(node, a["self"], a["dim"], places)
    return trace.run(node)


@rule("select", "narrow", "index_select", "gather")
def part(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine over positions; a part of the channels is picked by number, so all must stay."""
    x = a["self"]
    if trace.shapes(node) != [x.shape]:
        trace.whole(x, [a["dim"]], node, "picks channels at fixed places")
    if any(isinstance(v, Tensor) and k != "self" for k, v in a.items()):
        return trace.each(node, lambda shape: _resized(trace, node, x, shape))
    return trace.run(node)


@rule("chunk")
def chunk(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """As equal pieces; a weight's rows in chunks are weights."""
    weight = trace.weight(a["self"])
    if weight is None or a["dim"] % len(weight.shape):
        return pieces(trace, node, {**a, "self": trace.labels(node.all_input_nodes[0])})
    parts = weight.chunks([shape[0] for shape in trace.shapes(node)])
    _tie_pieces(trace, [trace.along(part, 0, "own") for part in parts], 0)
    return parts


@rule("split", "unbind", "tensor_split")
def pieces(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Equal pieces must stay equal: the same place in each goes together. So too where the last of
    several chunks is shorter, whose size is rounded up."""
    x, results = a["self"], trace.run(node)
    d = a["dim"] % x.dim()
    if d not in varying(x):
        return results
    if name_of(node.target) == "tensor_split" and results[0].shape != results[-1].shape:
        trace.whole(x, [d], node, "cuts channels at a fixed place")
    else:
        _tie_pieces(trace, results, d)
    return results


def _tie_pieces(trace: Trace, parts: list[Tensor], d: int) -> None:
    """Ties pieces to the first; the last may be shorter along `d`."""
    for part in parts[1:]:
        same = part.shape == parts[0].shape
        trace.ties.tie(parts[0] if same else parts[0].narrow(d, 0, part.shape[d]), part)


@rule("index")
def index(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Fine where positions are picked by one index; picked channels must stay."""
    x = a["self"]
    picked = [d for d, i in enumerate(a["indices"]) if i is not None]
    shape = node.meta["val"].shape
    if set(varying(x)) and set(varying(x)) <= set(picked):
        return trace.opaque(node, [x], "picks channels by index")
    x = trace.whole(x, picked, node, "picks channels by index")
    if len(picked) != 1:
        labels = torch.unique(stored(x))
        if len(labels) == 1:
            return labels[0].expand(shape)
        return trace.opaque(node, [x], "picks by several indices")
    d = picked[0]
    kept = x.narrow(d, 0, 1)
    wide = len(shape) - x.dim() + 1
    return kept.reshape([*x.shape[:d], *[1] * wide, *x.shape[d + 1 :]]).expand(shape)


@rule("pad", "constant_pad_nd")
def pad(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Padded positions belong to the channel they border. Padded channels are counted by their
    module's attributes `before` and `after`, where it has them; else they stay."""
    x, amounts = a["self"], list(a["pad"])
    for d, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        x = _padded(trace, node, x, x.dim() - 1 - d, before, after)
    return x


def _padded(trace: Trace, node: Node, x: Tensor, d: int, before: int, after: int) -> Tensor:
    shape = [*x.shape]
    shape[d] += before + after
    if d not in varying(x):
        return _first(x, [d]).expand(shape)
    if not (before or after):
        return x
    if before < 0 or after < 0:
        trace.freeze(x, node, "crops channels by a fixed count")
        return trace.run(node)
    path = trace.module_path(node)
    parts = [
        _along(trace.counted(node, path, name, count), _with(x, d, count), d)
        for name, count in (("before", before), ("after", after))
    ]
    return torch.cat([parts[0], x, parts[1]], dim=d)


# --- helpers --------------------------------------------------------------------------------------


def _channel_dim(x: Tensor, weight: Weight) -> int:
    """Of a convolution's input or output: 1, or 0 without a batch."""
    return x.dim() - (len(weight.shape) - 1)


def _along(labels: Tensor, shape: Any, d: int) -> Tensor:
    """One label each along dimension `d` of a tensor of this shape."""
    return labels.view([-1 if i == d else 1 for i in range(len(shape))]).expand(shape)


def _first(x: Tensor, dims: Any) -> Tensor:
    """`x` narrowed to the first element of each of these dimensions."""
    for d in dims:
        x = x.narrow(d, 0, 1)
    return x


def _with(x: Tensor, d: int, size: int) -> list[int]:
    return [size if i == d else n for i, n in enumerate(x.shape)]


def _broadcast(labels: Tensor, shape: torch.Size) -> tuple[Tensor, list[int]]:
    """Labels in the full shape, and the dimensions they were repeated along to get there."""
    missing = len(shape) - labels.dim()
    full = labels.reshape([1] * missing + list(labels.shape)) if missing else labels
    repeated = [d for d in range(len(shape)) if full.shape[d] == 1 and shape[d] > 1]
    return full.expand(shape), repeated
