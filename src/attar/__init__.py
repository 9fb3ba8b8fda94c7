"""Attar: what is left of a model after distillation.

Give it a trained network (the teacher), data and a budget; it distils, prunes, shares and
quantizes, and hands back a deployable file with proof of what it cost.

Example:
    >>> import attar
    >>> run = attar.compress(net, data=(train, validation, test), stages=[
    ...     attar.Prune(ratio=0.5), attar.Quantize()])  # doctest: +SKIP
    >>> student = attar.load("runs/compress")  # doctest: +SKIP
"""

# ruff: noqa: F401 - type checkers see the imports, everyone else the table below
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attar.api import compress, ledger, load, load_student
    from attar.data import Data, DataConfig, from_loaders, load_data
    from attar.errors import AttarError
    from attar.models import ModelSpec, build
    from attar.pipeline import Run, run
    from attar.recipe import Budget, Deploy, Recipe, dump_recipe, load_recipe
    from attar.stages.base import Context, Stage
    from attar.stages.distill import Distill
    from attar.stages.prune import Prune
    from attar.stages.quantize import Quantize
    from attar.stages.share import Share
    from attar.student import Student
    from attar.tasks.base import Task
    from attar.training.config import Optimizer, Schedule, Training

_HOMES = {
    "attar.api": ["compress", "ledger", "load", "load_student"],
    "attar.data": ["Data", "DataConfig", "from_loaders", "load_data"],
    "attar.errors": ["AttarError"],
    "attar.models": ["ModelSpec", "build"],
    "attar.pipeline": ["Run", "run"],
    "attar.recipe": ["Budget", "Deploy", "Recipe", "dump_recipe", "load_recipe"],
    "attar.stages.base": ["Context", "Stage"],
    "attar.stages.distill": ["Distill"],
    "attar.stages.prune": ["Prune"],
    "attar.stages.quantize": ["Quantize"],
    "attar.stages.share": ["Share"],
    "attar.student": ["Student"],
    "attar.tasks.base": ["Task"],
    "attar.training.config": ["Optimizer", "Schedule", "Training"],
}
"""Where the public names live. They are imported when first asked for: PyTorch takes seconds."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'attar' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
