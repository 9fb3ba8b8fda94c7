"""A live teacher: frozen, and run in the fastest form that answers as the original does."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attar.data.base import Batch
from attar.distill.capture import layer, unwrapped
from attar.distill.criterion import wide
from attar.distill.forms import FASTER, Compiled, CompiledBFloat16, Exported, Form, Original
from attar.distill.signal import Signal
from attar.events import Listener, silent
from attar.measure.processor import cpu_name, instructions
from attar.store import cache_folder, key_of, write_whole
from attar.student.fingerprint import fingerprint, source_of
from attar.tasks.base import Task

LARGEST_ERROR = 0.02
"""How far another form's logits and inner layers may be from the original's, as a share of the
original's length (bfloat16 is 0.009 off on a ResNet-56)."""
LARGEST_SHIFT = 0.1
"""How far any class's probability may move; only that of an undecided example moves much."""
LEAST_AGREEMENT = 0.99
"""The share of a batch's examples that must get the same answer; one may always differ."""
GAIN = 0.9
"""A form is taken that needs at most this share of the time of the best before it."""
FEW_CALLS = 50
"""Fewer calls than this aren't worth looking for a faster form."""
EXPORT_SECONDS = 300
"""The original's time, over all calls, from which trying an export pays."""
COMPILE_SECONDS = 120
"""The best form's time, over all calls, from which compiling pays: a ResNet-56 is compiled in a
dozen seconds, and takes a quarter less time then."""
ROUNDS = 3


class Teacher:
    """A trained network as a source of signals. The person's module is left as it is: in the mode,
    the precision and the memory layout it had, trained further by nobody.

    layers: paths of inner layers that signals hold. calls: how many batches it is going to answer,
    if that is known: what can't pay for itself isn't tried. tell: hears which form was chosen.

    Raises `UsageError` for a layer that isn't there.

    Example:
        >>> teacher = Teacher(net, task, layers=["layer3"])  # doctest: +SKIP
        >>> teacher.signal(batch).features["layer3"].shape  # doctest: +SKIP
        torch.Size([128, 64, 8, 8])
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        *,
        layers: Iterable[str] = (),
        calls: int | None = None,
        tell: Listener = silent,
    ) -> None:
        self._module = unwrapped(module)
        self._task = task
        self._layers = tuple(dict.fromkeys(layers))
        for path in self._layers:
            layer(self._module, path)
        self._calls = calls
        self._tell = tell
        self._form: Form | None = None
        self.choice: dict[str, Any] = {"form": Original.name}
        """Which form answers, and what it was chosen by: `seconds` a batch of each form tried."""

    @property
    def fingerprint(self) -> str:
        """A hash of what its answers depend on besides the examples."""
        return key_of(network=fingerprint(self._module), task=source_of(type(self._task)))

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the inner layers that its signals hold."""
        return self._layers

    def signal(self, batch: Batch) -> Signal:
        """Logits and inner layers, without gradients, on the batch's device."""
        if self._form is None:
            self._form = self._make(Original, batch)
        return self._form(batch)

    def start_epoch(self, epoch: int) -> None:
        """A live teacher answers to whatever it is shown."""

    def settle(self, batch: Batch) -> None:
        """Chooses the form to answer in from now on, by trying each on this batch.

        A form is refused unless its answers are within `LARGEST_ERROR`, `LARGEST_SHIFT` and
        `LEAST_AGREEMENT` of the original's. The choice is remembered for this network, batch shape
        and machine, so that a training that is repeated or resumed has the same teacher to the last
        bit.
        """
        self._form = original = self._make(Original, batch)
        if self._calls is not None and self._calls < FEW_CALLS:
            return
        place = self._place(batch)
        known = _read(place)
        chosen, self.choice = (
            self._known(known, original, batch) if known else self._fastest(original, batch)
        )
        self._form = chosen
        if not known:
            with contextlib.suppress(OSError):  # a cache that can't be written is only slower
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, json.dumps(self.choice))
        if chosen is not original:
            self._tell({"event": "note", "text": self._sentence()})

    def _fastest(self, original: Form, batch: Batch) -> tuple[Form, dict[str, Any]]:
        wanted = original(batch)
        best, seconds = original, {original.name: _seconds(original, batch)}
        for kind in FASTER:
            if not self._can_pay(kind, seconds):
                continue
            form = self._verified(kind, wanted, batch)
            if form is None:
                continue
            seconds[form.name], again = _seconds(form, batch), _seconds(best, batch)
            if seconds[form.name] <= GAIN * min(seconds[best.name], again):
                best = form
        rounded = {name: round(s, 6) for name, s in seconds.items()}
        return best, {"form": best.name, "seconds": rounded}

    def _can_pay(self, kind: type[Form], seconds: dict[str, float]) -> bool:
        """Whether trying a form may save more than it takes. seconds: a batch, of those tried."""
        calls = self._calls or 0
        if kind is Exported:
            return calls * seconds[Original.name] >= EXPORT_SECONDS
        if kind is Compiled and CompiledBFloat16.name in seconds:
            return False
        if issubclass(kind, Compiled):
            return calls * min(seconds.values()) >= COMPILE_SECONDS
        return True

    def _known(
        self, choice: dict[str, Any], original: Form, batch: Batch
    ) -> tuple[Form, dict[str, Any]]:
        """The remembered form, verified anew: the weights may be others."""
        for kind in FASTER:
            if kind.name == choice["form"]:
                form = self._verified(kind, original(batch), batch)
                if form is not None:
                    return form, choice
        return original, {**choice, "form": original.name}

    def _verified(self, kind: type[Form], wanted: Signal, batch: Batch) -> Form | None:
        if not kind.fits(self._module, batch, self._layers):
            return None
        # The person's code runs in ways its author may not have thought of: whatever goes wrong,
        # the original still answers.
        with contextlib.suppress(Exception):
            form = self._make(kind, batch)
            if _agree(wanted, form(batch), self._task):
                return form
        return None

    def _make(self, kind: type[Form], batch: Batch) -> Form:
        return kind(self._module, self._task, batch, self._layers)

    def _place(self, batch: Batch) -> Path:
        device = batch.inputs.device
        key = key_of(
            network=str(self._module),
            shapes=[tuple(p.shape) for p in self._module.parameters()],
            batch=tuple(batch.inputs.shape),
            layers=self._layers,
            calls=self._calls,
            forms=[kind.name for kind in FASTER],
            machine=torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else [cpu_name(), *instructions()],
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        return cache_folder() / "teacher-forms" / f"{key}.json"

    def _sentence(self) -> str:
        seconds = self.choice["seconds"]
        faster = seconds[Original.name] / seconds[self.choice["form"]]
        return (
            f"the teacher answers as {self.choice['form']}, {faster:.1f} times as fast as the "
            f"original and within {LARGEST_ERROR:.0%} of its answers"
        )


def _agree(wanted: Signal, found: Signal, task: Task) -> bool:
    """Whether two signals are the same within the bounds."""
    a, b = wide(wanted.logits), wide(found.logits)
    if a.shape != b.shape or not all(
        _error(x, y) <= LARGEST_ERROR
        for x, y in [(a, b), *((wanted.features[k], found.features[k]) for k in wanted.features)]
    ):
        return False
    if float((a.softmax(-1) - b.softmax(-1)).abs().max()) > LARGEST_SHIFT:
        return False
    differing = ~torch.as_tensor(task.agreement(a.cpu().numpy(), b.cpu().numpy()))
    return int(differing.sum()) <= max(1, (1 - LEAST_AGREEMENT) * len(a))


def _error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    wanted, found = wide(wanted), wide(found)
    return float((wanted - found).norm() / wanted.norm().clamp_min(1e-12))


def _seconds(form: Form, batch: Batch) -> float:
    """The least time of a few calls: what disturbs a call only ever makes it slower."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        form(batch)
        if batch.inputs.device.type == "cuda":
            torch.cuda.synchronize(batch.inputs.device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def _read(place: Path) -> dict[str, Any] | None:
    try:
        choice = json.loads(place.read_text(encoding="utf-8"))
        return choice if {"form", "seconds"} <= set(choice) else None
    except (OSError, ValueError, TypeError):
        return None
