"""Runs' folders on the command line: where a run goes, and what happens to one that is there."""

from __future__ import annotations

from pathlib import Path

from attar.errors import UsageError
from attar.store import clear_run, sole_writer


def run_folder(recipe: str, name: str) -> Path:
    """`runs/NAME`; the folder itself where the recipe was given as a run's folder."""
    return Path(recipe) if Path(recipe).is_dir() else Path("runs") / name


def make_way(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that a run may write `folder`.

    Raises `UsageError` where it holds a run that is neither to be gone on with nor replaced, or
    something else; `StorageError` while another run is writing it.
    """
    if folder.is_file():
        raise UsageError(f"{folder} is a file: choose another folder with --out")
    held = {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()
    if not held or (resume and not overwrite and _is_run(held)):
        return
    if not _is_run(held):
        raise UsageError(f"{folder} holds something that is no run: choose another --out")
    if not overwrite:
        state = "a finished run" if (folder / "report.html").exists() else "an unfinished run"
        raise UsageError(
            f"{folder} holds {state}: go on with --resume, replace it with --overwrite, or choose "
            "another --out"
        )
    with sole_writer(folder):
        clear_run(folder)


def _is_run(held: set[str]) -> bool:
    return bool(held & {"recipe.yaml", "log.jsonl", "ledger.json", "tracking"})
