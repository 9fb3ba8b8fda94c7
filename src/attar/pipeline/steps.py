"""The computed steps of a run: trained teachers and stages, each stored by what it depends on."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import attar
from attar.events import Listener, Log, several
from attar.models import inherit
from attar.pipeline.job import Job, Origin, content_of
from attar.prune.plan import readable
from attar.stages.base import Context, Stage
from attar.store import Store, key_of
from attar.student import Student, save_student
from attar.student.fingerprint import source_of
from attar.training.loop import train
from attar.training.objective import TaskObjective


class Steps:
    """Computes what the store doesn't hold, tells which step it is, keeps each step's events.

    of: how many steps there are in all. log: where events go that were told before a kill; `tell`
    tells people too. seconds: how long each step took when it was computed, by key. found: what
    stages found out, by name.
    """

    def __init__(self, job: Job, store: Store, log: Listener, tell: Listener) -> None:
        self.job, self.store = job, store
        self._log, self._tell = log, tell
        self._step = 0
        self._of = len(job.prepare) + len(job.stages) + (job.train is not None) + 1
        self.seconds: dict[str, float] = {}
        self.found: dict[str, Any] = {}

    def begin(self, name: str, cached: bool = False) -> None:
        """Tells that the next step begins, or is there already."""
        self._step += 1
        event = {"event": "stage", "name": name, "index": self._step, "of": self._of}
        self._tell({**event, "cached": cached})

    def teacher(self) -> tuple[Student, str]:
        """The teacher: as handed in or loaded, else trained; then prepared by stages."""
        job, origin = self.job, self.job.teacher
        teacher, key = origin.fresh(job.seed), key_of(origin=origin.key, seed=job.seed)
        if job.train is not None:
            training = job.train
            key = key_of(teacher=key, train=training.model_dump(), **self.inputs())

            def make(folder: Path, work: Path) -> None:
                train(
                    teacher.module,
                    data=job.data,
                    task=job.task,
                    training=training,
                    objective=TaskObjective(job.task, training.label_smoothing),
                    seed=job.seed,
                    checkpoint=work / "train.pt",
                    tell=self.recorder(work),
                    label="teacher",
                )
                save_student(teacher, folder / "student")

            teacher, _ = self.compute("teacher", key, make, origin)
        for index, stage in enumerate(job.prepare, start=1):
            name = f"teacher-{index:02}-{stage.name}"
            teacher, key, _ = self.stage(stage, teacher, key, origin, (None, ""), name)
        return teacher, key

    def student(self, teacher: Student, teacher_key: str) -> tuple[Student, str, Origin]:
        """The student before any stage, its key, and the origin its edits are replayed on."""
        origin = self.job.student
        if origin is None:
            return teacher.copy(), teacher_key, self.job.teacher
        seed = self.job.seed + 1  # not the teacher's initial weights
        student, key = origin.fresh(seed), key_of(origin=origin.key, seed=seed)
        if self.job.from_teacher:
            inherit(student.module, teacher.module, self.job.from_teacher)
            key = key_of(student=key, teacher=teacher_key, layers=self.job.from_teacher)
        return student, key, origin

    def stage(
        self,
        stage: Stage,
        student: Student,
        key: str,
        origin: Origin,
        teaching: tuple[Student | None, str],
        name: str,
        *,
        baseline: float | None = None,
    ) -> tuple[Student, str, Path]:
        """The student after one stage, from the store or computed; its key and stored folder.

        teaching: the teacher and its key. baseline: the teacher's metric on validation.
        """
        job = self.job
        teacher, teacher_key = teaching
        deploy = job.deploy.model_dump() if stage.measures_runtime else {}
        key = key_of(
            student=key,
            stage=stage.name,
            code=source_of(type(stage)),
            settings=stage.model_dump(mode="json"),
            files=[content_of(path).hex() for path in stage.files],
            teacher=teacher_key,
            budget=job.budget.max_drop if stage.searches else None,
            deploy=deploy,
            **self.inputs(),
        )

        def make(folder: Path, work: Path) -> None:
            run = Context(
                task=job.task,
                data=job.data,
                teacher=teacher.module if teacher is not None else None,
                seed=job.seed,
                work=work,
                store=self.store,
                tell=self.recorder(work),
                runtime=job.deploy.runtime,
                threads=job.deploy.threads,
                batch=job.deploy.batch,
                max_drop=job.budget.max_drop,
                baseline=baseline,
            )
            result = stage.apply(student.copy(), run)
            result.check()
            save_student(result, folder / "student")
            (folder / "found.json").write_text(json.dumps(run.found) + "\n", encoding="utf-8")
            if "plan" in run.found:
                plan = readable(run.found["plan"])
                (folder / "plan.json").write_text(plan, encoding="utf-8")

        result, entry = self.compute(name, key, make, origin)
        found = entry / "found.json"
        if found.exists() and (content := json.loads(found.read_text(encoding="utf-8"))):
            self.found[name] = content
        return result, key, entry

    def compute(
        self, name: str, key: str, make: Callable[[Path, Path], None], origin: Origin
    ) -> tuple[Student, Path]:
        """One stored step that ends with a student; its events are kept with it."""
        self.begin(name, cached=self.store.get(key) is not None)

        def with_events(folder: Path, work: Path) -> None:
            events = work / "events.jsonl"
            for told in _told_once(events):  # by a process that was killed
                self._log(told)
            started = time.perf_counter()
            make(folder, work)
            seconds = round(time.perf_counter() - started, 1)
            (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
            if events.exists():
                shutil.copy(events, folder / "events.jsonl")

        entry, was_there = self.store.compute(key, with_events)
        self.seconds[key] = json.loads((entry / "seconds.json").read_text(encoding="utf-8"))
        if was_there:
            for told in _told_once(entry / "events.jsonl"):
                self._log(told)
        return origin.load(entry / "student"), entry

    def recorder(self, work: Path) -> Listener:
        """Tells events on, and keeps them in the work folder for whoever finds the result."""
        return several(Log(work / "events.jsonl"), self._tell)

    def inputs(self) -> dict[str, Any]:
        """What every computed step depends on besides its own settings."""
        return {
            "data": self.job.data.fingerprint,
            "task": self.job.task.name,
            "judge": source_of(type(self.job.task)),
            "run_seed": self.job.seed,
            "attar": attar.__version__,
            "torch": torch.__version__,
        }


def _told_once(path: Path) -> list[dict[str, Any]]:
    """The events in a file; what was told twice around a kill counts once, as it was told last."""
    if not path.exists():
        return []
    events: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line that a full disk cut off
            event = json.loads(line)
            events[_said(event)] = event
    return list(events.values())


def _said(event: dict[str, Any]) -> str:
    """What an event says, whenever it is told and however long it took."""
    if event["event"] == "epoch":
        return f"{event['label']} {event['epoch']}"
    return json.dumps({**event, "time": None})
