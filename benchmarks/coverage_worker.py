"""One network pruned by one tool, in a process of its own: what `prune_coverage.py` starts.

    python benchmarks/coverage_worker.py make NETWORK TOOL FOLDER SECONDS
    python benchmarks/coverage_worker.py load NETWORK TOOL FOLDER SECONDS

`make` builds the network, prunes it and saves it and its answers in FOLDER; then, off the clock, it
holds the answers against those of the masked network. `load` loads what was saved and answers. Each
step done is a line of JSON. The clock starts after all imports and counts processor time, of one
thread, so that nothing else that the machine does counts; when it has run for SECONDS the system
ends the process (SIGPROF), whatever it is at. Making the network to be pruned is off the clock too.
"""

from __future__ import annotations

import copy
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch.export imports it late, and no import is measured
from coverage_networks import Network, enliven, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attar.prune import channel_graph, criteria, prune_channels
from attar.prune.groups import ChannelGraph, JointPlace, Place
from attar.prune.masking import masked, masked_answers, outputs
from attar.prune.removal import ChannelsRemoved
from attar.student import Student, load_student, save_student

RATIO = 0.5
CHECK_SECONDS = 240
TOLERANCE = 1e-4


def main() -> None:
    step, key, tool, folder, seconds = sys.argv[1:]
    one = network(key)
    one.load_library()
    if tool == "torch-pruning":
        import torch_pruning  # noqa: F401
    torch.set_num_threads(1)
    {"make": make, "load": load}[step](one, tool, Path(folder), float(seconds))


def tell(**step: Any) -> None:
    print(json.dumps(step), flush=True)


def end_after(seconds: float) -> None:
    """Has the system end this process after so many more seconds of processor time; 0: no more."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


# --- the steps ------------------------------------------------------------------------------------


def make(one: Network, tool: str, folder: Path, seconds: float) -> None:
    """Prune, save and answer; the network and the check are off the clock."""
    torch.manual_seed(0)
    module = one.build()
    enliven(module, one.example(module, 4))
    example = one.example(module, 2)
    started = time.process_time()
    end_after(seconds)
    pruned, notes = TOOLS[tool](one, module, example, folder)
    answers = answers_of(pruned, example)
    torch.save({"example": example, "answers": answers}, folder / "answers.pt")
    end_after(0)
    took = time.process_time() - started
    share = size(pruned) / size(module)
    tell(step="made", seconds=took, share=share, notes=notes)
    end_after(CHECK_SECONDS)
    tell(step="checked", difference=difference_to_masked(module, pruned, example))
    end_after(0)


def load(one: Network, tool: str, folder: Path, seconds: float) -> None:
    """Load, answer, compare with the answers before."""
    started = time.process_time()
    end_after(seconds)
    if tool == "attar":
        module = load_student(folder / "student", build=_no_spec, module=one.build()).module
    else:
        module = torch.load(folder / "pruned.pt", weights_only=False)  # our own file
    before = torch.load(folder / "answers.pt", weights_only=True)
    found = difference(answers_of(module, before["example"]), before["answers"])
    end_after(0)
    tell(step="loaded", seconds=time.process_time() - started, difference=found)


def _no_spec(spec: Any) -> nn.Module:
    raise ValueError("these students have no spec")


def by_attar(
    one: Network, module: nn.Module, example: tuple[Tensor, ...], folder: Path
) -> tuple[nn.Module, list[str]]:
    """Attar's defaults: each layer halved, magnitude, the output layer stays by itself."""
    criterion = criteria.get("magnitude")()
    student, pruned = prune_channels(Student(module), example, criterion=criterion, ratio=RATIO)
    save_student(student, folder / "student")
    return student.module, pruned.notes()


def by_torch_pruning(
    one: Network, module: nn.Module, example: tuple[Tensor, ...], folder: Path
) -> tuple[nn.Module, list[str]]:
    """Torch-Pruning by its README, with the rules that its examples for torchvision, timm and BERT
    add: they are applied to every network by what its modules are, none by a network's name."""
    import torch_pruning as tp

    module = copy.deepcopy(module)
    heads, groups = heads_of(module)
    pruner = tp.pruner.BasePruner(
        module,
        tuple(x[:1] for x in example),
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=output_layers(module, one.classes),
        num_heads=heads,
        out_channel_groups=groups,
    )
    pruner.step()
    refresh_widths(module)
    module.zero_grad()
    torch.save(module, folder / "pruned.pt")
    return module, []


HEADS = {"num_heads": ["qkv"], "num_attention_heads": ["query", "key", "value"]}
"""Attention by its names in timm and in BERT: the count of heads, and what they split."""
TOOLS = {"attar": by_attar, "torch-pruning": by_torch_pruning}


def output_layers(module: nn.Module, classes: int) -> list[nn.Module]:
    """By the README's rule: layers with as many outputs as there are classes."""
    widths = {nn.Linear: "out_features", nn.Conv2d: "out_channels"}
    return [
        part
        for part in module.modules()
        for kind, width in widths.items()
        if isinstance(part, kind) and getattr(part, width) == classes
    ]


def heads_of(module: nn.Module) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """Projections and their heads, and PyTorch's attention and its heads, which are the groups that
    its channels fall into."""
    heads: dict[nn.Module, int] = {}
    groups: dict[nn.Module, int] = {}
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            groups[part] = part.num_heads
        for count, projections in HEADS.items():
            layers = [getattr(part, name, None) for name in projections]
            if all(isinstance(layer, nn.Linear) for layer in layers) and hasattr(part, count):
                heads.update(dict.fromkeys(layers, getattr(part, count)))  # type: ignore[arg-type]
    return heads, groups


def refresh_widths(module: nn.Module) -> None:
    """Sets the widths that the examples set after pruning, where modules note them."""
    for part in module.modules():
        if isinstance(getattr(part, "conv_proj", None), nn.Conv2d):
            _set(part, hidden_dim=part.conv_proj.out_channels)  # type: ignore[union-attr]
        if isinstance(getattr(part, "qkv", None), nn.Linear) and hasattr(part, "num_heads"):
            width = part.qkv.out_features // 3  # type: ignore[union-attr, operator]
            _set(part, attn_dim=width, head_dim=width // part.num_heads)  # type: ignore[operator]
        if isinstance(getattr(part, "query", None), nn.Linear):
            width = part.query.out_features  # type: ignore[union-attr, assignment]
            count = getattr(part, "num_attention_heads", 1)
            _set(part, all_head_size=width, attention_head_size=width // count)  # type: ignore


def _set(part: nn.Module, **widths: Any) -> None:
    for name, width in widths.items():
        if hasattr(part, name):
            setattr(part, name, width)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- the check ------------------------------------------------------------------------------------


def answers_of(module: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return list(outputs(module.eval()(*example)))


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference relative to the largest answer; infinite for other shapes or NaN."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return float("inf")
    worst = 0.0
    for x, y in zip(found, wanted, strict=True):
        one = float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))
        worst = max(worst, one) if one == one else float("inf")
    return worst


def difference_to_masked(
    module: nn.Module, pruned: nn.Module, example: tuple[Tensor, ...]
) -> float:
    """How far the pruned network's answers are from the masked network's, by the best reading.

    What was removed is read off the weights themselves. First the parameters are zeroed and nothing
    else. Where that differs, norms, means and softmaxes over channels are computed over those that
    stay, and attention is scaled as it was, in double precision: all that a tool may reasonably do.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide attention's scale
    module = as_computed(module, pruned, example)
    removal = removed_from(module, pruned)
    zeroed = masked(module, removal)
    first = difference(answers_of(pruned, example), answers_of(zeroed, example))
    if first <= TOLERANCE:
        return first
    graph, extended = over_those_that_stay(channel_graph(module, _first(example)), removal)
    found = [first]
    for kind in (torch.float32, torch.float64):
        inputs = tuple(x.to(kind) if x.is_floating_point() else x for x in example)
        networks = [copy.deepcopy(m).to(kind) for m in (module, pruned, zeroed)]
        try:
            with scales() as before:
                answers_of(networks[0], inputs)
            with scales(before):
                answers = answers_of(networks[1], inputs)
            with SoftmaxOverThoseThatStay():
                wanted = masked_answers(networks[2], extended, inputs, graph)
        except (RuntimeError, TypeError):  # code that holds to float32
            continue
        found.append(difference(answers, wanted))
    return min(found)


def as_computed(module: nn.Module, pruned: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The network with plain convolutions, of the weights that its own compute, wherever the pruned
    network has plain ones; held against its answers."""
    plain, known = copy.deepcopy(module), dict(module.named_modules())
    for path, layer in pruned.named_modules():
        own: Any = known.get(path)
        if type(layer) is nn.Conv2d and isinstance(own, nn.Conv2d) and type(own) is not nn.Conv2d:
            conv = nn.Conv2d(
                own.in_channels, own.out_channels, own.kernel_size, own.stride,  # type: ignore[arg-type]
                own.padding, own.dilation, own.groups, own.bias is not None,  # type: ignore[arg-type]
            )  # fmt: skip
            conv.weight, conv.bias = nn.Parameter(weight_applied(own)), own.bias
            plain.set_submodule(path, conv)
    if difference(answers_of(plain, example), answers_of(module, example)) > TOLERANCE:
        raise ValueError("the pruned network's plain layers don't stand for what was there")
    return plain


def weight_applied(layer: nn.Conv2d) -> Tensor:
    """The weight that a convolution hands on when it is called."""
    convolve, seen = F.conv2d, []

    def noting(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(weight.detach())
        return convolve(x, weight, *args, **kwargs)

    F.conv2d = noting
    try:
        layer(torch.zeros(1, layer.in_channels, *layer.kernel_size))
    finally:
        F.conv2d = convolve
    return seen[0]


def _first(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x[:1] for x in example)


@contextmanager
def scales(given: list[float] | None = None) -> Iterator[list[float]]:
    """Notes the scale of each attention in turn, or has each use the scale given for its turn."""
    attention, seen = F.scaled_dot_product_attention, []
    turns = iter(given or [])

    def scaled(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = kwargs.pop("scale", None) or query.shape[-1] ** -0.5
        seen.append(scale)
        kwargs["scale"] = next(turns, scale)
        result: Tensor = attention(query, *args, **kwargs)
        return result

    F.scaled_dot_product_attention = scaled  # type: ignore[assignment]
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = attention


class SoftmaxOverThoseThatStay(TorchDispatchMode):
    """Attention among channels, in a masked network: the scores of a channel that is gone are zero
    in every row, and get no share. Where all are gone, a whole head is, and nothing changes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._softmax.default and args[0].dim() > 1:
            scores, d, *rest = args
            if d % scores.dim() == scores.dim() - 1:
                gone = (scores == 0).all(-2, keepdim=True)
                gone &= ~gone.all(-1, keepdim=True)
                args = (scores.masked_fill(gone, float("-inf")), d, *rest)
        return func(*args, **(kwargs or {}))


def removed_from(module: nn.Module, pruned: nn.Module) -> ChannelsRemoved:
    """Which indices of which tensors are gone, found by looking for what is left in what was."""
    left, removed = dict(tensors_of(pruned)), {}
    for path, was in tensors_of(module):
        kept = left.get(path)
        if kept is None:
            raise ValueError(f"{path} is missing from the pruned network")
        if kept.shape == was.shape:
            continue
        places = places_of(kept.detach(), was.detach())
        if places is None:
            raise ValueError(f"what is left of {path} is no part of what it was")
        gone = {d: np.setdiff1d(np.arange(n), places[d]) for d, n in enumerate(was.shape)}
        removed[path] = {d: indices.tolist() for d, indices in gone.items() if len(indices)}
    return ChannelsRemoved(removed, {})


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def places_of(kept: Tensor, was: Tensor, tries: int = 8) -> list[np.ndarray] | None:
    """The indices along each dimension at which `was` is `kept`; `None` where it is nowhere.

    From an element of `kept` and one of `was` that is equal, lines are matched along each
    dimension; the whole must then be equal.
    """
    if kept.dim() != was.dim() or not kept.numel():
        return None
    for attempt in range(tries):
        corner = [attempt * (n - 1) // tries for n in kept.shape]
        for start in (was == kept[tuple(corner)]).nonzero()[:tries].tolist():
            lines = [
                ascending(_line(kept, corner, d), _line(was, start, d)) for d in range(was.dim())
            ]
            found = [line for line in lines if line is not None]
            if len(found) == was.dim() and torch.equal(was[np.ix_(*found)], kept):
                return found
    return None


def _line(tensor: Tensor, through: list[int], d: int) -> np.ndarray:
    at = tuple(slice(None) if i == d else n for i, n in enumerate(through))
    return np.asarray(tensor[at])


def ascending(few: np.ndarray, many: np.ndarray) -> np.ndarray | None:
    """Where `few` lies in `many`, in order; `None` where it doesn't."""
    places, at = [], 0
    for value in few:
        later = np.flatnonzero(many[at:] == value)
        if not len(later):
            return None
        places.append(at + int(later[0]))
        at = places[-1] + 1
    return np.array(places)


def over_those_that_stay(
    graph: ChannelGraph, removal: ChannelsRemoved
) -> tuple[ChannelGraph, ChannelsRemoved]:
    """The graph and the removal with each operator over channels knowing which of them are gone:
    those that its own weight lost, or else those whose atoms no longer are made."""
    cut = [
        place.atoms[removal.removed[place.path][place.at]]
        for place in graph.producers
        if isinstance(place.at, int) and place.at in removal.removed.get(place.path, {})
    ]
    gone = np.concatenate(cut) if cut else np.empty(0, np.int64)
    joint, places, removed, start = [], [], dict(removal.removed), 0
    for one in graph.joint:
        weight = own_weight(graph, one)
        if weight is None:
            lost = np.flatnonzero(np.isin(one.atoms, gone))
        else:
            lost = np.array(removal.removed.get(weight, {}).get(0, []), dtype=np.int64)
        atoms = np.arange(start, start + len(one.atoms))
        start += len(atoms)
        joint.append(replace(one, atoms=atoms))
        if len(lost):
            places.append(Place(one.node, 0, "own", atoms))
            removed[one.node] = {0: lost.tolist()}
    return replace(graph, joint=joint, places=places), ChannelsRemoved(removed, {})


def own_weight(graph: ChannelGraph, joint: JointPlace) -> str | None:
    """The parameter, if any, by which an operator over channels scales them."""
    node = next(n for n in graph.program.graph.nodes if n.name == joint.node)
    stored = graph.program.graph_signature.inputs_to_parameters
    return next((stored[n.name] for n in node.all_input_nodes if n.name in stored), None)


if __name__ == "__main__":
    main()
