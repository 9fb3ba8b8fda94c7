"""Whole residual blocks: which a network has, and taking them out.

A residual block adds what it computes to what it is given, so that without it a network still runs:
its input goes on in place of its output. Found in the exported graph: a module called once, whose
result has its input's shape and comes from adding something to that input.

Sources: Veit et al. 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks"
(blocks deleted from a trained network); Men et al. 2024, "ShortGPT" (layers of language models).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from attar.errors import CheckpointError, UsageError
from attar.prune.exporting import export, paths_of
from attar.prune.groups import first_of_batch
from attar.prune.naming import matching
from attar.prune.operators import name_of
from attar.prune.weights import Masked
from attar.student import Student
from attar.student.edits import Edit, submodule
from attar.training.evaluation import evaluating

TAKEN_OUT = "a residual block was taken out at"
_ADDS = {"add", "add_"}


class Bypass(nn.Module):
    """What stands where a block was: gives its input back, in the form of the block's result.

    wrapped: whether that is a tuple of one tensor, as layers of some transformers have it. block:
    whose plain attributes (`attention_type`) the code around it may ask for.
    """

    def __init__(self, block: nn.Module | None = None, wrapped: bool = False) -> None:
        super().__init__()
        for name, value in vars(block).items() if block is not None else ():
            if not name.startswith("_") and isinstance(value, str | int | float):
                setattr(self, name, value)
        self.wrapped = wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor given."""
        x = _first_tensor(args, kwargs)
        return (x,) if self.wrapped else x


@dataclass(frozen=True)
class BlocksRemoved(Edit):
    """Residual blocks that are gone.

    wrapped: by path of a block, whether its result was a tuple.
    """

    kind: ClassVar[str] = "blocks-removed"

    wrapped: dict[str, bool]

    def to_json(self) -> dict[str, Any]:
        return {"blocks": dict(self.wrapped)}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> BlocksRemoved:
        try:
            return cls({str(path): bool(wrapped) for path, wrapped in record["blocks"].items()})
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the record of removed blocks is damaged: {error}") from None

    def replay(self, module: nn.Module) -> None:
        """Takes the blocks out of a network that still has them, in place."""
        for path, wrapped in self.wrapped.items():
            block = submodule(module, path, TAKEN_OUT)
            module.set_submodule(path, Bypass(block, wrapped).train(block.training))

    def summary(self) -> str:
        return f"{len(self.wrapped)} residual blocks removed"


def residual_blocks(
    module: nn.Module, example: tuple[Any, ...], program: torch.export.ExportedProgram
) -> dict[str, bool]:
    """The blocks that can be taken out, by path, in the network's order; whether each one's result
    is a tuple. Without all of them, the network runs.

    example: what the network is run on. program: its exported graph. Of blocks within blocks, those
    that a sequence or list of modules holds, else the outermost.

    Example:
        >>> from torch import nn; from attar.models.cifar_resnet import CifarResNet
        >>> from attar.prune.exporting import export
        >>> net, x = CifarResNet((2, 2, 2), 3, 10), (torch.zeros(1, 3, 32, 32),)
        >>> list(residual_blocks(net, x, export(net, x)))
        ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1']
    """
    found = {
        path: wrapped
        for path, wrapped in _of_one_shape(module, example).items()
        if _adds_to_input(program, path)
    }
    items = {
        f"{path}.{name}" if path else name
        for path, holder in module.named_modules()
        if isinstance(holder, (nn.Sequential, nn.ModuleList))
        for name, _ in holder.named_children()
    }
    whole = [p for p in found if not any(within(q, [p]) and q in items for q in found)]
    blocks = {p: found[p] for p in whole if not within(p, whole)}
    if _runs_without(module, blocks, example):
        return blocks
    return {p: w for p, w in blocks.items() if _runs_without(module, {p: w}, example)}


def _runs_without(module: nn.Module, blocks: dict[str, bool], example: tuple[Any, ...]) -> bool:
    shallow = copy.deepcopy(module)
    BlocksRemoved(blocks).replay(shallow)
    try:
        with evaluating(shallow):
            shallow(*example)
    except Exception:  # whatever the person's forward raises where it asks more of a block
        return False
    return True


def without_blocks(student: Student, blocks: dict[str, bool]) -> Student:
    """The student without these blocks of `residual_blocks`, masks within them gone too; itself for
    none."""
    if not blocks:
        return student
    edit = BlocksRemoved(dict(blocks))
    module = copy.deepcopy(student.module)
    edit.replay(module)
    edits: list[Edit] = [e.outside(blocks) if isinstance(e, Masked) else e for e in student.edits]
    return Student(module, student.spec, [*edits, edit])


def prune_blocks(
    student: Student,
    example: tuple[Any, ...],
    *,
    ratio: float,
    lost: Callable[[nn.Module], float],
    exclude: Sequence[str] = (),
    before: int = 0,
) -> tuple[Student, list[str]]:
    """A shallower student, and the paths of the blocks that went: one after another, each time the
    one without which the network is least bad.

    example: as of `prune_channels`. ratio: share of the residual blocks to take out, at least one
    of which stays. lost: how bad a network is, before any recovery. exclude: blocks that stay, by
    path, with `*`, or by a layer within. before: how many blocks went before, which the ratio
    counts.

    Raises `UsageError` where there is nothing to take out; `ExportError` for a network whose graph
    can't be read.

    Source: Veit et al. 2016, section 4.1 (single blocks deleted), made greedy.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio:g}: the share to remove lies between 0 and 1")
    program = export(student.module, first_of_batch(example))
    blocks = residual_blocks(student.module, example, program)
    blocks = unexcluded(blocks, [path for path, _ in student.module.named_modules()], exclude)
    if not blocks:
        raise UsageError(
            "granularity: block: the network has no residual block that could go: a module called "
            "once that adds what it computes to its input (channels can be pruned instead)"
        )
    total = len(blocks) + before
    gone: list[str] = []
    while blocks and total - len(blocks) < min(round(ratio * total), total - 1):
        bad = {path: lost(without_blocks(student, {path: w}).module) for path, w in blocks.items()}
        least = min(bad, key=bad.__getitem__)
        student = without_blocks(student, {least: blocks.pop(least)})
        gone.append(least)
    return student, gone


def unexcluded(
    blocks: dict[str, bool], names: Iterable[str], exclude: Sequence[str]
) -> dict[str, bool]:
    """The blocks that may go: none that is excluded, nor holds what is. names: what patterns can
    mean. Raises `UsageError` for one that means none."""
    stay = [*matching((n for n in names if n), exclude)]
    return {p: w for p, w in blocks.items() if not any(n == p or within(n, [p]) for n in stay)}


def within(path: str, blocks: Iterable[str]) -> bool:
    """Whether a path lies inside one of these modules."""
    return path.startswith(tuple(f"{block}." for block in blocks))


def _of_one_shape(module: nn.Module, example: tuple[Any, ...]) -> dict[str, bool]:
    """Modules with parameters, called once, that give a tensor of their input's shape."""
    calls: dict[str, list[bool | None]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            wrapped = isinstance(result, tuple) and len(result) == 1
            y, x = result[0] if wrapped else result, _first_tensor(args, kwargs)
            alike = isinstance(y, Tensor) and isinstance(x, Tensor) and _alike(x, y)
            calls.setdefault(path, []).append(wrapped if alike else None)

        return hook

    holders = [(p, m) for p, m in module.named_modules() if p and next(m.children(), None)]
    hooks = [m.register_forward_hook(note(p), with_kwargs=True) for p, m in holders]
    try:
        with evaluating(module):
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    order = [p for p, m in holders if any(True for _ in m.parameters())]
    once = [p for p in order if len(calls.get(p, ())) == 1]
    return {p: bool(calls[p][0]) for p in once if calls[p] != [None]}


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype


def _adds_to_input(program: torch.export.ExportedProgram, path: str) -> bool:
    """Whether a module adds something to what it is given: to its input as it came, or moved about
    without weights or another tensor."""
    inside = [n for n in program.graph.nodes if path in paths_of(n)]
    return any(_is_residual(n, inside) for n in inside if name_of(n.target) in _ADDS)


def _is_residual(add: Node, inside: list[Node]) -> bool:
    """Whether just one side of an addition is the input: the first activation of its shape that is
    read from outside, or what came of it alone."""
    mine, shape = set(inside), add.meta["val"].shape
    outside = (n for node in inside for n in node.all_input_nodes if n not in mine)
    given = next((n for n in outside if not _is_stored(n) and _shape(n) == shape), None)
    if given is None:
        return False
    carried = {given}
    for node in inside:
        sources = set(node.all_input_nodes)
        if node is add:
            return len(sources) == 2 and len(sources & carried) == 1
        if sources and sources <= carried:
            carried.add(node)
    return False


def _is_stored(node: Node) -> bool:
    """Whether a node is a parameter, a buffer or a constant, as exported graphs name them."""
    return node.op == "placeholder" and node.name.startswith(("p_", "b_", "c_"))


def _shape(node: Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def _first_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    found: Iterable[Any] = (x for x in chain(args, kwargs.values()) if isinstance(x, Tensor))
    return next(iter(found), None)
