"""A bundle: the folder that is deployed. It says what it is, proves it is whole, and answers."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from attar.errors import BundleError, StorageError
from attar.runtimes.base import GraphPasses, Runtime, Session, runtimes

SCHEMA = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
PREDICT = "predict.py"
TEMPLATE = Path(__file__).with_name("_predict.py")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files are there and undamaged.

    Example:
        >>> bundle = read_bundle(Path("runs/digits/bundle"))  # doctest: +SKIP
        >>> (logits,) = bundle.session(threads=1)(images)     # doctest: +SKIP
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def runtime(self) -> Runtime:
        """What executes it. Raises `UsageError` for a runtime this Attar doesn't know."""
        return runtimes.get(self.manifest["runtime"]["name"])()

    @property
    def bytes(self) -> int:
        """The size of the model file(s)."""
        return sum(entry["bytes"] for entry in self.manifest["files"])

    def session(self, *, threads: int = 1, passes: GraphPasses = "all") -> Session:
        """The model, loaded. Raises `BundleError` when the runtime is absent or refuses it."""
        ready, how = self.runtime.available()
        if not ready:
            raise BundleError(f"{self.folder} needs the runtime {self.runtime.name}: {how}")
        return self.runtime.session(self.folder, threads=threads, passes=passes)

    def golden(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Real inputs and the outputs expected for them, each batch first."""
        path = self.folder / GOLDEN
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = sorted(arrays.files)
                return (
                    tuple(arrays[n] for n in names if n.startswith("input_")),
                    tuple(arrays[n] for n in names if n.startswith("output_")),
                )
        except (ValueError, BadZipFile, EOFError) as error:
            raise BundleError(f"{path} is damaged: {error}") from None


def write_bundle(
    folder: Path,
    *,
    runtime: Runtime,
    export: Callable[[Path], Sequence[Path]],
    task: str,
    description: dict[str, Any],
    golden: tuple[np.ndarray, ...],
    recipe_sha256: str | None = None,
    notes: dict[str, Any] | None = None,
) -> Bundle:
    """Makes the bundle `folder`, replacing one that is there; all of it appears, or nothing.

    export: writes the model file(s) into the folder it is given and returns their paths.
    description: the task's `inputs` and `outputs` (`Task.describe`).
    golden: some real inputs, batch first; what the exported model answers to them here is stored
        as the outputs that other machines are held to.
    notes: further fields of the manifest, such as `quantization`.

    Raises `StorageError` where the disk is full or can't be written, and whatever `export` raises;
    either way a bundle that was there before stays.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with _told_of_disk(folder), _scratch(partial):
        files = [Path(p) for p in export(partial)]
        core = {"schema": SCHEMA, "task": task, **description}
        runtime.embed(partial, core)
        outputs = runtime.session(partial)(*golden)
        _write_golden(partial / GOLDEN, golden, outputs)
        shutil.copyfile(TEMPLATE, partial / PREDICT)
        manifest = {
            **core,
            "files": [file_entry(p, partial) for p in files],
            "recipe_sha256": recipe_sha256,
            "attar": version("attar"),
            "runtime": runtime.describe(partial),
            "golden": {**file_entry(partial / GOLDEN, partial), "n": len(golden[0])},
            **(notes or {}),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        _put_in_place(partial, folder)
    return Bundle(folder, manifest)


def read_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, its files checked against their checksums.

    Raises `BundleError` for a folder that is no bundle, a newer schema, a missing or damaged file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for entry in [*manifest["files"], *filter(None, [manifest.get("golden")])]:
        _verify(folder, entry)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json`, checked for its schema and the fields that loading needs."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}") from None
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise BundleError(f"{path} is not a bundle's manifest: it has no schema number")
    if manifest["schema"] > SCHEMA:
        raise BundleError(
            f"{path} has schema {manifest['schema']}; this Attar reads up to {SCHEMA}: "
            "upgrade attar, or use the bundle's own predict.py"
        )
    missing = [k for k in ("task", "inputs", "outputs", "files", "runtime") if k not in manifest]
    if missing:
        raise BundleError(f"{path} lacks {', '.join(missing)}: the bundle is incomplete")
    return manifest


def file_entry(path: Path, folder: Path) -> dict[str, Any]:
    """A file as the manifest lists it: `path`, `bytes`, `sha256`."""
    content = path.read_bytes()
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _verify(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["path"]
    if folder.resolve() not in path.resolve().parents:
        raise BundleError(
            f"{folder / MANIFEST} lists {entry['path']}, which lies outside the bundle"
        )
    if not path.is_file():
        raise BundleError(f"{path} is missing: copy the whole bundle folder again")
    if file_entry(path, folder)["sha256"] != entry["sha256"]:
        raise BundleError(
            f"{path} is damaged or was changed: its checksum is not the manifest's; "
            "copy the bundle again"
        )


def _write_golden(
    path: Path, inputs: tuple[np.ndarray, ...], outputs: tuple[np.ndarray, ...]
) -> None:
    arrays = {f"input_{i:02}": x for i, x in enumerate(inputs)}
    arrays |= {f"output_{i:02}": y for i, y in enumerate(outputs)}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


@contextmanager
def _scratch(partial: Path) -> Iterator[None]:
    """An empty folder, gone afterwards unless it was moved into place."""
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    partial.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _told_of_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full: {folder} could not be written; free some space and run again"
            ) from error
        raise StorageError(f"{folder} could not be written: {error.strerror or error}") from error
