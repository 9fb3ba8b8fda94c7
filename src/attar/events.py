"""What happens during a run, told to whoever listens: the screen, a log file, a notebook.

Events, by `event`, and their fields:

- `run`: recipe, folder. `note`: text, a sentence said to the person. `done`: folder, report.
- `stage`: name, index, of, cached (taken from the store instead of computed).
- `step`: label, epoch, epochs, step, steps, loss (`None` where nothing is being trained). Live
  progress, at most a few a second.
- `epoch`: label, epoch (from 1), epochs, loss, terms (name to value), metric (name, unit,
  value; on validation), lr, seconds, eta_s, best (whether this epoch is the best so far).
- `trial`: of a search (`ratio: auto`): setting, value, metric, drop, kept (whether the budget
  holds). Of a list that is tried too, with bytes (the packed file's); there drop and kept are
  `None` where there is no teacher, kept also where there is no budget.
- `cell`: of a sensitivity analysis: name (of its layers), ratio, drop, done, of (how many are
  measured, of how many).
- `row`: row, a ledger row as in `ledger.json`.
- `budget`: met, certain, figures (a list of name, limit, value, met).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]
"""Takes an event: a dict with `event` (its kind) and that kind's fields, all JSON values."""


def silent(event: dict[str, Any]) -> None:
    """The listener that hears nothing."""


class Log:
    """Appends every event to a `log.jsonl`, a line each, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            return  # live progress only: a line a step would drown the epochs
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")


def several(*listeners: Listener) -> Listener:
    """One listener that passes each event on to all of `listeners`."""

    def tell(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener(event)

    return tell
