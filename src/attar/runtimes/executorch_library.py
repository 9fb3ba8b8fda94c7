"""ExecuTorch's library, imported without what it writes to the screen."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


@functools.cache
def import_executorch() -> Any:
    """The library that loads and runs `.pte` files. Raises `ImportError`.

    It is linked to PyTorch's, so PyTorch is imported first. The public `executorch.runtime` imports
    the whole exporter besides, four seconds of it, which takes no part in answering.
    """
    import torch  # noqa: F401

    with silenced():
        from executorch.extension.pybindings import _C as library

        library._threadpool_get_thread_count()  # looks at the processor, and tells what it read
    return library


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """What the process writes to its standard error meanwhile is dropped, that of C++ too."""
    _flush()
    try:
        kept = os.dup(2)
    except OSError:  # nothing is written anywhere
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a name of the system's, not a path
            os.dup2(nowhere.fileno(), 2)
        with contextlib.redirect_stderr(io.StringIO()):  # some of it goes by way of Python
            yield
    finally:
        _flush()
        os.dup2(kept, 2)
        os.close(kept)


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be none
        sys.stderr.flush()
