"""Rows of the ledger: a student exported to the deploy target, and every figure measured on that.

What repeats (answers, sizes, counts) is measured once and stored by content; timings are taken
anew in every run, all rows side by side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attar.data.base import Data, Split
from attar.errors import CheckpointError
from attar.measure.cost import macs, nonzero, parameters
from attar.measure.intervals import Interval
from attar.measure.latency import time_interleaved
from attar.student import Student, save_student
from attar.student.packed import packed_size
from attar.tasks.base import Task
from attar.tasks.intervals import metric_drop, metric_interval
from attar.training.evaluation import outputs_of, session_outputs

SPLITS = ("validation", "test")
EVALUATION_BATCH = 64
COUNTED = ("parameters", "nonzero", "macs", "packed_bytes")
"""What is known of a row's student; the last is absent from results stored by older versions."""

Answers = Callable[..., tuple[np.ndarray, ...]]
"""A session: arrays in, arrays out."""


@dataclass
class Row:
    """One row: what was measured (`facts`), every example's statistics and outputs on both splits,
    and how to call the model for timing.

    folder: the stored entry: a bundle, or for the teacher its student.
    """

    stage: str
    index: int
    folder: Path
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    call: Callable[[], Any] = field(repr=False, default=lambda: None)
    timings: dict[str, Any] = field(default_factory=dict)

    def statistics(self, split: str) -> np.ndarray:
        return self.arrays[f"{split}_statistics"]

    def outputs(self, split: str) -> np.ndarray:
        return self.arrays[f"{split}_outputs"]


def load_row(stage: str, index: int, folder: Path) -> Row:
    """The row whose facts are stored in `folder`."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    with np.load(folder / "arrays.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Row(stage, index, folder, facts, arrays)


def store_facts(folder: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes what `load_row` reads."""
    np.savez_compressed(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (folder / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def counts(student: Student, example: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Parameters, nonzero parameters and multiply-accumulates of one example."""
    module = student.module
    return {
        "parameters": parameters(module),
        "nonzero": nonzero(module),
        "macs": macs(module, example),
    }


def packed_bytes(student: Student) -> dict[str, int]:
    """The size of the student's packed file; nothing for one that can't be packed."""
    try:
        return {"packed_bytes": packed_size(student)}
    except CheckpointError:
        return {}


def eager_entry(student: Student, data: Data, task: Task) -> Callable[[Path, Path], None]:
    """What makes the teacher's entry: its weights file, and its answers in eager PyTorch."""

    def make(folder: Path, work: Path) -> None:
        save_student(student, folder / "student")
        arrays: dict[str, np.ndarray] = {}
        for split in SPLITS:
            pairs = list(outputs_of(student.module, getattr(data, split), task))
            arrays[f"{split}_outputs"] = np.concatenate([o.numpy() for o, _ in pairs])
            arrays[f"{split}_statistics"] = np.concatenate(
                [task.statistics(o, b) for o, b in pairs]
            )
        weights = "weights.safetensors"
        size = (folder / "student" / weights).stat().st_size
        facts = {
            **counts(student, task.example(data)),
            **packed_bytes(student),
            "bytes": size,
            "files": [{"path": weights, "bytes": size}],
        }
        store_facts(folder, facts, arrays)

    return make


def eager_call(student: Student, inputs: tuple[np.ndarray, ...]) -> Callable[[], Any]:
    """Calls the network as its owner does today: eager PyTorch, float32."""
    tensors = tuple(torch.from_numpy(x) for x in inputs)
    module = student.module.eval()

    def call() -> Any:
        with torch.inference_mode():
            return module(*tensors)

    return call


def timed_on(
    threads: int, calls: Mapping[str, Callable[[], Any]], *, seconds: float
) -> dict[str, dict[str, Any]]:
    """`time_interleaved` with PyTorch on `threads` threads; it has its own number back after."""
    own = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return time_interleaved(calls, seconds=seconds)
    finally:
        torch.set_num_threads(own)


def session_arrays(session: Answers, data: Data, task: Task) -> dict[str, np.ndarray]:
    """Outputs and statistics of an exported model over validation and test."""
    return {
        f"{name}_{kind}": array
        for name in SPLITS
        for kind, array in session_arrays_of(session, getattr(data, name), task).items()
    }


def session_arrays_of(session: Answers, split: Split, task: Task) -> dict[str, np.ndarray]:
    """`outputs` and `statistics` of an exported model over one split."""
    outputs, statistics = [], []
    for output, batch in session_outputs(session, split, task, batch_size=EVALUATION_BATCH):
        outputs.append(np.asarray(output, np.float32))
        statistics.append(task.statistics(output, batch))
    return {"outputs": np.concatenate(outputs), "statistics": np.concatenate(statistics)}


def inputs_of(split: Split, task: Task, count: int) -> tuple[np.ndarray, ...]:
    """The first `count` examples as one batch, in turn where there are fewer."""
    batch = split.pick([i % len(split) for i in range(count)])
    return tuple(a.numpy() for a in task.arguments(batch)[0])


def reference_outputs(
    module: torch.nn.Module, split: Split, task: Task, count: int
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Inputs (a tuple, batch first) and PyTorch's logits of the first `count` examples. module: in
    eval mode already; a quantized graph refuses to be put there."""
    inputs: list[tuple[np.ndarray, ...]] = []
    outputs: list[np.ndarray] = []
    seen = 0
    with torch.no_grad():
        for batch in split.batches(min(EVALUATION_BATCH, count)):
            args, kwargs = task.arguments(batch)
            inputs.append(tuple(a.numpy() for a in args))
            outputs.append(task.logits(module(*args, **kwargs)).float().numpy())
            seen += len(outputs[-1])
            if seen >= count:
                break
    joined = tuple(np.concatenate([i[k] for i in inputs])[:count] for k in range(len(inputs[0])))
    return joined, np.concatenate(outputs)[:count]


def as_record(row: Row, teacher: Row, task: Task, path: str) -> dict[str, Any]:
    """The row as `ledger.json` has it. path: where its files stand in the run's folder."""
    record: dict[str, Any] = {"stage": row.stage, "index": row.index}
    for key, split in (("metric", "test"), ("validation", "validation")):
        statistics = row.statistics(split)
        interval = metric_interval(task, statistics)
        record[key] = {
            "name": task.metric.name,
            "unit": task.metric.unit,
            "split": split,
            **_rounded(interval),
            "n": len(statistics),
        }
        further = task.further_values(statistics)
        if further:
            record[key]["further"] = {k: _round(v) for k, v in further.items()}
    if row is not teacher:
        record["drop"] = _drop(row, teacher, task, "test")
        record["validation_drop"] = _drop(row, teacher, task, "validation")
        agreement = task.agreement(teacher.outputs("test"), row.outputs("test"))
        record["agreement"] = _round(float(np.mean(agreement)))
    facts = dict(row.facts)
    record |= {k: facts.pop(k) for k in COUNTED if k in facts}
    record["bundle"] = {"path": path, "bytes": facts.pop("bytes"), "files": facts.pop("files")}
    return record | facts | row.timings


def _drop(row: Row, teacher: Row, task: Task, split: str) -> dict[str, Any]:
    interval = metric_drop(task, teacher.statistics(split), row.statistics(split))
    return {
        **_rounded(interval),
        "split": split,
        "method": interval.method,
        "against": "teacher",
    }


def _rounded(interval: Interval) -> dict[str, float]:
    return {k: _round(getattr(interval, k)) for k in ("value", "low", "high")}


def _round(value: float) -> float:
    return round(float(value), 6)
