"""A run's folder as the report reads it: whatever is there, nothing more demanded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attar.errors import AttarError, UsageError

SCHEMA = 1


@dataclass(frozen=True)
class RunRecord:
    """What a run left so far. Every part may be empty: a run can be interrupted anywhere."""

    folder: Path
    ledger: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""

    @cached_property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        recipe = self.ledger.get("recipe")
        if isinstance(recipe, dict):
            recipe = recipe.get("name")
        return recipe if isinstance(recipe, str) and recipe else self.folder.resolve().name

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.ledger.get("rows") or []

    def row(self, stage: str) -> dict[str, Any] | None:
        """The row of one stage; the last, if it occurs more than once."""
        return next((row for row in reversed(self.rows) if row.get("stage") == stage), None)

    @property
    def teacher(self) -> dict[str, Any] | None:
        return self.row("teacher")

    @property
    def final(self) -> dict[str, Any] | None:
        """The last row that is about the student: what came out, or what has so far."""
        return next((r for r in reversed(self.rows) if r.get("stage") not in BASELINES), None)

    @property
    def finished(self) -> bool:
        return self.row("deploy") is not None


BASELINES = frozenset({"teacher", "exported", "plain-int8"})
"""Rows about the teacher: what there is without compression."""


def read_run(folder: Path) -> RunRecord:
    """The record in `folder`. Raises `UsageError` where there is none, `AttarError` for a damaged
    ledger or one of a newer version."""
    if not folder.is_dir():
        raise UsageError(f"there is no run in {folder}: give a run's folder, such as runs/digits")
    record = RunRecord(
        folder,
        ledger=_json(folder / "ledger.json"),
        events=_lines(folder / "log.jsonl"),
        details=_json(folder / "details.json"),
        recipe=_text(folder / "recipe.yaml"),
    )
    if not (record.ledger or record.events or record.recipe):
        raise UsageError(
            f"{folder} is not a run's folder: it has no ledger.json, log.jsonl or recipe.yaml"
        )
    schema = record.ledger.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise AttarError(
            f"{folder / 'ledger.json'} has schema {schema!r}; this Attar reads up to {SCHEMA}: "
            "upgrade attar"
        )
    return record


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise AttarError(f"{path} is damaged ({error}): run again with --resume") from None
    if not isinstance(content, dict):
        raise AttarError(f"{path} is damaged (not an object): run again with --resume")
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    """The events; a line that a kill cut in half is passed over."""
    events = []
    for line in _text(path).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
