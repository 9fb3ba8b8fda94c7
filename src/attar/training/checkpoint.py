"""A training's state on disk, written whole or not at all, read without running code."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

from attar.errors import CheckpointError, StorageError


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain values beside `path`, then renames: a kill leaves the old one.

    Raises `StorageError` when the disk is full; the old checkpoint is still there then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no room to write the checkpoint {path}: free some space and go on with --resume"
            ) from error
        raise


def load_checkpoint_state(path: Path) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, or `None` where there is none."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the training checkpoint {path} is damaged ({type(error).__name__}): delete it to "
            "start this training again"
        ) from error
