"""Runs a job: stages in order, each followed by an export and its measurements; resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attar
from attar.errors import ExportError, UsageError
from attar.events import Listener, Log, several, silent
from attar.measure.intervals import ratio_interval
from attar.measure.machine import environment, package_version
from attar.measure.memory import session_memory_mb
from attar.models import inherit
from attar.pipeline.budget import judge
from attar.pipeline.details import details_of
from attar.pipeline.job import Job, Origin, content_of, require_answers, source_of
from attar.pipeline.result import Run
from attar.pipeline.rows import (
    Row,
    as_record,
    counts,
    eager_call,
    eager_entry,
    inputs_of,
    load_row,
    reference_outputs,
    session_arrays,
    store_facts,
    timed_on,
)
from attar.quantize import quantized_reference
from attar.runtimes import runtimes
from attar.runtimes.bundle import MANIFEST, read_bundle, write_bundle
from attar.runtimes.parity import FLOAT, QUANTIZED, check_parity
from attar.stages.base import Context, Stage
from attar.store import Store, clear_run, full_disk_as_error, key_of, sole_writer, view, write_whole
from attar.student import Student, save_student
from attar.training.loop import train
from attar.training.objective import TaskObjective

PARITY_EXAMPLES = 512
GOLDEN_EXAMPLES = 8
CALIBRATION_EXAMPLES = 512
FIRST_LOOK_SECONDS = 0.3
FINAL_SECONDS = 1.5


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
    for origin, who in ((job.teacher, "teacher"), (job.student, "student")):
        if origin is not None:
            require_answers(job, origin.fresh(job.seed), who)
    with sole_writer(folder), full_disk_as_error(folder):
        return _Execution(job, folder, store or Store(), tell).run()


class _Execution:
    def __init__(self, job: Job, folder: Path, store: Store, tell: Listener) -> None:
        self.job, self.folder, self.store = job, folder, store
        if _holds_another(folder, job):
            clear_run(folder)  # its rows and stages would stand beside this one's
        (folder / "log.jsonl").unlink(missing_ok=True)
        self.log = Log(folder / "log.jsonl")
        self.tell = several(self.log, tell)
        self.rows: list[Row] = []
        self.records: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}
        self.notes: list[str] = []
        self.runtime = runtimes.get(job.deploy.runtime)()
        self.steps = len(job.prepare) + len(job.stages) + (job.train is not None) + 1
        self.step = 0
        self.seconds: dict[str, float] = {}

    def run(self) -> Run:
        job = self.job
        self.tell({"event": "run", "recipe": job.name, "folder": str(self.folder)})
        write_whole(self.folder / "recipe.yaml", job.text)
        for note in job.data.notes:
            self.note(note)
        teacher, teacher_key = self.teacher()
        self.teacher_row(teacher, teacher_key)
        self.plain_rows(teacher, teacher_key)
        student, key, origin = self.student(teacher, teacher_key)
        for index, stage in enumerate(job.stages, start=1):
            name = f"{index:02}-{stage.name}"
            teaching = (teacher, teacher_key)
            student, key, entry = self.stage(stage, student, key, origin, teaching, name)
            view(entry / "student", self.folder / "stages" / name / "student")
            self.exported_row(stage.name, index, student, key, f"stages/{name}/bundle")
        self.deploy(student, key, len(job.stages) + 1)
        return self.finish(student)

    # -- networks -------------------------------------------------------------------------------

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
    ) -> tuple[Student, str, Path]:
        """The student after one stage, from the store or computed; its key and stored folder.

        teaching: the teacher and its key.
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
                tell=self.recorder(work),
                runtime=job.deploy.runtime,
                threads=job.deploy.threads,
                batch=job.deploy.batch,
                max_drop=job.budget.max_drop,
                baseline=self.baseline if teacher is not None else None,
            )
            result = stage.apply(student.copy(), run)
            result.check()
            save_student(result, folder / "student")
            (folder / "found.json").write_text(json.dumps(run.found) + "\n", encoding="utf-8")

        result, entry = self.compute(name, key, make, origin)
        found = entry / "found.json"
        if found.exists() and (content := json.loads(found.read_text(encoding="utf-8"))):
            self.found[name] = content
        return result, key, entry

    def compute(
        self, name: str, key: str, make: Callable[[Path, Path], None], origin: Origin
    ) -> tuple[Student, Path]:
        """One stored step that ends with a student; its events are kept with it."""
        self.step += 1
        cached = self.store.get(key) is not None
        event = {"event": "stage", "name": name, "index": self.step, "of": self.steps}
        self.tell({**event, "cached": cached})

        def with_events(folder: Path, work: Path) -> None:
            events = work / "events.jsonl"
            for told in _told_once(events):  # by a process that was killed
                self.log(told)
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
                self.log(told)
        return origin.load(entry / "student"), entry

    def recorder(self, work: Path) -> Listener:
        """Tells events on, and keeps them in the work folder for whoever finds the result."""
        return several(Log(work / "events.jsonl"), self.tell)

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

    # -- rows -----------------------------------------------------------------------------------

    def teacher_row(self, teacher: Student, key: str) -> None:
        job = self.job
        entry, _ = self.store.compute(
            key_of(row="eager", student=key, **self.inputs()),
            eager_entry(teacher, job.data, job.task),
        )
        row = load_row("teacher", 0, entry)
        row.call = eager_call(teacher, self.sample())
        view(entry / "student", self.folder / "stages" / "00-teacher" / "student")
        self.baseline = job.task.value(row.statistics("validation"))
        self.add(row, "stages/00-teacher/student", self.seconds.get(key, 0.0), "pytorch-eager")
        self.warn_if_memorised()

    def warn_if_memorised(self) -> None:
        """Says when the teacher does far better on validation than on test: it learnt from it."""
        validation, test = self.records[0]["validation"], self.records[0]["metric"]
        better = 1 if self.job.task.metric.higher_is_better else -1
        gap = better * (validation["value"] - test["value"])
        doubt = (validation["high"] - validation["low"] + test["high"] - test["low"]) / 2
        if gap > max(doubt, 0.02 if self.job.task.metric.unit == "fraction" else 0.0):
            self.note(
                f"the teacher's {self.job.task.metric.name} is {validation['value']:.4g} on "
                f"validation and {test['value']:.4g} on test: it has seen the validation examples, "
                "so nothing can be chosen on them; "
                "set `data.validation: {from: test, fraction: 0.5}`"
            )

    def plain_rows(self, teacher: Student, key: str) -> None:
        """What anyone gets without Attar: the teacher exported, and the runtime's own int8."""
        row = self.exported_row("exported", 0, teacher, key, "stages/00-exported/bundle")
        source = row.folder / "bundle"
        data, task = self.job.data, self.job.task

        def export(folder: Path) -> list[Path]:
            shuffled = data.train.batches(32, shuffle=True, seed=self.job.seed)
            batches = (
                tuple(a.numpy() for a in task.arguments(b)[0])
                for b in _first(shuffled, CALIBRATION_EXAMPLES // 32)
            )
            return self.runtime.plain_int8(source, folder, batches)

        key, path = key_of(plain=key), "stages/00-plain-int8/bundle"
        try:
            self.bundle_row("plain-int8", 0, teacher, key, path, export, None)
        except ExportError as error:  # what it would be compared with is missing, no more
            self.note(f"there is no row plain-int8 to compare with: {error}")

    def exported_row(
        self, stage: str, index: int, student: Student, key: str, path: str, optimise: bool = False
    ) -> Row:
        """Exports a student, checks that the file answers alike, and measures it."""
        example = self.job.task.example(self.job.data)
        shapes = self.job.task.dynamic_shapes(example)
        manifest = self.job.task.describe(self.job.data)

        def export(folder: Path) -> list[Path]:
            return self.runtime.export(
                student,
                folder,
                example=example,
                dynamic_shapes=shapes,
                names=(
                    [i["name"] for i in manifest["inputs"]],
                    [o["name"] for o in manifest["outputs"]],
                ),
                optimise=optimise,
            )

        graph = quantized_reference(student.edits, student.module, example, shapes)
        reference = graph if graph is not None else student.module
        return self.bundle_row(stage, index, student, key, path, export, reference)

    def bundle_row(
        self,
        stage: str,
        index: int,
        student: Student,
        key: str,
        path: str,
        export: Callable[[Path], list[Path]],
        reference: torch.nn.Module | None,
    ) -> Row:
        job, deploy = self.job, self.job.deploy
        # exported and plain-int8 took no time of their own: the teacher's row has its training's
        seconds = self.seconds.get(key, 0.0) if index else 0.0
        key = key_of(
            row=stage,
            student=key,
            runtime=deploy.runtime,
            version=package_version(deploy.runtime),
            graph=deploy.graph,
            **self.inputs(),
        )

        def make(folder: Path, work: Path) -> None:
            judged = reference or student.module
            inputs, outputs = reference_outputs(
                judged, job.data.validation, job.task, PARITY_EXAMPLES
            )
            bundle = write_bundle(
                folder / "bundle",
                runtime=self.runtime,
                export=export,
                task=job.task.name,
                description=job.task.describe(job.data),
                golden=tuple(x[:GOLDEN_EXAMPLES] for x in inputs),
                notes=_notes(student, quantized=reference is None),
            )
            session = bundle.session(threads=_cores(), passes=deploy.graph)
            facts = counts(student, job.task.example(job.data))
            if reference is not None:
                facts["parity"] = check_parity(
                    outputs,
                    _in_batches(session, inputs),
                    job.task.agreement,
                    QUANTIZED if student.find("quantized") else FLOAT,
                )
            facts["bytes"] = bundle.bytes
            facts["files"] = [
                {"path": f["path"], "bytes": f["bytes"]} for f in bundle.manifest["files"]
            ]
            facts["memory_mb"] = session_memory_mb(
                folder / "bundle", deploy.runtime, threads=deploy.threads
            )
            store_facts(folder, facts, session_arrays(session, job.data, job.task))

        entry, _ = self.store.compute(key, make)
        row = load_row(stage, index, entry)
        view(entry / "bundle", self.folder / path)
        self.stamp(self.folder / path)
        session = read_bundle(entry / "bundle").session(threads=deploy.threads, passes=deploy.graph)
        sample = self.sample()
        row.call = lambda: session(*sample)
        self.add(row, path, seconds, deploy.runtime)
        return row

    def stamp(self, bundle: Path) -> None:
        """Writes into a bundle which recipe it is of: stored ones serve every recipe that makes
        them."""
        manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        manifest["recipe_sha256"] = hashlib.sha256(self.job.text.encode()).hexdigest()
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_whole(bundle / MANIFEST, text)

    def sample(self) -> tuple[np.ndarray, ...]:
        """The inputs that latencies are measured with."""
        return inputs_of(self.job.data.validation, self.job.task, self.job.deploy.batch)

    def add(self, row: Row, path: str, seconds: float, runtime: str) -> None:
        """Takes a first look at the row's latency and shows it; `finish` measures all together."""
        threads = self.job.deploy.threads
        timed = timed_on(threads, {"row": row.call}, seconds=FIRST_LOOK_SECONDS)["row"]
        self.set_latency(row, timed, runtime)
        row.timings["seconds"] = seconds
        self.rows.append(row)
        self.records.append(as_record(row, self.rows[0], self.job.task, path))
        self.write_ledger()
        self.tell({"event": "row", "row": self.records[-1]})

    def set_latency(self, row: Row, timed: dict[str, Any], runtime: str) -> None:
        deploy = self.job.deploy
        row.timings["latency"] = [
            {
                "runtime": runtime,
                "batch": deploy.batch,
                "threads": deploy.threads,
                "p50_ms": round(timed["p50_ms"], 5),
                "p90_ms": round(timed["p90_ms"], 5),
            }
        ]

    # -- the end --------------------------------------------------------------------------------

    def deploy(self, student: Student, key: str, index: int) -> None:
        """The last row: the graph optimised, beside the same graph with passes off."""
        self.step += 1
        self.tell(
            {
                "event": "stage",
                "name": "deploy",
                "index": self.step,
                "of": self.steps,
                "cached": False,
            }
        )
        key = key_of(deploy=key)
        self.exported_row(
            "deploy", index, student, key, "bundle", optimise=self.job.deploy.graph == "all"
        )

    def finish(self, student: Student) -> Run:
        self.measure_together()
        ledger = self.write_ledger(done=True)
        save_student(student, self.folder / "student")
        details = details_of(self.job, self.rows, self.found, self.notes)
        write_whole(self.folder / "details.json", json.dumps(details) + "\n")
        from attar.report import write_report

        report = write_report(self.folder)
        budget = ledger["budget"]
        self.tell({"event": "budget", **budget})
        self.tell({"event": "done", "folder": str(self.folder), "report": str(report)})
        return Run(self.folder, ledger, student)

    def measure_together(self) -> None:
        """Times every row side by side, with the deployed graph's passes on and off, and splits
        the speed-up into what the runtime gave and what compression gave."""
        threads = self.job.deploy.threads
        bare = read_bundle(self.plain_graph()).session(threads=threads, passes="none")
        sample = self.sample()
        calls = {str(i): row.call for i, row in enumerate(self.rows)}
        calls["passes off"] = lambda: bare(*sample)
        timed = timed_on(threads, calls, seconds=FINAL_SECONDS)
        for i, row in enumerate(self.rows):
            self.set_latency(row, timed[str(i)], row.timings["latency"][0]["runtime"])
            self.records[i]["latency"] = row.timings["latency"]
        final = str(len(self.rows) - 1)
        off = timed["passes off"]
        self.records[-1]["graph"] = {
            "passes_on_p50_ms": round(timed[final]["p50_ms"], 5),
            "passes_off_p50_ms": round(off["p50_ms"], 5),
            "gain": _ratio(off, timed[final]),
        }
        exported = str(next(i for i, r in enumerate(self.rows) if r.stage == "exported"))
        self.speedup = {
            "total": _ratio(timed["0"], timed[final]),
            "runtime": _ratio(timed["0"], timed[exported]),
            "compression": _ratio(timed[exported], timed[final]),
        }

    def plain_graph(self) -> Path:
        """The bundle of the final student before the deploy stage's offline passes."""
        before = next(r for r in reversed(self.rows[:-1]) if r.stage != "plain-int8")
        return before.folder / "bundle"

    def write_ledger(self, done: bool = False) -> dict[str, Any]:
        job = self.job
        budget = (
            judge(job.budget, self.records[-1])
            if done
            else job.budget.model_dump(exclude_none=True)
        )
        ledger = {
            "schema": 1,
            "attar": attar.__version__,
            "task": job.task.name,
            "recipe": job.name,
            "seed": job.seed,
            "environment": environment(),
            "budget": budget,
            "rows": self.records,
        }
        if done:
            ledger["speedup"] = self.speedup
        write_whole(self.folder / "ledger.json", json.dumps(ledger, indent=1) + "\n")
        return ledger

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.tell({"event": "note", "text": text})


def _holds_another(folder: Path, job: Job) -> bool:
    """Whether the folder has figures of another recipe than this job's."""
    recipe = folder / "recipe.yaml"
    if not (folder / "ledger.json").exists() or not recipe.exists():
        return False
    return recipe.read_text(encoding="utf-8") != job.text


def _notes(student: Student, quantized: bool) -> dict[str, Any]:
    """What a bundle's manifest says of how its network was made."""
    if quantized:
        return {"quantization": {"summary": "the runtime's own, after training"}}
    notes: dict[str, Any] = {}
    if student.edits:
        notes["edits"] = [{"kind": e.kind, "summary": e.summary()} for e in student.edits]
    for edit in student.find("quantized"):
        notes["quantization"] = {"summary": edit.summary()}
    return notes


def _ratio(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, float]:
    interval = ratio_interval(np.array(slow["round_ms"]), np.array(fast["round_ms"]))
    return {k: round(getattr(interval, k), 4) for k in ("value", "low", "high")}


def _in_batches(
    session: Callable[..., tuple[np.ndarray, ...]], inputs: tuple[np.ndarray, ...], size: int = 64
) -> np.ndarray:
    n = len(inputs[0])
    return np.concatenate(
        [session(*(x[i : i + size] for x in inputs))[0] for i in range(0, n, size)]
    )


def _first(batches: Any, count: int) -> Any:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _cores() -> int:
    return torch.get_num_threads()


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
