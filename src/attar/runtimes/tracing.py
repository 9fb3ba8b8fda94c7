"""Tracing a network for export, and telling in one sentence what of it can't be."""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar.errors import ExportError

if TYPE_CHECKING:
    from torch import nn


def deployed(
    student: Any, example: tuple[Any, ...], dynamic_shapes: tuple[dict[int, Any], ...]
) -> tuple[nn.Module, tuple[Any, ...]]:
    """A `Student`'s network as it is exported (in eval mode, or the graph that its edits make of
    it) and the example, both on the CPU; the student isn't touched."""
    import torch
    from torch.utils import _pytree

    module = copy.deepcopy(student.module).eval().cpu()
    example = _pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), example)
    graph: nn.Module = module
    for edit in student.edits:
        graph = edit.graph(module, example, dynamic_shapes) or graph
    return graph, example


def trace(module: nn.Module, example: tuple[Any, ...], dynamic_shapes: Any, network: str) -> Any:
    """The `ExportedProgram`. Raises `ExportError` naming the network and the line at fault.

    network: what messages call it.
    """
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # the exporter runs the person's code: anything can come out of it
        raise ExportError(f"can't export {network}{place(error)}: {reason(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's progress, warnings and logged tracebacks kept from the person's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def reason(error: BaseException) -> str:
    """What went wrong, without a full stop."""
    if "DataDependent" in type(error).__name__:
        return (
            "its control flow depends on the values of its input, so it has no single graph; "
            "torch.where or torch.cond would work"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def place(error: BaseException) -> str:
    """`, at net.py line 7 (if x.sum() > 0:)`: the innermost line that is the person's own."""
    frames = [
        (frame.filename, frame.lineno or 0)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == "forward"
    ]
    return own_line([*frames, *quoted(str(error))])


def quoted(text: str) -> list[tuple[str, int]]:
    """The lines of code that a stack trace in words names."""
    return [(path, int(line)) for path, line in re.findall(r'File "([^"]+)", line (\d+)', text)]


def own_line(frames: list[tuple[str, int]]) -> str:
    """The innermost of these lines that isn't PyTorch's, as `place` has it; `""` for none."""
    import torch

    library = Path(torch.__file__).parent
    own = [frame for frame in frames if library not in Path(frame[0]).parents]
    if not own:
        return ""
    path, line = own[-1]
    code = linecache.getline(path, line).strip()
    return f", at {Path(path).name} line {line}" + (f" ({code})" if code else "")
