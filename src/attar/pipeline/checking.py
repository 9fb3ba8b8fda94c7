"""What a recipe's run will meet, found out in a minute, before hours are spent."""

from __future__ import annotations

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attar.distill.answers import Storing, answers_bytes
from attar.distill.asking import shapes_of
from attar.errors import AttarError
from attar.events import Listener, silent
from attar.files import Trust
from attar.measure.cost import macs, parameters
from attar.models import inherit
from attar.pipeline.job import Job, job_of, require_answers, require_runtime
from attar.pipeline.rows import eager_call, inputs_of, reference_outputs, timed_on
from attar.prune import channel_graph
from attar.prune.blocks import residual_blocks
from attar.prune.prepared import prepared
from attar.quantize import Scheme, quantize, quantized_reference
from attar.recipe import Recipe
from attar.runtimes import runtimes
from attar.runtimes.parity import bound_for, check_parity
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.store import cache_folder
from attar.student import Student
from attar.training.config import Training
from attar.training.evaluation import to_device
from attar.training.loop import make_optimizer
from attar.training.objective import TaskObjective

STEPS_TIMED = 4
ASKED_AT_ONCE = 64
SECONDS_A_ROW = 4.0  # exporting, loading in a fresh process, timing
TEACHING_FACTOR = 1.4  # a step that also asks the teacher, over one that doesn't


def check(recipe: Recipe, *, tell: Listener = silent, trusted: Trust = False) -> dict[str, Any]:
    """Whether the recipe's networks export, answer alike, can be pruned and quantized; their
    latency today; and about how long the run will take and how much disk it will use.

    Nothing is trained: a network that is still to be trained is looked at with random weights.
    Returns JSON values: `data`, `teacher`, `student` (or `None`), `estimate`, `notes`. Raises an
    `AttarError` for a recipe that can't be run at all.
    """
    job = job_of(recipe, trusted=trusted)
    for note in job.data.notes:
        tell({"event": "note", "text": note})
    require_runtime(job.deploy)
    teacher = job.teacher.fresh(job.seed)
    require_answers(job, teacher, "teacher")
    student = job.student.fresh(job.seed + 1) if job.student is not None else None
    if student is not None:
        require_answers(job, student, "student")
        inherit(student.module, teacher.module, job.from_teacher)
    return {
        "data": {
            "name": job.data.name,
            "train": len(job.data.train),
            "validation": len(job.data.validation),
            "test": len(job.data.test),
            "classes": len(job.data.classes),
            "shape": list(job.data.shape),
        },
        "teacher": _look_at(job, teacher, tell),
        "student": _look_at(job, student, tell) if student is not None else None,
        "estimate": _estimate(job, teacher, student or teacher),
        "notes": job.data.notes,
    }


def _look_at(job: Job, student: Student, tell: Listener) -> dict[str, Any]:
    example = job.task.example(job.data)
    tell({"event": "note", "text": f"Looking at {student.spec.model if student.spec else 'it'}."})
    found: dict[str, Any] = {
        "model": student.spec.model if student.spec else type(student.module).__name__,
        "parameters": parameters(student.module),
        "macs": macs(student.module, example),
    }
    found |= _latencies(job, student, example)
    found["prunable"] = _said(lambda: _prunable(student, example))
    return found


def _latencies(job: Job, student: Student, example: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Exports as float and as int8, and times both beside eager PyTorch."""
    inputs = inputs_of(job.data.validation, job.task, job.deploy.batch)
    calls = {"eager": eager_call(student, inputs)}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in (("float", lambda: student), ("int8", lambda: _as_int8(job, student))):
            folder = Path(scratch) / name

            def attempt(make: Any = make, folder: Path = folder) -> dict[str, Any]:
                return _exported(job, make(), example, folder)

            found[name] = _said(attempt)
            if "error" not in found[name]:
                runtime = runtimes.get(job.deploy.runtime)()
                session = runtime.session(folder, threads=job.deploy.threads)
                calls[name] = partial(session, *inputs)
        timed = timed_on(job.deploy.threads, calls, seconds=0.5)
    found["eager"] = {}
    for name in calls:
        found[name]["p50_ms"] = round(timed[name]["p50_ms"], 4)
    return found


def _as_int8(job: Job, student: Student) -> Student:
    example = job.task.example(job.data)
    batches = (job.task.arguments(b)[0] for b in job.data.train.batches(32))
    return quantize(
        student,
        Scheme(runtime=job.deploy.runtime),
        (arguments for _, arguments in zip(range(2), batches, strict=False)),
        example=example,
        dynamic_shapes=job.task.dynamic_shapes(example),
    )


def _exported(
    job: Job, student: Student, example: tuple[torch.Tensor, ...], folder: Path
) -> dict[str, Any]:
    runtime = runtimes.get(job.deploy.runtime)()
    manifest = job.task.describe(job.data)
    shapes = job.task.dynamic_shapes(example)
    files = runtime.export(
        student,
        folder,
        example=example,
        dynamic_shapes=shapes,
        names=([i["name"] for i in manifest["inputs"]], [o["name"] for o in manifest["outputs"]]),
    )
    graph = quantized_reference(student.edits, student.module, example, shapes)
    judged = graph if graph is not None else student.module
    inputs, outputs = reference_outputs(judged, job.data.validation, job.task, 32)
    answers = runtime.session(folder)(*inputs)[0]
    parity = check_parity(outputs, answers, job.task.agreement, bound_for(student.edits))
    return {"bytes": sum(f.stat().st_size for f in files), "parity": parity}


def _prunable(student: Student, example: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    module, _ = prepared(student.module, example)
    graph = channel_graph(module, tuple(x[:1] for x in example))
    channels, of = graph.counts()
    blocks = list(residual_blocks(module, example, graph.program))
    return {"channels": channels, "of": of, "kept_whole": graph.kept_whole(), "blocks": blocks}


def _said(attempt: Any) -> dict[str, Any]:
    """What an attempt finds, or `{"error": the sentence}`."""
    try:
        return attempt()
    except AttarError as error:
        return {"error": str(error)}


def _estimate(job: Job, teacher: Student, student: Student) -> dict[str, Any]:
    """Seconds and bytes of the whole run, from a few timed training steps."""
    epoch = {
        "teacher": _epoch_seconds(job, teacher, job.train or Training(epochs=1)),
        "student": _epoch_seconds(job, student, Training(epochs=1)),
    }
    seconds = job.train.epochs * epoch["teacher"] if job.train else 0.0
    epochs = sum(_epochs_of(stage) for stage in job.stages)
    answers = [_answers(job, stage, teacher, student) for stage in job.stages]
    for stage, asked in zip(job.stages, answers, strict=True):
        taught = 1.0 if asked else TEACHING_FACTOR
        seconds += _epochs_of(stage) * epoch["student"] * taught
        seconds += asked["seconds"] if asked else 0
    rows = 4 + len(job.stages)
    seconds += rows * SECONDS_A_ROW
    weights = 4 * (parameters(teacher.module) * 3 + parameters(student.module) * 2 * rows)
    kept = [one for one in answers if one]
    return {
        "seconds": round(seconds),
        **({"answers": kept} if kept else {}),
        "teacher_epochs": job.train.epochs if job.train else 0,
        "student_epochs": epochs,
        "disk_bytes": weights + sum(one["bytes"] for one in kept),
        "disk_free_bytes": shutil.disk_usage(_existing(cache_folder())).free,
    }


def _answers(job: Job, stage: Any, teacher: Student, student: Student) -> dict[str, Any] | None:
    """What the answers that a stage wants to keep (`views`) will take: `seconds` to ask for them,
    and `bytes`."""
    if not isinstance(stage, Distill) or stage.views is None:
        return None
    run = Context(job.task, job.data, teacher=teacher.module, seed=job.seed, work=Path())
    asked = stage.asked(student.module, run)
    if asked is None:
        return None
    batch = job.data.train.pick(range(min(ASKED_AT_ONCE, len(job.data.train))))
    asked.signal(batch)
    started = time.perf_counter()
    signal = asked.signal(batch)
    seconds = time.perf_counter() - started
    count = stage.views * stage.examples(job.data)
    storing = stage.store or Storing()
    return {
        "examples": stage.examples(job.data),
        "views": stage.views,
        "seconds": round(seconds * count / len(batch.inputs)),
        "bytes": count * answers_bytes(shapes_of(signal), storing.format, storing.top_k),
    }


def _epochs_of(stage: Any) -> int:
    recover = getattr(stage, "recover", None)
    trained = getattr(stage, "training_epochs", recover.epochs if recover else 0)
    return int(getattr(stage, "epochs", 0) + trained * (3 if stage.searches else 1))


def _epoch_seconds(job: Job, student: Student, training: Training) -> float:
    trial = student.copy()
    trial.module.train()
    objective = TaskObjective(job.task)
    optimizer = make_optimizer(
        [p for p in trial.module.parameters() if p.requires_grad], training.optimizer
    )
    taken = []
    batches = job.data.train.batches(training.batch_size, augment=True)
    for _, batch in zip(range(STEPS_TIMED), batches, strict=False):
        started = time.perf_counter()
        loss = objective(trial.module, to_device(batch, torch.device("cpu")))["task"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - started)
    steps = max(1, len(job.data.train) // training.batch_size)
    validating = 0.3 * len(job.data.validation) / max(1, len(job.data.train))
    return min(taken) * steps * (1 + validating)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
