"""The command line. Thin: every command is one call into the library.

Nothing here imports PyTorch before a command needs it, so that help and mistakes answer at once.
"""

import attar.cli.packing  # noqa: F401 - adds its commands
from attar.cli.commands import app


def main() -> None:
    """What `attar` runs."""
    app()


__all__ = ["app", "main"]
