"""Trainings that a benchmark compares: kept line by line, so that none is run twice.

A log is append-only: one JSON object a training, with a bit for each test image, so that any two
can be held against each other image by image.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from attar.measure.machine import environment
from attar.pipeline.job import job_of
from attar.recipe import Recipe
from attar.stages.base import Context
from attar.store import Store
from attar.student import Student
from attar.training.evaluation import statistics_of


class Log:
    """Finished trainings of one recipe, by label, seed and setting."""

    def __init__(self, path: Path, recipe: Path) -> None:
        self.path, self.recipe = path, recipe

    def setting(self, *written: Any) -> str:
        """What two trainings must have in common for one to stand for the other: what is written in
        the recipe and laid over it."""
        recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        text = json.dumps([recipe, *written], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def find(self, label: str, seed: int, setting: str) -> dict[str, Any] | None:
        """The training's line, where it was run."""
        wanted = (label, seed, setting)
        for line in self._lines():
            if (line["criterion"], line["seed"], line["setting"]) == wanted:
                return line
        return None

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def trained(
        self,
        recipe: Recipe,
        label: str,
        setting: str,
        *,
        keep: bool,
        also: Callable[[Student], dict[str, Any]] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """The training's line: from the log, or run now and, where it is to be kept, appended."""
        line = self.find(label, recipe.seed, setting)
        if line is None:
            print(f"{label}, seed {recipe.seed}", flush=True)
            line = train(recipe, label, setting, also=also, **changes)
            if keep:
                self.append(line)
        return line


def train(
    recipe: Recipe,
    label: str,
    setting: str,
    *,
    also: Callable[[Student], dict[str, Any]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Trains the recipe's student (or a copy of its teacher) by its only stage, with changes to it,
    as a line of the log. also: what else the line says of the student."""
    job = job_of(recipe)
    work = Path("runs") / "benchmarks" / recipe.name / f"{label}-{recipe.seed}"
    (stage,) = job.stages
    stage = type(stage).model_validate({**stage.model_dump(), **changes})
    run = Context(
        task=job.task,
        data=job.data,
        teacher=job.teacher.fresh().module,
        seed=job.seed,
        work=work / setting,
        store=Store(),
        tell=progress,
        runtime=job.deploy.runtime,
        threads=job.deploy.threads,
        batch=job.deploy.batch,
    )
    started = time.perf_counter()
    student = stage.apply((job.student or job.teacher).fresh(job.seed + 1), run)
    seconds = time.perf_counter() - started
    shutil.rmtree(run.work, ignore_errors=True)  # what is finished must not be gone on with
    validation, test = (
        job.task.hits(statistics_of(student.module, split, job.task)).astype(bool)
        for split in (job.data.validation, job.data.test)
    )
    return {
        "criterion": label,
        "settings": changes,
        "setting": setting,
        "seed": recipe.seed,
        "validation": float(validation.mean()),
        "test": float(test.mean()),
        "hits": np.packbits(test).tobytes().hex(),  # a bit for each test image
        "seconds": round(seconds),
        **(also(student) if also is not None else {}),
        "environment": environment(),
    }


def progress(event: dict[str, Any]) -> None:
    if event["event"] == "epoch" and event["epoch"] % 10 == 0:
        print(f"  {event['epoch']}: {event['metric']['value']:.4f}", flush=True)


def right(line: dict[str, Any]) -> np.ndarray:
    """Whether each test image was classified rightly, 0 or 1."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(line["hits"]), np.uint8))


def gain(own: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> dict[str, float]:
    """The mean difference over seeds and images, in points, and half its 95 % interval: Student's t
    over the seeds' gains (training) joined with the images' (test), as variances add."""
    seeds = sorted(set(own) & set(others))
    each = 100 * np.array([own[s].astype(float) - others[s] for s in seeds])
    by_seed, by_image = each.mean(1), each.mean(0)
    images = by_image.var(ddof=1) / len(by_image)
    if len(seeds) < 2:
        return {"gain": each.mean(), "half": 1.96 * images**0.5, "seeds": len(seeds)}
    # what the seeds' gains vary by on the same images, beyond the images' own draw
    training = stats.t.ppf(0.975, len(seeds) - 1) * by_seed.std(ddof=1) / len(seeds) ** 0.5
    return {
        "gain": each.mean(),
        "half": (training**2 + 1.96**2 * images) ** 0.5,
        "seeds": len(seeds),
    }
