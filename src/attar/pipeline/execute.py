"""Runs a job: stages in order, each followed by an export and its measurements; resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from attar.errors import UsageError
from attar.events import Listener, Log, several, silent
from attar.pipeline.details import details_of
from attar.pipeline.job import Job, require_answers, require_runtime
from attar.pipeline.ledger import Ledger
from attar.pipeline.result import Run
from attar.pipeline.steps import Steps
from attar.store import Store, clear_run, full_disk_as_error, key_of, sole_writer, view, write_whole
from attar.student import Student, save_student


def execute(
    job: Job,
    folder: Path,
    *,
    tell: Listener = silent,
    store: Store | None = None,
) -> Run:
    """Does the job and writes its folder: `recipe.yaml`, `ledger.json`, `report.html`, `bundle/`,
    `student/`, `stages/`, `log.jsonl`. What the store holds is not computed again.

    Raises the `AttarError` of whatever goes wrong; what was finished stays in the store, and the
    same call goes on from there. Networks that don't fit the data are refused before anything is
    written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a run is one process: start it without torchrun or accelerate launch "
            "(attar.training.loop.train is what trains in several)"
        )
    require_runtime(job.deploy)
    for origin, who in ((job.teacher, "teacher"), (job.student, "student")):
        if origin is not None:
            require_answers(job, origin.fresh(job.seed), who)
    with sole_writer(folder), full_disk_as_error(folder):
        return _Execution(job, folder, store or Store(), tell).run()


class _Execution:
    def __init__(self, job: Job, folder: Path, store: Store, tell: Listener) -> None:
        self.job, self.folder = job, folder
        if _holds_another(folder, job):
            clear_run(folder)  # its rows and stages would stand beside this one's
        (folder / "log.jsonl").unlink(missing_ok=True)
        log = Log(folder / "log.jsonl")
        self.tell = several(log, tell)
        self.steps = Steps(job, store, log, self.tell)
        self.ledger = Ledger(folder, self.steps, self.tell)

    def run(self) -> Run:
        job, ledger = self.job, self.ledger
        self.tell({"event": "run", "recipe": job.name, "folder": str(self.folder)})
        write_whole(self.folder / "recipe.yaml", job.text)
        for note in job.data.notes:
            ledger.note(note)
        teacher, teacher_key = self.steps.teacher()
        ledger.teacher_row(teacher, teacher_key)
        ledger.plain_rows(teacher, teacher_key)
        student, key, origin = self.steps.student(teacher, teacher_key)
        for index, stage in enumerate(job.stages, start=1):
            name = f"{index:02}-{stage.name}"
            teaching = (teacher, teacher_key)
            student, key, entry = self.steps.stage(
                stage, student, key, origin, teaching, name, baseline=ledger.baseline
            )
            place = self.folder / "stages" / name
            view(entry / "student", place / "student")
            if (plan := entry / "plan.json").exists():
                write_whole(place / "plan.json", plan.read_text(encoding="utf-8"))
            ledger.exported_row(stage.name, index, student, key, f"stages/{name}/bundle")
        self.deploy(student, key)
        return self.finish(student)

    def deploy(self, student: Student, key: str) -> None:
        """The last row: the graph optimised, beside the same graph with passes off."""
        self.steps.begin("deploy")
        optimise = self.job.deploy.graph == "all"
        index = len(self.job.stages) + 1
        self.ledger.exported_row(
            "deploy", index, student, key_of(deploy=key), "bundle", optimise=optimise
        )

    def finish(self, student: Student) -> Run:
        self.ledger.measure_together()
        ledger = self.ledger.write(done=True)
        save_student(student, self.folder / "student")
        details = details_of(self.job, self.ledger.rows, self.steps.found, self.ledger.notes)
        write_whole(self.folder / "details.json", json.dumps(details) + "\n")
        from attar.report import write_report

        report = write_report(self.folder)
        self.tell({"event": "budget", **ledger["budget"]})
        self.tell({"event": "done", "folder": str(self.folder), "report": str(report)})
        return Run(self.folder, ledger, student)


def _holds_another(folder: Path, job: Job) -> bool:
    """Whether the folder has figures of another recipe than this job's."""
    recipe = folder / "recipe.yaml"
    if not (folder / "ledger.json").exists() or not recipe.exists():
        return False
    return recipe.read_text(encoding="utf-8") != job.text
