"""From a PyTorch network to ExecuTorch's program, as much of it as possible given to XNNPACK."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attar.errors import ExportError
from attar.runtimes.tracing import deployed, own_line, place, quiet, quoted, reason, trace

if TYPE_CHECKING:
    from torch.fx import GraphModule

LARGEST_BATCH = 16
"""How many examples a program has room for at once, where the batch's dimension has no `max` of its
own. Sessions answer larger batches in parts."""

UNKNOWN = (
    r"Missing out variants: \{'(?:[^']*::)?([^'.]+)",
    r"Operator torch\._ops\.\w+\.(\w+)[.\w]* is not in Core ATen opset",
)
"""How ExecuTorch says that it doesn't know an operation."""


def export_executorch(
    student: Any,
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    largest_batch: int = LARGEST_BATCH,
) -> bytes:
    """The `.pte` file of a `Student` in eval mode, for inputs in their order.

    largest_batch: room for so many examples at once is reserved where the first dimension has no
    `max`. Raises `ExportError` naming the operation or the line that can't be exported, or for
    another dimension that varies without a `max`.
    """
    from torch.fx import GraphModule

    from attar.runtimes.executorch_integers import for_xnnpack

    network = type(student.module).__name__
    shapes = bounded(dynamic_shapes, largest_batch)
    with quiet(), own_handlers(), _plain_convolutions():
        graph, example = deployed(student, example, dynamic_shapes)
        if student.edits and isinstance(graph, GraphModule):
            for_xnnpack(graph)
        program = trace(graph, _at_most(example, shapes), shapes, network)
        return _lower(program, dynamic_shapes, network)


def bounded(
    dynamic_shapes: tuple[dict[int, Any], ...], largest_batch: int
) -> tuple[dict[int, Any], ...]:
    """The same dimensions, the first of each input with a largest size; one that inputs share stays
    shared. Raises `ExportError` for others without a `max`."""
    from torch.export import Dim

    batches: dict[str, Any] = {}

    def limit(axis: int, dim: Any) -> Any:
        if isinstance(getattr(dim, "max", None), int):
            return dim
        name = getattr(dim, "__name__", "batch")
        if axis:
            raise ExportError(
                f"ExecuTorch reserves memory for the largest input: give dimension {axis} ({name}) "
                "a max, as in torch.export.Dim(name, max=512)"
            )
        least = getattr(dim, "min", 1)
        return batches.setdefault(name, Dim(name, min=least, max=max(largest_batch, least)))

    return tuple({axis: limit(axis, d) for axis, d in one.items()} for one in dynamic_shapes)


def _at_most(example: tuple[Any, ...], shapes: tuple[dict[int, Any], ...]) -> tuple[Any, ...]:
    """The example cut to the largest batch."""
    return tuple(x[: s[0].max] if 0 in s else x for x, s in zip(example, shapes, strict=True))


def _lower(program: Any, dynamic_shapes: tuple[dict[int, Any], ...], network: str) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    from attar.runtimes.executorch_session import VARYING

    varying = [n for i, one in enumerate(dynamic_shapes) for axis in one for n in (i, axis)]
    try:
        edge = to_edge_transform_and_lower(
            program,
            transform_passes=[_infer_batch],
            partitioner=[XnnpackPartitioner()],
            constant_methods={VARYING: varying},
        )
        # Inputs stay where the caller has them, rather than being copied.
        planning = MemoryPlanningPass(alloc_graph_input=False)
        made = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    except Exception as error:  # passes raise whatever they stumble on
        raise ExportError(f"can't export {network}{_unlowered(error, program)}") from error
    _refuse_missing(made, program, network)
    return made.buffer


def _infer_batch(graph: GraphModule) -> Any:
    """Reshapes with one size that varies, which XNNPACK takes where the size is left to infer."""
    from torch.fx import Node
    from torch.fx.passes.infra.pass_base import PassResult

    from attar.runtimes.aten import argument, operator

    for node in graph.graph.nodes:
        if operator(node).startswith("view_copy"):
            sizes = list(argument(node, 1))
            unknown = [i for i, size in enumerate(sizes) if isinstance(size, Node)]
            if len(unknown) == 1:
                sizes[unknown[0]] = -1
                node.args = (node.args[0], sizes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return PassResult(graph, True)


def _unlowered(error: Exception, program: Any) -> str:
    for said in UNKNOWN:
        if missing := re.search(said, str(error)):
            return _without_kernel(missing.group(1), program)
    return f"{place(error)}: {reason(error)}"


def _refuse_missing(made: Any, program: Any, network: str) -> None:
    from attar.runtimes.executorch_library import import_executorch

    known = set(import_executorch()._get_operator_names())
    for plan in made.executorch_program.execution_plan:
        for used in plan.operators:
            name = f"{used.name}.{used.overload}" if used.overload else used.name
            if name not in known:
                said = _without_kernel(used.name.rpartition("::")[2], program)
                raise ExportError(f"can't export {network}{said}")


def _without_kernel(operation: str, program: Any) -> str:
    """`, at net.py line 7 (...): the operation x has no kernel ...`"""
    from attar.runtimes.aten import operator

    plain = operation.removesuffix("_copy").lstrip("_")
    traces = [
        str(node.meta.get("stack_trace") or "")
        for node in program.graph.nodes
        if operator(node) in (operation, plain)
    ]
    at = own_line(quoted(traces[0])) if traces else ""
    return (
        f"{at}: the operation {operation} has no kernel in ExecuTorch; a network without it would "
        "work"
    )


@contextlib.contextmanager
def _plain_convolutions() -> Iterator[None]:
    """PyTorch chooses a convolution's kernel by the batch's size, on tracing too, and would bind
    the program to sizes below 16 for that."""
    import torch

    with torch.backends.nnpack.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
        yield


@contextlib.contextmanager
def own_handlers() -> Iterator[None]:
    """Logging's handlers as they were: ExecuTorch adds one to the root when it is imported."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
