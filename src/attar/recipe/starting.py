"""The recipe a person starts from: "make my model smaller", commented, and runnable as it is."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from attar.errors import UsageError
from attar.files import is_reference, locate
from attar.models import models
from attar.models.torchvision import torchvision_names
from attar.recipe.detecting import Detected, detect
from attar.recipe.reading import recipe_from_text
from attar.registry import near
from attar.store import write_whole
from attar.tasks.base import tasks

LIBRARY_SIZE = 224
"""Pixels that torchvision's and timm's networks were made for."""
LARGEST_OWN_SIZE = 64
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def write_starting_recipe(
    out: Path,
    *,
    task: str,
    model: str,
    data: str,
    root: Path = Path("data"),
    checkpoint: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the recipe to `out`. Raises `UsageError` for names and paths that don't exist, and
    where `out` is there already.

    Example:
        >>> write_starting_recipe(Path("recipe.yaml"), task="image-classification",
        ...                       model="digits-wide", data="digits")  # doctest: +SKIP
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists: choose another --out, or replace it with --overwrite")
    tasks.get(task)
    _require_model(model)
    if checkpoint is not None and not checkpoint.expanduser().is_file():
        raise UsageError(f"there is no checkpoint {checkpoint}")
    text = starting_recipe(
        task, model, detect(data, root), checkpoint=checkpoint, base=out.parent, name=out.stem
    )
    recipe_from_text(text, str(out), out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)


def starting_recipe(
    task: str,
    model: str,
    data: Detected,
    *,
    checkpoint: Path | None,
    base: Path,
    name: str = "recipe",
) -> str:
    """The recipe's text; its paths are relative to the folder `base` where the given ones are
    relative to the current one."""
    fields = {
        k: _seen_from(v, base) if k in {"path", "root"} else v for k, v in data.fields.items()
    }
    lines = [
        f"# Makes {model} smaller. `attar check` looks first, `attar run` does it.",
        "# Paths are relative to this file; ${NAME} stands for an environment variable.",
        f"name: {_yaml(name)}",
        f"task: {task}",
        "seed: 0",
        "",
        "data:",
        *(f"  {key}: {_yaml(value)}" for key, value in fields.items()),
        *_preparation(model, data, trained=checkpoint is not None),
        "",
        *_teacher(_model(model, base), checkpoint, base),
        "",
        _STAGES,
    ]
    return "\n".join(lines)


def _preparation(model: str, data: Detected, *, trained: bool) -> list[str]:
    """Size, color, normalisation and where choices are made, each with its reason."""
    lines = []
    own = is_reference(model)
    ours = model in models.names()
    if size := _size(data, own=own, ours=ours):
        if own:
            lines += [
                "  # The images differ in size, and your network gets them in one: write the size",
                "  # it was made for, if that isn't this usual one.",
            ]
        lines.append(f"  size: {size}  # images are cut to a square and scaled to this many pixels")
    if data.sizes:
        lines.append(f"  color: {'gray' if data.gray else 'rgb'}")
    if trained:
        lines += ["  # As in the model's own training: answers are worse with any other values."]
    if trained and not ours and not own and not data.gray:
        lines.append(f"  normalize: {_yaml(IMAGENET)}")
    else:
        lines.append("  normalize: auto  # computed from train; or {mean: [...], std: [...]}")
    lines.append("  augment: []      # while recovering, such as [random_horizontal_flip]")
    if trained and "test" in data.splits and "validation" not in data.splits:
        lines += [
            "  # The model was trained on train, so nothing can be chosen there: half of test is",
            "  # for choices, the other half for the report.",
            "  validation: {from: test, fraction: 0.5}",
        ]
    return lines


def _size(data: Detected, *, own: bool, ours: bool) -> int | None:
    """One size for all images, where they differ or the network was made for another.

    own: the network is from the person's file. ours: it is one of Attar's.
    """
    alike = len(set(data.sizes)) == 1
    if not data.sizes or (own and alike):
        return None
    if not ours:
        return LIBRARY_SIZE
    if alike and max(data.sizes[0]) <= LARGEST_OWN_SIZE:
        return None
    short = int(median(min(size) for size in data.sizes))
    return max(8, min(LARGEST_OWN_SIZE, short // 8 * 8))


def _teacher(model: str, checkpoint: Path | None, base: Path) -> list[str]:
    lines = ["teacher:", f"  model: {_yaml(model)}"]
    if checkpoint is not None:
        return [*lines, f"  checkpoint: {_yaml(_seen_from(str(checkpoint), base))}"]
    return [*lines, "  train: {epochs: 30}  # or `checkpoint: …`, if it is trained already"]


def _require_model(model: str) -> None:
    """Raises `UsageError` for a model that can't be meant, without building any."""
    if is_reference(model):
        path, _ = locate(model)
        if not path.is_file():
            raise UsageError(f"there is no file {path} to take the model from")
        return
    library, colon, name = model.partition(":")
    if colon and library == "timm":
        return
    known = [*models.names(), *torchvision_names()]
    wanted = name if library == "torchvision" and colon else model
    if wanted not in known:
        raise UsageError(f"unknown model {model!r}{near(model, known)}")


def _model(model: str, base: Path) -> str:
    if not is_reference(model):
        return model
    file, _, name = model.rpartition(":")
    return f"{_seen_from(file, base)}:{name}"


def _seen_from(path: str, base: Path) -> str:
    if Path(path).expanduser().is_absolute():
        return path
    return Path(os.path.relpath(path, base)).as_posix()


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


_STAGES = """\
# No `student`: a copy of the teacher is made smaller. What each stage costs is measured on the
# exported file, and fine-tuning (`recover`) is against the teacher.
stages:
  - prune:
      granularity: channel   # whole channels go, so that the model is faster on any machine
      criterion: magnitude
      ratio: 0.3             # or `auto`: as much as the budget allows, by trying
      recover: {epochs: 5}
  - quantize:
      scheme: int8           # post-training, calibrated on training images

deploy:
  runtime: onnxruntime
  batch: 1
  threads: 1

# What you can afford; exit code 3 says that it wasn't met. Also: latency_ms, size, memory.
budget:
  max_drop: 1%               # of the metric, absolute, against the teacher
"""
