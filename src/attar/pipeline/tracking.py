"""A run told to an experiment tracker (TensorBoard, MLflow, …), through Accelerate's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attar.errors import UsageError
from attar.events import Listener, silent
from attar.recipe import Recipe
from attar.registry import near

FOLDER = "tracking"
"""Where in a run's folder those trackers write that keep files."""


@contextmanager
def tracked(trackers: Sequence[str], recipe: Recipe, folder: Path) -> Iterator[Listener]:
    """A listener that tells trackers what happens: the recipe's settings, each epoch's losses,
    metric and learning rate by stage, and each ledger row's figures.

    trackers: names of Accelerate's, such as `tensorboard` (writes to `tracking/` in the run's
    folder) or `mlflow` (to where its own environment says). What was computed before and is taken
    from the store is not told again.

    Raises `UsageError` for one that is unknown, not installed, or can't start.

    Example:
        >>> with tracked(["tensorboard"], recipe, folder) as tell:  # doctest: +SKIP
        ...     run(recipe, folder, tell=tell)
    """
    if not trackers:
        yield silent
        return
    _require(trackers)
    from accelerate import Accelerator

    to = Accelerator(
        cpu=not torch.accelerator.is_available(),
        log_with=list(trackers),
        project_dir=str(folder / FOLDER),
    )
    settings = flat(recipe.model_dump(mode="json"))
    try:
        to.init_trackers(recipe.name, config=settings)
    except Exception as error:  # each tracker has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--track {', '.join(trackers)} can't start: {reason}") from error

    stage = ""

    def tell(event: dict[str, Any]) -> None:
        nonlocal stage
        if event["event"] == "stage":
            stage = event["name"]
        elif event["event"] == "epoch":
            to.log(_of_epoch(event, stage), step=event["epoch"])
        elif event["event"] == "row":
            to.log(_of_row(event["row"]), step=event["row"]["index"])

    try:
        yield tell
    finally:
        to.end_training()


def flat(values: Any, place: str = "") -> dict[str, str | int | float]:
    """Nested settings under their whole paths, as trackers want them.

    >>> flat({"stages": [{"prune": {"ratio": 0.5}}]})
    {'stages.0.prune.ratio': 0.5}
    """
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {
            path: value
            for key, inner in pairs
            for path, value in flat(inner, f"{place}.{key}" if place else str(key)).items()
        }
    return {place: values if isinstance(values, int | float | str) else str(values)}


def _of_epoch(event: dict[str, Any], stage: str) -> dict[str, float]:
    """The figures of an epoch under its stage: several stages have a training called `recover`."""
    label, metric = event["label"], event["metric"]
    place = stage if label in stage else f"{stage} {label}"
    values = {"loss": event["loss"], metric["name"]: metric["value"], "lr": event["lr"]}
    values |= {f"loss {name}": value for name, value in event["terms"].items()}
    return {f"{place}/{name}": value for name, value in values.items()}


def _of_row(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a ledger row, named by it: rows differ in kind and are no series."""
    metric = row["metric"]
    values = {metric["name"]: metric["value"], "bytes": row["bundle"]["bytes"]}
    values["p50_ms"] = row["latency"][0]["p50_ms"]
    if "drop" in row:
        values["drop"] = row["drop"]["value"]
    return {f"ledger/{row['stage']}/{name}": value for name, value in values.items()}


def _require(trackers: Sequence[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    here = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in trackers:
        if name not in known:
            raise UsageError(f"there is no tracker {name!r}{near(name, known)}")
        if name not in here:
            raise UsageError(
                f"the tracker {name} is not installed: pip install 'attar[tracking]' brings "
                f"tensorboard and mlflow, others come as pip install {name.replace('_', '-')}"
            )
