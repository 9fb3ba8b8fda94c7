"""What each operator does to channels: one rule an operator, over label tensors.

A rule takes the trace, the node and the node's arguments by their schema names, with label tensors
where the operator takes activations and `Weight`s where it takes parameters; it returns the labels
of the result. An operator without a rule freezes the channels that reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from attar.prune.labels import NOTHING, stored, varying

if TYPE_CHECKING:
    from attar.prune.trace import Trace, Weight

Rule = Callable[["Trace", Node, dict[str, Any]], Any]
_COMPUTED = "has a weight that is computed, not stored"
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
    """Outputs are new channels; the weight's columns go with the input's last dimension."""
    weight = trace.weight(a["weight"])
    if weight is None:
        return trace.opaque(node, [a["input"]], _COMPUTED)
    x = trace.channels(a["input"], a["input"].dim() - 1)
    trace.ties.tie(trace.axis(weight.path, 1, len(x), "in"), x)
    out = trace.producer(weight, 0, a["bias"])
    shape = node.meta["val"].shape
    return _along(out, shape, len(shape) - 1)


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
    """Channels normalised by one another must all stay: without one, the others change."""
    shape = a["normalized_shape"]
    normalised = range(a["input"].dim() - len(shape), a["input"].dim())
    _keep_where_varying(trace, node, a["input"], normalised, "normalises channels by one another")
    return a["input"]


@rule("group_norm")
def group_norm(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Groups of one channel are channels by themselves; larger ones must stay whole."""
    x = trace.channels(a["input"], 1)
    if a["num_groups"] != len(x):
        _keep_where_varying(trace, node, a["input"], [1], "normalises channels by one another")
        return a["input"]
    for name in ("weight", "bias"):
        if a[name] is not None:
            trace.follow(a[name], 0, x)
    trace.ties.tie(trace.counted(node, trace.module_path(node), "num_groups", len(x)), x)
    return a["input"]


# --- what keeps channels as they are --------------------------------------------------------------


@rule(
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "contiguous", "clone",
    "to", "_to_copy", "type_as", "alias", "detach", "lift_fresh_copy", "lift_fresh", "hardswish",
    "relu6", "floor_divide", "masked_fill", "where", "rsub", "log_sigmoid", "celu", "mish",
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
    moving = {d for labels, _ in inputs for d in varying(labels)}
    result: Tensor | None = None
    for labels, repeated in sorted(inputs, key=lambda pair: len(varying(pair[0]))):
        if moving.intersection(repeated):
            if bool((labels >= 0).any()):
                trace.freeze(labels, node, "spreads one channel over several")
            continue
        if result is not None:
            trace.ties.tie(result, labels)
        result = labels if result is None else _filled(result, labels)
    return (
        trace.opaque(node, [v for v, _ in inputs], "crosses channels") if result is None else result
    )


def _filled(labels: Tensor, others: Tensor) -> Tensor:
    """The labels, and others' where they have none."""
    bare = labels < 0
    return torch.where(bare, others, labels) if bool(bare.any()) else labels


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


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "std", "var", "var_mean", "prod", "argmax",
    "linalg_vector_norm", "norm", "logsumexp", "any", "all",
)  # fmt: skip
def reduce(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine over positions; over channels, all of them count."""
    if "other" in a:  # max and min of two tensors
        return elementwise(trace, node, a)
    x = a["self"] if "self" in a else a["x"]
    given = a.get("dim")
    dims = range(x.dim()) if given in (None, []) else ([given] if isinstance(given, int) else given)
    dims = [d % max(x.dim(), 1) for d in dims]
    if set(dims) & set(varying(x)):
        return trace.opaque(node, [x], "reduces over channels")
    kept = _first(x, dims)
    if not a.get("keepdim", False):
        kept = kept.squeeze(dims)
    return trace.each(node, lambda shape: kept.expand(shape))


@rule("softmax", "log_softmax", "_softmax", "cumsum", "sort")
def along(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine along positions; along channels, all of them count."""
    _keep_where_varying(trace, node, a["self"], [a["dim"]], "weighs channels against one another")
    return trace.each(node, lambda shape: a["self"])


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
    _keep_where_varying(trace, node, a["self"], dims, "shifts channels by a fixed count")
    return trace.run(node)


@rule("slice", "select", "narrow", "index_select", "split_with_sizes", "gather")
def part(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Fine over positions; a part of the channels is cut at fixed places, so all must stay."""
    x = a["self"]
    if a["dim"] % x.dim() in varying(x) and trace.shapes(node) != [x.shape]:
        trace.freeze(x, node, "cuts channels at a fixed place")
    if any(isinstance(v, Tensor) and k != "self" for k, v in a.items()):
        return trace.each(node, lambda shape: _resized(trace, node, x, shape))
    return trace.run(node)


@rule("chunk", "split", "unbind", "tensor_split")
def pieces(trace: Trace, node: Node, a: dict[str, Any]) -> Any:
    """Equal pieces must stay equal: the same place in each goes together."""
    x, results = a["self"], trace.run(node)
    if a["dim"] % x.dim() in varying(x):
        if len({piece.shape for piece in results}) == 1:
            for piece in results[1:]:
                trace.ties.tie(results[0], piece)
        else:
            trace.freeze(x, node, "cuts channels at a fixed place")
    return results


@rule("index")
def index(trace: Trace, node: Node, a: dict[str, Any]) -> Tensor:
    """Fine where positions are picked by one index; picked channels must stay."""
    x = a["self"]
    picked = [d for d, i in enumerate(a["indices"]) if i is not None]
    shape = node.meta["val"].shape
    if set(picked) & set(varying(x)):
        return trace.opaque(node, [x], "picks channels by index")
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


def _keep_where_varying(trace: Trace, node: Node, x: Tensor, dims: Any, why: str) -> None:
    if {d % x.dim() for d in dims} & set(varying(x)):
        trace.freeze(x, node, why)
