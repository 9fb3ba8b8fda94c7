"""A network's graph, as torch.export reads it, and where its operators were written."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from attar.errors import ExportError
from attar.training.evaluation import evaluating, evaluating_all

Mode = Callable[[nn.Module], AbstractContextManager[None]]


def whole_program(
    module: nn.Module, example: tuple[Any, ...]
) -> tuple[torch.export.ExportedProgram, bool]:
    """The network's graph, and whether it has branches that only run in training: where without
    them some parameters would have no part in it."""
    program = export(module, example)
    idle = _idle(program)
    if idle:
        with suppress(ExportError):
            whole = export(module, example, evaluating_all)
            if len(_idle(whole)) < len(idle):
                return whole, True
    return program, False


def _idle(program: torch.export.ExportedProgram) -> list[str]:
    """The parameters that no operator of a graph reads."""
    stored = program.graph_signature.inputs_to_parameters
    return [n.name for n in program.graph.nodes if n.name in stored and not n.users]


def export(
    module: nn.Module, example: tuple[Any, ...], mode: Mode = evaluating
) -> torch.export.ExportedProgram:
    """The network's graph in eval mode, for one example. Raises `ExportError`."""
    try:
        with mode(module), _caching_nothing(module), torch.inference_mode(False):
            return torch.export.export(module, example, strict=False)
    except Exception as error:  # whatever the person's forward raises under tracing
        raise ExportError(
            f"the network's graph can't be read by torch.export, which stops at "
            f"{where_failed(error)}; its channels can't be pruned, but granularity: weight works"
        ) from None


@contextmanager
def _caching_nothing(module: nn.Module) -> Iterator[None]:
    """Language models of transformers without the keys and values they keep for generating."""
    config: Any = getattr(module, "config", None)
    before = getattr(config, "use_cache", None)
    try:
        if before is not None:
            config.use_cache = False
        yield
    finally:
        if before is not None:
            config.use_cache = before


def paths_of(node: Node) -> list[str]:
    """The paths of the modules that a node was written in, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [path.split("@")[0] for path, _ in stack] or [""]


def where_failed(error: Exception) -> str:
    """The line of the network's own code that failed, and what it said."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/attar/prune/" not in f.filename]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line} " if own else ""
    said = str(error).strip().splitlines()
    return f"{place}({said[0].strip() if said else type(error).__name__})"
