"""What a run hands back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attar.errors import UsageError
from attar.student import Student


@dataclass
class Run:
    """A finished run: its folder, its ledger, its student, and the exported file, answering.

    In a notebook it shows its ledger.
    """

    folder: Path
    ledger: dict[str, Any]
    _student: Student

    @property
    def student(self) -> Any:
        """The compressed network: an ordinary `nn.Module`, pruned for real."""
        return self._student.module

    @property
    def budget_met(self) -> bool:
        """Whether every limit of the budget is kept, judged on validation."""
        return bool(self.ledger["budget"]["met"])

    def session(self, *inputs: Any) -> np.ndarray:
        """The deployed file's answer to one batch (arrays or tensors, prepared as in training)."""
        from attar.runtimes.bundle import read_bundle

        if not hasattr(self, "_session"):
            self._session = read_bundle(self.folder / "bundle").session()
        return self._session(*(np.asarray(x) for x in inputs))[0]

    def report(self) -> Path:
        """The path of the page with everything on it."""
        return self.folder / "report.html"

    def _repr_html_(self) -> str:
        from attar.report.table import ledger_html

        return ledger_html(self.ledger)


def read_ledger(folder: Path) -> dict[str, Any]:
    """A run's ledger. Raises `UsageError` where there is none or it is from a newer version."""
    path = folder / "ledger.json"
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a run's folder: it has no ledger.json") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if ledger.get("schema") != 1:
        raise UsageError(
            f"{path} has schema {ledger.get('schema')}; this Attar reads schema 1: upgrade attar"
        )
    return ledger
