"""What the report shows beyond the ledger: classes, examples that went wrong, what was found."""

from __future__ import annotations

from typing import Any

import numpy as np

from attar.pipeline.job import Job
from attar.pipeline.rows import Row

WRONG_SHOWN = 24


def details_of(
    job: Job, rows: list[Row], found: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """`details.json`: everything in it is for people; programs read the ledger."""
    teacher, final = rows[0].statistics("test"), rows[-1].statistics("test")
    return {
        "classes": list(job.data.classes),
        "per_class": _per_class(job, teacher, final),
        "wrong": _went_wrong(job, teacher, final),
        "found": found,
        "notes": notes,
    }


def _per_class(job: Job, before: np.ndarray, after: np.ndarray) -> dict[str, Any] | None:
    pairs = [job.task.per_class(s, job.data) for s in (before, after)]
    if pairs[0] is None or pairs[1] is None:
        return None
    (teacher, counts), (final, _) = pairs[0], pairs[1]
    return {
        "teacher": _numbers(teacher),
        "final": _numbers(final),
        "n": [int(n) for n in counts],
    }


def _went_wrong(job: Job, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """Test examples that the teacher had right and the final model has wrong, the surest first."""
    then, now = job.task.verdicts(before), job.task.verdicts(after)
    if then is None or now is None:
        return []
    lost = np.flatnonzero(then.right & ~now.right)
    lost = lost[np.argsort(-now.confidence[lost], kind="stable")][:WRONG_SHOWN]
    pictures = job.task.show(job.data.test, lost.tolist(), job.data) if len(lost) else []
    return [
        {
            "index": int(i),
            "true": int(now.label[i]),
            "teacher": int(then.answer[i]),
            "student": int(now.answer[i]),
            "confidence": round(float(now.confidence[i]), 4),
            "image": picture,
        }
        for i, picture in zip(lost, pictures, strict=True)
    ]


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else round(float(v), 6) for v in values]
