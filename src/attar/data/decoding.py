"""Encoded images, decoded once: in threads, into arrays on disk that later runs map to memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from attar.data.config import DataConfig
from attar.data.images import Frame, framed
from attar.data.parts import Examples
from attar.errors import DataError, StorageError
from attar.store import cache_folder

FORMAT = 1
"""Raised when decoding gives other pixels, so that older caches are not taken for new ones."""
BLOCK = 2048
CHUNK = 64


class Encoded(NamedTuple):
    """An image not yet decoded: what messages call it, and what gives it with its label."""

    name: str
    open: Callable[[], tuple[Image.Image, int]]


def decoded(
    items: Callable[[], Iterable[Encoded]], count: int, config: DataConfig, key: Any
) -> Examples:
    """The examples of `count` encoded images, from the cache if they were decoded before.

    items: called only to decode. key: JSON values that change when the images do: their files'
        paths, sizes and times of change.
    Raises `DataError` naming an image that can't be read, `StorageError` where the disk is full.
    """
    record = json.dumps([FORMAT, count, config.size, config.color, key], sort_keys=True)
    folder = cache_folder() / "images" / hashlib.sha256(record.encode()).hexdigest()[:32]
    if not folder.exists():
        _store(items, count, config, folder)
    # copy-on-write: PyTorch wants writable memory, the file stays as it is
    images = np.load(folder / "images.npy", mmap_mode="c", allow_pickle=False)
    return Examples(images, np.load(folder / "targets.npy", allow_pickle=False))


def file_stamp(path: Path, root: Path) -> list[Any]:
    """What tells that a file is the one it was: its place under `root`, size, time of change."""
    stat = path.stat()
    return [path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns]


def _store(
    items: Callable[[], Iterable[Encoded]], count: int, config: DataConfig, folder: Path
) -> None:
    """Decodes into a temporary folder and moves it into place: a cache is whole or absent."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    except OSError as error:
        raise _no_room(folder.parent, error) from None
    try:
        _decode(items(), count, config, work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same images
                raise
    except OSError as error:
        raise _no_room(folder.parent, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode(items: Iterable[Encoded], count: int, config: DataConfig, work: Path) -> None:
    stream = iter(items)
    first = next(stream)
    image, _ = first.open()
    frame = Frame.of(config, image)
    images = _reserve(work / "images.npy", (count, *frame.shape))
    targets = np.empty(count, np.int64)

    def fill(start: int, chunk: list[Encoded]) -> None:
        for i, item in enumerate(chunk, start):
            image, targets[i] = item.open()
            images[i] = framed(image, frame, item.name)

    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for block in _blocks(chain([first], stream), BLOCK):
            chunks = [block[i : i + CHUNK] for i in range(0, len(block), CHUNK)]
            starts = range(done, done + len(block), CHUNK)
            for _ in pool.map(fill, starts, chunks):
                pass
            done += len(block)
    if done != count:
        raise DataError(f"{count:,} images were listed but {done:,} were there to read")
    images.flush()
    np.save(work / "targets.npy", targets)


def _reserve(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new array file whose room on disk is taken at once: writing to a mapped file on a full
    disk would kill the process."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def _no_room(folder: Path, error: OSError) -> StorageError:
    cure = "free some space or set" if error.errno == errno.ENOSPC else "set"
    return StorageError(
        f"can't keep decoded images in {folder} ({error.strerror}): "
        f"{cure} ATTAR_CACHE to a folder with room"
    )


def _blocks(items: Iterator[Encoded], size: int) -> Iterator[list[Encoded]]:
    while block := list(islice(items, size)):
        yield block
