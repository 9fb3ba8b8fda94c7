"""Images without labels: a folder, an array or a table, read as the sources read theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from attar.data.base import UNLABELLED
from attar.data.config import DataConfig
from attar.data.images import as_images, fit_images
from attar.data.sources.folder import SUFFIXES, images_under, read_files
from attar.data.sources.huggingface import images_of_rows
from attar.data.sources.npz import arrays_in
from attar.errors import DataError

EXPECTED = "a folder of images, a .npz or .npy file of one array of images, or Parquet files"


def unlabelled_images(path: Path, config: DataConfig) -> np.ndarray:
    """All images at `path`, in the size and color that `config` asks for: uint8, or float32 of 0
    to 1, (N, C, H, W); a folder's and a table's may be a file mapped to memory.

    path: a folder of images at any depth, or of Parquet files, a Parquet file, a .npy file, or a
        .npz file that holds one array of images. Labels that stand beside them are not looked at.
    Raises `DataError` for anything else, and for images that can't be read.

    Example:
        >>> unlabelled_images(Path("photos"), DataConfig(source="digits"))  # doctest: +SKIP
    """
    if path.is_dir():
        files = images_under(path)
        if files:
            labelled = [(file, UNLABELLED) for file in files]
            return read_files(labelled, path, config).images
        if any(path.rglob("*.parquet")):
            return images_of_rows(path, config)
        raise DataError(f"{path} has no images ({', '.join(sorted(SUFFIXES))}) and no .parquet")
    kind = path.suffix.lower()
    if kind == ".parquet":
        return images_of_rows(path, config)
    if kind in (".npz", ".npy"):
        images = as_images(_array(path), str(path))
        if not len(images):
            raise DataError(f"{path} has no images")
        return fit_images(images, config, str(path))
    raise DataError(f"can't read unlabelled images from {path}: {EXPECTED} would work")


def _array(path: Path) -> np.ndarray:
    """The one array of images in a file."""
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise DataError(f"can't read {path} as an array of numbers: {error}") from None
    arrays = {name: a for name, a in arrays_in(path).items() if a.ndim in (3, 4)}
    if len(arrays) != 1:
        raise DataError(
            f"{path} has {len(arrays)} arrays of images ({', '.join(sorted(arrays)) or 'none'}): "
            "one was expected, as the others may be what is tested on"
        )
    return next(iter(arrays.values()))
