"""From a PyTorch network to a small, clean ONNX graph, through `torch.export`."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.errors import ExportError
from attar.runtimes.onnx_file import rename_values

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET = 20
LARGEST_FILE = 2**31 - 2**20
"""Bytes a protobuf file can hold, with room for the graph itself."""


def export_onnx(
    student: Any,
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    names: tuple[list[str], list[str]],
) -> onnx.ModelProto:
    """The ONNX model of a `Student` in eval mode: batch norms and constants folded, nodes named by
    the person's module paths (`layer1.0.conv1/Conv`).

    Raises `ExportError` naming the operation or the line that can't be exported.
    """
    import torch
    from torch.utils import _pytree

    module = copy.deepcopy(student.module).eval().cpu()
    example = _pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), example)
    graph: nn.Module = module
    for edit in student.edits:
        graph = edit.graph(module, example, dynamic_shapes) or graph
    _refuse_too_large(graph)
    network = type(student.module).__name__
    with _quiet():
        program = _trace(graph, example, dynamic_shapes, network)
        proto = _translate(program, dynamic_shapes, names, network)
    _name_nodes_by_module(proto)
    return proto


def _trace(module: nn.Module, example: tuple[Any, ...], dynamic_shapes: Any, network: str) -> Any:
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # the exporter runs the person's code: anything can come out of it
        raise ExportError(f"can't export {network}{_place(error)}: {_reason(error)}") from error


def _translate(
    program: Any, dynamic_shapes: Any, names: tuple[list[str], list[str]], network: str
) -> onnx.ModelProto:
    import torch

    try:
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            external_data=False,
            dynamic_shapes=dynamic_shapes,
            input_names=names[0],
            output_names=names[1],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    except Exception as error:
        raise ExportError(f"can't export {network}{_untranslated(error)}") from error
    assert exported is not None
    return exported.model_proto


def _refuse_too_large(module: nn.Module) -> None:
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size > LARGEST_FILE:
        raise ExportError(
            f"the network's weights take {size / 1e9:.1f} GB; one ONNX file holds at most 2 GB: "
            "compress it further first"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress, warnings and logged tracebacks kept from the person's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    if "DataDependent" in type(error).__name__:
        return (
            "its control flow depends on the values of its input, so it has no single graph; "
            "torch.where or torch.cond would work"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """`, at net.py line 7 (if x.sum() > 0:)`: the innermost line that is the person's own."""
    frames = [
        (frame.filename, frame.lineno or 0)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == "forward"
    ]
    return _own_line([*frames, *_quoted(str(error))])


def _quoted(text: str) -> list[tuple[str, int]]:
    """The lines of code that a stack trace in words names."""
    return [(path, int(line)) for path, line in re.findall(r'File "([^"]+)", line (\d+)', text)]


def _own_line(frames: list[tuple[str, int]]) -> str:
    import torch

    library = Path(torch.__file__).parent
    own = [frame for frame in frames if library not in Path(frame[0]).parents]
    if not own:
        return ""
    path, line = own[-1]
    code = linecache.getline(path, line).strip()
    return f", at {Path(path).name} line {line}" + (f" ({code})" if code else "")


def _untranslated(error: BaseException) -> str:
    """Which operation of the traced program ONNX has no word for, and the line that asks for it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__
    text = "\n".join(str(e) for e in chain)
    operation = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text)
    if operation is None:
        return f": {_reason(chain[-1])}"
    return (
        f"{_own_line(_quoted(_trace_of_node(chain)))}: the operation {operation.group(1)} has no "
        "ONNX counterpart; a network without it would work"
    )


def _trace_of_node(chain: list[BaseException]) -> str:
    """The stack trace noted on the node under translation. The exporter's error only has its name
    in a graph of its own, but its frames hold the node."""
    for error in chain:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            trace = getattr(frame.f_locals.get("node"), "stack_trace", None)
            if trace:
                return trace
    return ""


def _name_nodes_by_module(proto: onnx.ModelProto) -> None:
    """Gives every node the path of the module it came from, so that a profile, or a person looking
    at the file, finds the layer; the exporter notes it in metadata that `tidy` strips. The values
    between nodes get short names: they are many and written twice."""
    weights = {w.name for w in proto.graph.initializer}
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output)} | weights | {""}
    taken: dict[str, int] = {}
    short: dict[str, str] = {}
    for node in proto.graph.node:
        own = [i.removesuffix(".weight") for i in node.input if i in weights and "weight" in i]
        name = f"{own[0] if own else _scope(node)}/{node.op_type}".lstrip("/")
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for value in node.output:
            if value not in fixed:
                short[value] = f"v{len(short)}"
    rename_values(proto.graph, short)


def _scope(node: onnx.NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = json.loads(entry.value.replace("'", '"'))
            return scopes[-2] if len(scopes) > 1 else ""
    return ""
