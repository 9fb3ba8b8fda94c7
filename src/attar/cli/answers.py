"""Answers of a deployed model to files. No PyTorch: the same lines as a bundle's `predict.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attar.errors import BundleError, DataError
from attar.runtimes import _predict
from attar.runtimes.bundle import MANIFEST, read_bundle

Ranked = list[tuple[str, float]]


def find_bundle(folder: Path) -> Path:
    """The bundle in a run's folder, or the folder itself if it is one. Raises `BundleError`."""
    if (folder / MANIFEST).is_file():
        return folder
    if (folder / "bundle" / MANIFEST).is_file():
        return folder / "bundle"
    if not folder.exists():
        raise BundleError(f"there is no run or bundle at {folder}")
    if (folder / "recipe.yaml").is_file():
        raise BundleError(
            f"{folder} holds an unfinished run, without a bundle: run it with --resume"
        )
    raise BundleError(f"{folder} is neither a run nor a bundle: it has no {MANIFEST}")


def answers(folder: Path, inputs: list[Path], threads: int = 1) -> Iterator[tuple[Path, Ranked]]:
    """Each input's classes with their probabilities, best first.

    Raises `BundleError` for a folder that can't answer, `DataError` for an unreadable input.
    """
    bundle = read_bundle(find_bundle(folder))
    session = bundle.session(threads=threads)
    classes = bundle.manifest["outputs"][0].get("classes")
    for path in inputs:
        try:
            prepared = _predict.read(path, bundle.manifest["inputs"])
        except _predict.Problem as problem:
            raise DataError(str(problem)) from None
        try:
            outputs = session(*prepared)
        except Exception as error:  # runtimes' errors share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"the model does not take {path}: {reason}") from None
        yield path, _predict.rank(outputs[0][0], classes)
