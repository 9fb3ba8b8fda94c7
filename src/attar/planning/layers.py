"""What layers cost at other widths: measured in the runtime, on this machine, once.

Multiply-accumulates don't tell how long a layer takes: kernels work on blocks of channels, so that
of two widths the larger can be the faster, and a layer's cost falls in steps. So every layer is
built anew at every width that is asked about, many in one file, run, and timed one by one by the
runtime's own profiler. Times are kept in Attar's cache, by runtime, threads, machine and shape.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import UsageError
from attar.measure.machine import environment
from attar.runtimes.base import Runtime, runtimes
from attar.store import cache_folder, key_of, write_whole
from attar.student import Student
from attar.training.evaluation import evaluating

AT_ONCE = 48
"""Layers in one file."""
RUNS = 60
FED = 4
"""Channels that inputs are made of."""

KINDS: dict[str, type[nn.Module]] = {
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
    "Linear": nn.Linear,
}


@dataclass(frozen=True)
class Shape:
    """A layer and what it is applied to.

    kind: of `KINDS`. inputs, outputs: its channels. places: the input's other dimensions, batch
    first (a convolution's height and width, a linear layer's positions). groups, kernel, stride,
    padding, dilation: a convolution's, else empty.
    """

    kind: str
    inputs: int
    outputs: int
    places: tuple[int, ...]
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        if not self.kernel:
            return math.prod(self.places) * self.inputs * self.outputs
        per = self.inputs // self.groups * self.outputs * math.prod(self.kernel)
        sides = zip(self.places[1:], self.padding, self.stride, self._reach(), strict=True)
        placed = math.prod((n + 2 * p - reach) // s + 1 for n, p, s, reach in sides)
        return self.places[0] * per * placed

    def _reach(self) -> list[int]:
        """How many places a kernel spans."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    def build(self) -> nn.Module:
        """The layer, with random weights."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs)
        return KINDS[self.kind](  # type: ignore[call-arg]
            self.inputs, self.outputs, self.kernel, self.stride, self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def input_size(self) -> tuple[int, ...]:
        """The input's size: channels come second, or last for a linear layer."""
        if not self.kernel:
            return (*self.places, self.inputs)
        return (self.places[0], self.inputs, *self.places[1:])


def shapes_of(module: nn.Module, example: tuple[Any, ...]) -> dict[str, Shape]:
    """The layers of a network that can be built anew, by path, as they are applied to `example`
    (the first time, where a layer is used again)."""
    found: dict[str, Shape] = {}

    def note(path: str, layer: Any) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            if path not in found and given and isinstance(given[0], Tensor):
                shape = _shape(layer, given[0].shape)
                if shape is not None:
                    found[path] = shape

        return hook

    layers = [(p, m) for p, m in module.named_modules() if type(m).__name__ in KINDS]
    hooks = [m.register_forward_pre_hook(note(p, m)) for p, m in layers]
    try:
        with evaluating(module):
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _shape(layer: Any, size: torch.Size) -> Shape | None:
    if isinstance(layer, nn.Linear):
        return Shape("Linear", layer.in_features, layer.out_features, tuple(size[:-1]))
    if len(size) != layer.weight.dim() or layer.padding_mode != "zeros":
        return None
    padding = layer.padding
    if isinstance(padding, str):
        padding = tuple(
            d * (k - 1) // 2 if padding == "same" else 0
            for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        )
    return Shape(
        type(layer).__name__, layer.in_channels, layer.out_channels, (size[0], *size[2:]),
        layer.groups, layer.kernel_size, layer.stride, padding, layer.dilation,
    )  # fmt: skip


class LayerTimes:
    """Measured times of layers in one runtime on this machine, kept for the next time.

    int8: whether of layers as `attar.quantize` makes them, else in float. tell: called with how
    many layers are about to be measured. Raises `UsageError` for a runtime that doesn't tell times
    of layers.

    Example:
        >>> times = LayerTimes("onnxruntime", threads=1)
        >>> wide = Shape("Linear", 256, 256, (1,))
        >>> times.microseconds([wide])[wide] > 0          # doctest: +SKIP
        True
    """

    def __init__(
        self,
        runtime: str,
        threads: int,
        folder: Path | None = None,
        tell: Callable[[int], None] = lambda count: None,
        int8: bool = False,
    ) -> None:
        self._runtime, self._threads, self._tell = runtimes.get(runtime)(), threads, tell
        self._int8 = int8
        if type(self._runtime).layer_times is Runtime.layer_times:
            raise UsageError(
                f"the runtime {runtime} doesn't tell how long its layers take: give macs or "
                "parameters instead of latency_ms"
            )
        of = [self._runtime.name, self._runtime.available()[1]]
        form = {"form": "int8"} if int8 else {}
        key = key_of(runtime=of, threads=threads, on=_machine(), **form)
        self._file = (folder or cache_folder() / "layer-times") / f"{key}.json"
        self._known = self._read()

    def microseconds(self, shapes: Iterable[Shape]) -> dict[Shape, float]:
        """How long each takes, in whole microseconds; what isn't known is measured. Raises
        `UsageError` for a layer that the runtime says nothing of."""
        shapes = list(dict.fromkeys(shapes))
        missing = [s for s in shapes if s not in self._known]
        if missing:
            self._tell(len(missing))
        for start in range(0, len(missing), AT_ONCE):
            self._measure(missing[start : start + AT_ONCE])
            self._write()
        return {s: self._known[s] for s in shapes}

    def _measure(self, shapes: Sequence[Shape]) -> None:
        bench = _Bench(shapes).eval()
        sizes = bench.sizes
        example = tuple(torch.rand(size) for size in sizes)
        names = (
            [f"input{i}" for i in range(len(sizes))],
            [f"output{i}" for i in range(len(shapes))],
        )
        dynamic: Any = None  # nothing is: a network of any number of inputs has no place to say it
        with tempfile.TemporaryDirectory() as folder:
            self._runtime.export(
                self._student(bench, example, dynamic),
                Path(folder),
                example=example,
                dynamic_shapes=dynamic,
                names=names,
            )
            inputs = tuple(x.numpy() for x in example)
            found = self._runtime.layer_times(
                Path(folder), inputs, threads=self._threads, runs=RUNS
            )
        for i, shape in enumerate(shapes):
            if f"layers.{i}" not in found:
                raise UsageError(
                    f"the runtime {self._runtime.name} doesn't tell how long a layer of kind "
                    f"{shape.kind} takes: give macs or parameters instead of latency_ms"
                )
            self._known[shape] = found[f"layers.{i}"]

    def _student(self, bench: nn.Module, example: tuple[Tensor, ...], dynamic: Any) -> Student:
        student = Student(bench)
        if not self._int8:
            return student
        from attar.quantize.edit import Scheme
        from attar.quantize.post_training import quantize

        scheme = Scheme(runtime=self._runtime.name, calibration=1)
        return quantize(student, scheme, [example], example=example, dynamic_shapes=dynamic)

    def _read(self) -> dict[Shape, float]:
        try:
            rows = json.loads(self._file.read_text(encoding="utf-8"))
            return {_of_json(row["shape"]): float(row["us"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: measured anew
            return {}

    def _write(self) -> None:
        rows = [{"shape": asdict(shape), "us": us} for shape, us in self._known.items()]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(rows))


class _Bench(nn.Module):
    """Layers side by side, each followed by what runtimes fuse into it.

    A convolution's input comes from another one, as in a network: runtimes lay out what passes
    between two of them in blocks of channels. Layers of equal inputs share them.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(shape.build() for shape in shapes)
        needed = list(dict.fromkeys(shape.input_size() for shape in shapes))
        self._reads = [needed.index(shape.input_size()) for shape in shapes]
        feeds = {shape.input_size(): _feed(shape) for shape in shapes}
        self.feeds = nn.ModuleList(feeds[size] for size in needed)
        self.sizes = [
            size if isinstance(feeds[size], nn.Identity) else (size[0], FED, *size[2:])
            for size in needed
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        fed = [feed(x).relu() for feed, x in zip(self.feeds, inputs, strict=True)]
        return tuple(
            layer(fed[i]).relu() for layer, i in zip(self.layers, self._reads, strict=True)
        )


def _feed(shape: Shape) -> nn.Module:
    """What makes a layer's input out of `FED` channels; a network's own few channels are given."""
    if not shape.kernel or shape.inputs <= FED:
        return nn.Identity()
    return KINDS[shape.kind](FED, shape.inputs, 1)  # type: ignore[call-arg]


def _machine() -> dict[str, object]:
    found = environment()
    return {name: found[name] for name in ("cpu", "instructions", "system")}


def _of_json(record: dict[str, Any]) -> Shape:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Shape(**fields)
