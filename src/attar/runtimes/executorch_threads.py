"""ExecuTorch's threads: one pool for the whole process, which every session wants its own way."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from attar.runtimes.executorch_library import import_executorch, silenced

LOCK = threading.RLock()
"""Held while a model is loaded or answers: the pool must not change meanwhile."""


class Pooled(Protocol):
    """What holds a loaded model, and can let go of it and load it again."""

    def unload(self) -> None:
        """Forgets the loaded model."""
        ...


_loaded: weakref.WeakSet[Pooled] = weakref.WeakSet()


def take_pool(holder: Pooled, threads: int) -> None:
    """Gives the process's pool so many threads; `holder` is about to load a model for it.

    A loaded model keeps the address of the pool it was loaded with, so where the number changes,
    every holder first unloads its model, and has to load it again when it is next called. Models
    that others than Attar have loaded in this process don't know of that. Hold `LOCK`.
    """
    library = import_executorch()
    if library._threadpool_get_thread_count() != threads:
        for other in list(_loaded):
            other.unload()
        _loaded.clear()
        with silenced():
            library._unsafe_reset_threadpool(threads)
    _loaded.add(holder)


def pool_threads() -> int:
    """How many threads the process's pool has."""
    return import_executorch()._threadpool_get_thread_count()
