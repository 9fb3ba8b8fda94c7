"""Runs stages in order, measures after each, resumes."""

from attar.pipeline.checking import check
from attar.pipeline.entry import dry_run, evaluate, run
from attar.pipeline.result import Run, read_ledger

__all__ = ["Run", "check", "dry_run", "evaluate", "read_ledger", "run"]
