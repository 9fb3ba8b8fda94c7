"""A tiny recipe with every stage, and runs of it in processes of their own that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TINY = """\
name: tiny
data: {source: digits, subset: 300}
teacher: {model: digits-small, train: {epochs: 3, batch_size: 32, optimizer: {lr: 0.01}}}
student: {model: digits-small}
stages:
  - distill: {epochs: 3, batch_size: 32, optimizer: {lr: 0.01}}
  - prune: {granularity: weight, ratio: 0.4, recover: {epochs: 1, batch_size: 32}}
  - share: {bits: 4, recover: {epochs: 1, batch_size: 32}}
  - quantize: {fallback: off}
budget: {max_drop: 60%, size: 1MB}
"""
STAGES = ["distill", "prune", "share", "quantize"]

Event = dict[str, Any]
MEASURED_ANEW = {"latency", "memory_mb", "seconds", "graph"}
"""What of a row is a timing, or the memory of a process."""
LIBRARIES = [
    "attar.pipeline", "attar.report", "matplotlib.pyplot", "onnxruntime.quantization",
    "onnxscript.function_libs.torch_lib.ops", "scipy.stats", "sklearn.datasets", "sklearn.metrics",
    "torch.export._trace", "torch.onnx._internal.exporter._core",
    "torchao.quantization.pt2e.quantize_pt2e",
]  # fmt: skip


def stops_after(epoch: int, label: str | None = None) -> Callable[[Event], None]:
    """A listener that interrupts a training (the one called `label`, or any) after an epoch."""

    def tell(event: Event) -> None:
        told = event["event"] == "epoch" and label in (None, event["label"])
        if told and event["epoch"] == epoch:
            raise KeyboardInterrupt

    return tell


OPERATORS: list[Any] = []


def make_once(make: Callable[[], list[Any]]) -> list[Any]:
    OPERATORS.extend(make())
    return OPERATORS


@contextmanager
def hurried() -> Iterator[None]:
    """Times every row as briefly as can be, for nothing here looks at timings, and lets exports
    share the list of known operators, which PyTorch makes anew (a second) for each."""
    from attar.measure import latency
    from attar.pipeline import ledger

    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # of no consequence in other versions
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            make = onnxscript_apis.get_torchlib_ops
            patch.setattr(onnxscript_apis, "get_torchlib_ops", lambda: OPERATORS or make_once(make))
        patch.setattr(ledger, "FIRST_LOOK_SECONDS", 0.01)
        patch.setattr(ledger, "FINAL_SECONDS", 0.01)
        patch.setattr(latency, "WARM_UP_SECONDS", 0.001)
        patch.setattr(latency, "BLOCK_SECONDS", 0.0001)
        yield


def write_recipe(folder: Path, text: str = TINY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def run_recipe(
    recipe: Path, folder: Path, *settings: str, heard: list[Event] | None = None, **how: Any
) -> Any:
    """The finished run of a recipe's file, with `--set` settings laid over it."""
    from attar.pipeline import run
    from attar.recipe import load_recipe

    tell = heard.append if heard is not None else how.pop("tell", lambda event: None)
    with hurried():
        return run(load_recipe(recipe, list(settings)), folder, tell=tell, **how)


class WholeRun(NamedTuple):
    """A finished run: the recipe's file, the run's folder, what it handed back, what it told."""

    recipe: Path
    folder: Path
    run: Any
    events: list[Event]

    @property
    def ledger(self) -> dict[str, Any]:
        return ledger_of(self.folder)

    def row(self, stage: str) -> dict[str, Any]:
        return next(row for row in self.ledger["rows"] if row["stage"] == stage)


def whole_run_in(place: Path) -> WholeRun:
    recipe, folder = write_recipe(place), place / "run"
    events: list[Event] = []
    return WholeRun(recipe, folder, run_recipe(recipe, folder, heard=events), events)


def ledger_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ledger.json").read_text())


def lasting(ledger: dict[str, Any]) -> dict[str, Any]:
    """What of a ledger is the same whenever the recipe is run: all but timings and memory."""
    rows = [{k: v for k, v in row.items() if k not in MEASURED_ANEW} for row in ledger["rows"]]
    return {**ledger, "rows": rows, "speedup": None}


def logged(folder: Path, kind: str) -> list[Event]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def cached(events: list[Event]) -> dict[str, bool]:
    """By stage: whether it was taken from the store."""
    return {e["name"]: e["cached"] for e in events if e["event"] == "stage"}


class Enough(Exception):
    """The run got as far as the test wants to see."""

    def __init__(self, event: Event) -> None:
        super().__init__(event)
        self.event = event


def stop_at(kind: str, **fields: Any) -> Callable[[Event], None]:
    """A listener that ends the run at an event."""

    def tell(event: Event) -> None:
        if event["event"] == kind and fields.items() <= event.get("row", event).items():
            raise Enough(event)

    return tell


# -- processes ----------------------------------------------------------------------------------


def in_fresh_process(work: Callable[..., None], *arguments: Any, limit: float = 300) -> int:
    """Calls `work` in a process that has the libraries imported and nothing else done, and returns
    its exit code: 0, 1 where it raised, -9 where it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        pytest.fail(f"{work.__name__} took longer than {limit} s")
    assert process.exitcode is not None
    return process.exitcode


def run_until(recipe: Path, folder: Path, cache: Path, when: Event, writes: int = 0) -> None:
    """Runs a recipe, in this process, which kills itself as `kill -9` would: when an event with the
    fields of `when` is told, or before so many writes to the disk after it."""
    os.environ["ATTAR_CACHE"] = str(cache)
    left: int | None = None

    def tell(event: Event) -> None:
        nonlocal left
        if left is None and when.items() <= event.items():
            left = writes
            die_if_time()

    def look(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if left is not None and _writes(name, arguments, (str(folder), str(cache))):
            left -= 1
            die_if_time()

    def die_if_time() -> None:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    run_recipe(recipe, folder, resume=True, tell=tell)


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def _writes(name: str, arguments: tuple[Any, ...], places: tuple[str, ...]) -> bool:
    """Whether an audited call changes something in one of the folders."""
    if name not in CHANGES and name != "open":
        return False
    path, flags = arguments[0], arguments[-1]
    if not isinstance(path, str | Path) or not str(path).startswith(places):
        return False
    return name != "open" or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
