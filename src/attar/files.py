"""Parts from a person's own file, `path/to/file.py:Name`: code that runs only once allowed.

What was allowed is remembered by absolute path and content, in `trusted.json` of the user's
configuration folder (`ATTAR_CONFIG` names another one). A file that changed is asked about again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from platformdirs import user_config_dir

from attar.errors import UsageError
from attar.registry import near

Trust = bool | Callable[[str], bool]
"""Whether code may run: `True`, `False` (only what was allowed before), or who is asked: a function
of the question that returns the answer."""


def is_reference(name: str) -> bool:
    """Whether a name is a `file.py:Name` rather than a registered part's.

    Example:
        >>> is_reference("nets/mine.py:small"), is_reference("torchvision:resnet18")
        (True, False)
    """
    return ".py:" in name


def locate(reference: str) -> tuple[Path, str]:
    """The absolute path and the name in `path/to/file.py:Name`. Raises `UsageError`."""
    file, _, name = reference.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"{reference!r} doesn't name a part of a file: write path/to/file.py:Name")
    return Path(file).expanduser().resolve(), name


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises `UsageError` if it can't be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def allow(path: Path, trusted: Trust = False) -> bytes:
    """The file's source, if it may run: allowed before as it is now, or allowed by `trusted`.

    A new permission is remembered. Raises `UsageError` saying how to give it.
    """
    source = _read(path)
    digest = hashlib.sha256(source).hexdigest()
    remembered = _remembered()
    if digest in remembered.get(str(path), []):
        return source
    changed = " changed since it was last allowed to run" if str(path) in remembered else ""
    question = f"{path}{changed or ' is a Python file of your own'}: run its code?"
    if not (trusted(question) if callable(trusted) else trusted):
        raise UsageError(
            f"{path}{changed or ' has not been allowed to run'}: "
            "read it, then allow it with --trust (in Python: trusted=True)"
        )
    _remember(remembered, str(path), digest)
    return source


def from_file(reference: str, trusted: Trust = False) -> Any:
    """What `path/to/file.py:Name` names. The file runs once per content, after `allow`.

    Its folder joins the end of `sys.path`, so that it can import its neighbours; those are not
    asked about. Raises `UsageError` where the file is missing, not allowed or fails, or lacks the
    name.

    Example:
        >>> from_file("losses.py:Huber", trusted=True)  # doctest: +SKIP
        <class 'attar_file_….Huber'>
    """
    path, name = locate(reference)
    module = _execute(path, allow(path, trusted))
    if not hasattr(module, name):
        own = [n for n, part in vars(module).items() if callable(part) and not n.startswith("_")]
        raise UsageError(f"{path} has no {name!r}{near(name, own)}")
    return getattr(module, name)


def _execute(path: Path, source: bytes) -> ModuleType:
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()
    known = sys.modules.get(f"attar_file_{digest[:16]}")
    if known is not None:
        return known
    module = ModuleType(f"attar_file_{digest[:16]}")
    module.__file__ = str(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[module.__name__] = module  # dataclasses and pydantic look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        where = f"line {line}: " if (line := _line_in(path, error)) else ""
        raise UsageError(f"{path} fails to run: {where}{type(error).__name__}: {error}") from error
    return module


def _line_in(path: Path, error: Exception) -> int | None:
    """The last line of the person's file on the way to the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from None


def _store() -> Path:
    return Path(os.environ.get("ATTAR_CONFIG") or user_config_dir("attar")) / "trusted.json"


def _remembered() -> dict[str, list[str]]:
    """Path → the contents' hashes; a store that can't be read allows nothing."""
    try:
        stored = json.loads(_store().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {str(path): hashes for path, hashes in stored.items() if isinstance(hashes, list)}


def _remember(remembered: dict[str, list[str]], path: str, digest: str) -> None:
    remembered[path] = [*remembered.get(path, []), digest]
    store = _store()
    # Where nothing can be remembered (a read-only container), permission holds for this run.
    with contextlib.suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        part = store.with_name(f"{store.name}.{os.getpid()}")
        part.write_text(json.dumps(remembered, indent=1) + "\n", encoding="utf-8")
        part.replace(store)
