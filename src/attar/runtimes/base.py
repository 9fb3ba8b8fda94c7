"""A runtime: what executes the deployed model. A quantizer, an exporter with its graph passes,
and a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from attar.errors import BundleError, UsageError
from attar.registry import Registry
from attar.runtimes.inside import Operator

runtimes: Registry[type[Runtime]] = Registry("runtime", "attar.runtimes")

GraphPasses = Literal["all", "none"]


class Session(Protocol):
    """A loaded model, ready to answer."""

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs for one batch."""
        ...


class Runtime(ABC):
    """One way to execute a model. A subclass is one file, registered by name.

    Exporting needs PyTorch; a session must not import it: the target may not have it. (ExecuTorch's
    is the exception: from Python, its package can't load a file without PyTorch.)
    """

    name: ClassVar[str]
    model_file: ClassVar[str]
    """The name of the main file it writes: `model.onnx`."""
    passes: ClassVar[tuple[GraphPasses, ...]] = ("all", "none")
    """The graph optimisation that a session can be asked for; `("all",)` where it can't be left
    out, so that there is nothing to compare it with."""
    schemes: ClassVar[tuple[str, ...]] = ()
    """The ways of quantizing that its files hold and its kernels compute: `int8` (`quantizer`),
    `int8-weights`, `int4-weights`, `float16`, `bfloat16`, `int8-dynamic`."""

    @classmethod
    @abstractmethod
    def available(cls) -> tuple[bool, str]:
        """Whether it works on this machine; else what to install, or its version if it does."""

    @abstractmethod
    def export(
        self,
        student: Any,
        folder: Path,
        *,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
        names: tuple[list[str], list[str]],
        optimise: bool = False,
    ) -> list[Path]:
        """Writes the model file(s) of a `attar.student.Student` into `folder`.

        names: input and output names. optimise: run the runtime's graph passes now and store their
        result (`deploy`), rather than leaving them to the session. A student with a `quantized`
        edit is written quantized. Raises `ExportError` naming what can't be exported.
        """

    def loadable(self, folder: Path, passes: GraphPasses) -> Path:
        """The main file in a bundle's folder, for a session with these passes.

        Raises `BundleError` where it is missing, `UsageError` for passes that the runtime doesn't
        know.
        """
        if passes not in self.passes:
            raise UsageError(
                f"{self.name} can't leave out its graph passes: they are part of how it compiles"
            )
        path = folder / self.model_file
        if not path.exists():
            raise BundleError(f"{path} is missing")
        return path

    @abstractmethod
    def session(self, folder: Path, *, threads: int = 1, passes: GraphPasses = "all") -> Session:
        """Loads the model in a bundle's folder. Raises `BundleError` for one that can't be loaded,
        `UsageError` for passes that the runtime doesn't know."""

    @abstractmethod
    def plain_int8(
        self, source: Path, folder: Path, calibration: Iterable[tuple[np.ndarray, ...]]
    ) -> list[Path]:
        """The runtime's own post-training quantization of an exported float model, its defaults:
        what anyone gets without Attar."""

    def quantizer(
        self,
        *,
        activation: Callable[..., Any],
        weight: Callable[..., Any],
        weight_bits: int = 8,
        float_layers: Collection[str] = (),
    ) -> Any:
        """The PT2E `Quantizer` that marks what this runtime computes in int8.

        activation, weight: make the observers, each with a `key` that outlives the graph.
        weight_bits: 8, or 7. float_layers: paths of modules that compute in float; `*` means all.
        Raises `UsageError` where no int8 graphs are made for the runtime.
        """
        raise UsageError(f"no int8 graphs are made for the runtime {self.name}: leave out quantize")

    @classmethod
    def require_scheme(cls, scheme: str) -> None:
        """Raises `UsageError` for a way of quantizing that this runtime lacks."""
        if scheme not in cls.schemes:
            works = f"it has {', '.join(cls.schemes)}" if cls.schemes else "leave out quantize"
            raise UsageError(f"the runtime {cls.name} has no scheme {scheme}: {works}")

    def layer_times(
        self, folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
    ) -> dict[str, float]:
        """By module path: the microseconds that a layer with weights takes in a call on `inputs`,
        with what was fused into it; of use for comparing two exports. Empty for a runtime that
        doesn't tell."""
        return {}

    def inside(
        self, folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
    ) -> list[Operator]:
        """The operators that a session on this machine runs, in their order, each with its median
        time over `runs` calls on `inputs`. Measuring slows each operator by about a microsecond, so
        the sum is no latency. Empty for a runtime that doesn't tell."""
        return []

    def describe(self, folder: Path) -> dict[str, Any]:
        """What the manifest's `runtime` says: `name`, `version`, and what else loading needs."""
        return {"name": self.name, "version": self.available()[1]}

    def embed(self, folder: Path, core: dict[str, Any]) -> None:  # noqa: B027 - a format may have no place
        """Writes the manifest's core (schema, task, inputs, outputs) into the model file, where the
        format has a place for it, so that the file alone says what its input wants."""
