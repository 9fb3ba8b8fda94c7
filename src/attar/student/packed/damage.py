"""What is said of a packed file that can't be read."""

from __future__ import annotations

from attar.errors import CheckpointError


def damaged(what: str) -> CheckpointError:
    """The error for a file that isn't what it should be."""
    return CheckpointError(f"the packed student is damaged: {what}")
