"""What a student costs where it is deployed: exported, loaded, timed, for whoever must choose."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attar.measure.latency import time_interleaved
from attar.runtimes.base import Runtime, Session


@dataclass
class Target:
    """A runtime, and how it is asked.

    The first student that is timed is timed again beside every other: what the machine does
    meanwhile slows both, and is taken out.

    example, dynamic_shapes, names: as `Runtime.export` takes them. inputs: one batch as the model
    is deployed to answer it. seconds: for which a student is timed.
    """

    runtime: Runtime
    example: tuple[Any, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]
    names: tuple[list[str], list[str]]
    inputs: tuple[np.ndarray, ...]
    threads: int = 1
    seconds: float = 1.5
    _first: tuple[Session, float] | None = field(default=None, init=False)

    def bytes(self, student: Any) -> float:
        """Of the exported files."""
        with self._exported(student) as (_, files):
            return float(sum(file.stat().st_size for file in files))

    def latency_ms(self, student: Any) -> float:
        """The median time of an answer."""
        with self._exported(student) as (folder, _):
            session = self.runtime.session(folder, threads=self.threads)
            if self._first is None:
                alone = self._timed(it=session)["it"]
                self._first = (session, alone)
                return alone
            first, before = self._first
            timed = self._timed(it=session, first=first)
            return timed["it"] * before / timed["first"]

    def export(self, student: Any, folder: Path) -> list[Path]:
        """Writes the student's file(s)."""
        return self.runtime.export(
            student,
            folder,
            example=self.example,
            dynamic_shapes=self.dynamic_shapes,
            names=self.names,
        )

    def _timed(self, **sessions: Session) -> dict[str, float]:
        calls = {name: partial(s, *self.inputs) for name, s in sessions.items()}
        timed = time_interleaved(calls, seconds=self.seconds)
        return {name: float(found["p50_ms"]) for name, found in timed.items()}

    @contextmanager
    def _exported(self, student: Any) -> Iterator[tuple[Path, list[Path]]]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder), self.export(student, Path(folder))
