"""From a PyTorch network to a small, clean ONNX graph, through `torch.export`."""

from __future__ import annotations

import json
import re
import traceback
from typing import TYPE_CHECKING, Any

from attar.errors import ExportError
from attar.runtimes.onnx_file import rename_values
from attar.runtimes.tracing import deployed, own_line, quiet, quoted, reason, trace

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
    graph, example = deployed(student, example, dynamic_shapes)
    _refuse_too_large(graph)
    if student.edits:
        _pad_integers(graph)
    network = type(student.module).__name__
    with quiet():
        program = trace(graph, example, dynamic_shapes, network)
        proto = _translate(program, dynamic_shapes, names, network)
    _name_nodes_by_module(proto)
    return proto


def _pad_integers(graph: nn.Module) -> None:
    from torch.fx import GraphModule

    from attar.runtimes.integer_moves import move_integers

    if isinstance(graph, GraphModule):
        move_integers(graph)


def _translate(
    program: Any, dynamic_shapes: Any, names: tuple[list[str], list[str]], network: str
) -> onnx.ModelProto:
    import torch

    from attar.runtimes.onnx_operators import translations

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
            custom_translation_table=translations(),
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
        return f": {reason(chain[-1])}"
    return (
        f"{own_line(quoted(_trace_of_node(chain)))}: the operation {operation.group(1)} has no "
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
