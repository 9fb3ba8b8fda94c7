"""The ledger while a run goes on: each row exported, checked against PyTorch, measured, written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attar
from attar.errors import ExportError
from attar.events import Listener
from attar.measure.intervals import ratio_interval
from attar.measure.machine import environment, package_version
from attar.measure.memory import session_memory_mb
from attar.pipeline.budget import judge
from attar.pipeline.rows import (
    Row,
    as_record,
    counts,
    eager_call,
    eager_entry,
    inputs_of,
    load_row,
    packed_bytes,
    reference_outputs,
    session_arrays,
    store_facts,
    timed_on,
)
from attar.pipeline.steps import Steps
from attar.quantize import quantized_reference
from attar.runtimes import runtimes
from attar.runtimes.bundle import MANIFEST, read_bundle, write_bundle
from attar.runtimes.parity import bound_for, check_parity
from attar.store import key_of, view, write_whole
from attar.student import Student

PARITY_EXAMPLES = 512
GOLDEN_EXAMPLES = 8
CALIBRATION_EXAMPLES = 512
FIRST_LOOK_SECONDS = 0.3
FINAL_SECONDS = 1.5


class Ledger:
    """The rows of a run in its folder. What repeats is stored by content; latencies never are.

    steps: the run's computed steps, which say what rows depend on and how long they took.
    notes: what a person should hear, in sentences; told as they come.
    """

    def __init__(self, folder: Path, steps: Steps, tell: Listener) -> None:
        self.job, self.steps, self.store = steps.job, steps, steps.store
        self.folder, self.tell = folder, tell
        self.runtime = runtimes.get(self.job.deploy.runtime)()
        self.rows: list[Row] = []
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.tell({"event": "note", "text": text})

    @property
    def baseline(self) -> float | None:
        """The teacher's metric on validation; none before its row is there."""
        if not self.rows:
            return None
        return self.job.task.value(self.rows[0].statistics("validation"))

    def teacher_row(self, teacher: Student, key: str) -> None:
        job = self.job
        entry, _ = self.store.compute(
            key_of(row="eager", student=key, **self.steps.inputs()),
            eager_entry(teacher, job.data, job.task),
        )
        row = load_row("teacher", 0, entry)
        row.call = eager_call(teacher, self.sample())
        view(entry / "student", self.folder / "stages" / "00-teacher" / "student")
        self.add(
            row, "stages/00-teacher/student", self.steps.seconds.get(key, 0.0), "pytorch-eager"
        )
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
        seconds = self.steps.seconds.get(key, 0.0) if index else 0.0
        key = key_of(
            row=stage,
            student=key,
            runtime=deploy.runtime,
            version=package_version(deploy.runtime),
            graph=deploy.graph,
            **self.steps.inputs(),
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
            if reference is not None:  # plain-int8's weights are the runtime's, not the student's
                facts |= packed_bytes(student)
                facts["parity"] = check_parity(
                    outputs,
                    _in_batches(session, inputs),
                    job.task.agreement,
                    bound_for(student.edits),
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
        """Shows the row with a first look at its latency; `measure_together` takes the last."""
        threads = self.job.deploy.threads
        timed = timed_on(threads, {"row": row.call}, seconds=FIRST_LOOK_SECONDS)["row"]
        self.set_latency(row, timed, runtime)
        row.timings["seconds"] = seconds
        self.rows.append(row)
        self.records.append(as_record(row, self.rows[0], self.job.task, path))
        self.write()
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

    def measure_together(self) -> None:
        """Times every row side by side, with the deployed graph's passes on and off (where the
        runtime can leave them out), and splits the speed-up into what the runtime gave and what
        compression gave."""
        threads = self.job.deploy.threads
        sample = self.sample()
        calls = {str(i): row.call for i, row in enumerate(self.rows)}
        if "none" in self.runtime.passes:
            bare = read_bundle(self.plain_graph()).session(threads=threads, passes="none")
            calls["passes off"] = lambda: bare(*sample)
        timed = timed_on(threads, calls, seconds=FINAL_SECONDS)
        for i, row in enumerate(self.rows):
            self.set_latency(row, timed[str(i)], row.timings["latency"][0]["runtime"])
            self.records[i]["latency"] = row.timings["latency"]
        final = str(len(self.rows) - 1)
        if off := timed.get("passes off"):
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

    def write(self, done: bool = False) -> dict[str, Any]:
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


def _notes(student: Student, quantized: bool) -> dict[str, Any]:
    """What a bundle's manifest says of how its network was made."""
    if quantized:
        return {"quantization": {"summary": "the runtime's own, after training"}}
    notes: dict[str, Any] = {}
    if student.edits:
        notes["edits"] = [{"kind": e.kind, "summary": e.summary()} for e in student.edits]
    for edit in student.edits:
        if edit.rounds != "nothing":
            notes["quantization"] = {"summary": edit.summary(), "rounds": edit.rounds}
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
