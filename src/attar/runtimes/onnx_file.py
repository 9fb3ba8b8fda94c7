"""ONNX files: kept small, the same bytes for the same model, and saying what their input wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

CORE_KEY = "attar"
"""The metadata key that holds the manifest's core."""


def tidy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Strips, in place, what no session reads: the exporter's notes on every node, documentation,
    shapes of inner values, unused operator sets; one copy is kept of equal constants, as raw bytes.
    """
    del proto.metadata_props[:]
    proto.doc_string = ""
    _tidy_graph(proto.graph)
    used = {node.domain for node in proto.graph.node} | {f.domain for f in proto.functions} | {""}
    kept = [o for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    return proto


def _tidy_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    del graph.quantization_annotation[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.type == onnx.AttributeProto.GRAPH:
                _tidy_graph(attribute.g)
    _share_constants(graph)


def _share_constants(graph: onnx.GraphProto) -> None:
    outputs = {o.name for o in graph.output}
    plain = [_plain(tensor) for tensor in graph.initializer]
    kept: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}
    for tensor in plain:
        key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        shareable = tensor.raw_data and tensor.name not in outputs
        if shareable and kept.setdefault(key, tensor.name) != tensor.name:
            same[tensor.name] = kept[key]
    del graph.initializer[:]
    graph.initializer.extend(tensor for tensor in plain if tensor.name not in same)
    rename_values(graph, same)
    if any(map(_beyond_seven_bits, plain)):
        _part_bytes(graph)


def _part_bytes(graph: onnx.GraphProto) -> None:
    """Gives every node int8 constants of its own. Where a session must move 8-bit weights to other
    kernels (see `onnxruntime_session.CONFIG_WITHOUT_VNNI`), ONNX Runtime 1.32 can't load a file
    whose nodes share one."""
    byte = {t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    uses: dict[str, int] = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in byte:
                uses[name] = uses.get(name, 0) + 1
                if uses[name] > 1:
                    own = _plain(byte[name])
                    own.name = node.input[i] = f"{name}/{uses[name]}"
                    graph.initializer.append(own)


def _plain(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A copy with its values as raw bytes and nothing beside them."""
    copy = onnx.TensorProto()
    if tensor.HasField("raw_data") or tensor.data_type == onnx.TensorProto.STRING:
        copy.CopyFrom(tensor)
    else:
        copy = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
    copy.doc_string = ""
    del copy.metadata_props[:]
    return copy


def _beyond_seven_bits(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != onnx.TensorProto.INT8:
        return False
    values = np.frombuffer(tensor.raw_data, np.int8)
    return bool(((values < -64) | (values > 64)).any())


def rename_values(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Calls values by other names, in place, wherever nodes make or take them."""
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                rename_values(attribute.g, names)


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Writes the model, the same bytes for the same model."""
    path.write_bytes(proto.SerializeToString(deterministic=True))


def embed(path: Path, core: dict[str, Any]) -> None:
    """Puts the manifest's core into the file, under the metadata key `attar`, so that the file
    alone says what its input wants."""
    proto = onnx.load(str(path))
    entry = next((e for e in proto.metadata_props if e.key == CORE_KEY), None)
    entry = entry if entry is not None else proto.metadata_props.add(key=CORE_KEY)
    entry.value = json.dumps(core, ensure_ascii=False, separators=(",", ":"))
    save(proto, path)


def opset(path: Path) -> int:
    """The version of ONNX's own operators that the file is written in."""
    proto = onnx.load(str(path), load_external_data=False)
    return next(o.version for o in proto.opset_import if o.domain == "")
