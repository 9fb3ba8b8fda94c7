"""Results by content: what was computed once from the same inputs is not computed again.

A key is a hash of everything a result depends on. An entry is a folder that appears whole or not
at all. Work in progress (checkpoints) has a folder of its own by the same key, so that a run that
was killed goes on where it was, whoever asks next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir
from safetensors import SafetensorError

from attar.errors import StorageError

RUN_FILES = ("recipe.yaml", "ledger.json", "log.jsonl", "details.json", "report.html")


def cache_folder() -> Path:
    """Where Attar keeps what can be computed again; the environment's `ATTAR_CACHE` moves it."""
    return Path(os.environ.get("ATTAR_CACHE") or user_cache_dir("attar"))


def key_of(**inputs: Any) -> str:
    """A hash of JSON values: the same inputs give the same key on any machine. `TypeError` for
    others, whose text (an address, a set's order) may differ between processes."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Store:
    """Folders by key under one root."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_folder() / "store"

    def get(self, key: str) -> Path | None:
        """The entry's folder, or `None`."""
        folder = self.root / "entries" / key
        return folder if folder.is_dir() else None

    def work(self, key: str) -> Path:
        """The folder for work in progress on `key`; gone once the entry is there."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def compute(self, key: str, make: Callable[[Path, Path], None]) -> tuple[Path, bool]:
        """The entry for `key`, made by `make(folder, work)` if it isn't there yet, and whether it
        was there already. Another process making the same entry is waited for.

        Raises `StorageError` when the disk is full; nothing half-written is left as an entry.
        """
        found = self.get(key)
        if found is not None:
            return found, True
        with self._lock(key):
            found = self.get(key)
            if found is not None:
                return found, True
            folder = self.root / "entries" / key
            with full_disk_as_error(folder):
                work = self.work(key)
                with self._part(key) as part:
                    make(part, work)
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    part.rename(folder)
            shutil.rmtree(work, ignore_errors=True)
            return folder, False

    @contextmanager
    def _part(self, key: str) -> Iterator[Path]:
        """An empty folder to make an entry in; what is still there afterwards is half an entry."""
        part = self.root / "parts" / key
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Forgets the entry for `key`, whole or begun: it is made again when it is next wanted."""
        with self._lock(key):
            for kind in ("entries", "work"):
                shutil.rmtree(self.root / kind / key, ignore_errors=True)

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with locked(locks / key):
            yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file; another process that holds it is waited for."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it if the process is killed
        yield


@contextmanager
def full_disk_as_error(place: Path) -> Iterator[None]:
    """Turns "no space left" into a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise StorageError(
                f"no room left to write {place}: free some space and go on with --resume"
            ) from error
        raise


def _is_full(error: Exception) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    # in words: safetensors' errors, and those that shutil.copytree collects
    return any(f"os error {n})" in str(error) or f"[Errno {n}]" in str(error) for n in numbers)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a run's folder. Raises `StorageError` while another process is writing it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"another run is writing {folder}: wait for it, or choose another --out"
            ) from None
        yield


def clear_run(folder: Path) -> None:
    """Removes from a run's folder what a run writes; anything else there stays."""
    for name in ("bundle", "student", "stages", "tracking"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a half."""
    part = path.with_name(path.name + ".part")
    with full_disk_as_error(path):
        try:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def view(source: Path, place: Path) -> None:
    """Shows a stored folder at `place`, as a copy: what a person edits there leaves the store
    alone."""
    shutil.rmtree(place, ignore_errors=True)
    with full_disk_as_error(place):
        shutil.copytree(source, place)
