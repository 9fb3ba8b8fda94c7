"""ONNX Runtime: one `.onnx` file, answering on any processor that ONNX Runtime knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attar.runtimes.base import GraphPasses, Runtime, Session, runtimes
from attar.runtimes.inside import Operator


@runtimes.register("onnxruntime")
class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU: float and int8 kernels, graph passes, one `.onnx` file."""

    name: ClassVar[str] = "onnxruntime"
    model_file: ClassVar[str] = "model.onnx"
    schemes: ClassVar[tuple[str, ...]] = (
        "int8",
        "int8-weights",
        "int4-weights",
        "float16",
        "bfloat16",
        "int8-dynamic",
    )

    @classmethod
    def available(cls) -> tuple[bool, str]:
        try:
            import onnxruntime
        except ImportError as error:
            return False, f"pip install onnxruntime ({error})"
        try:
            return True, version("onnxruntime")
        except PackageNotFoundError:  # a build under another name, such as onnxruntime-gpu
            return True, onnxruntime.__version__

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
        from attar.runtimes.onnx_codebooks import share_constants
        from attar.runtimes.onnx_export import export_onnx
        from attar.runtimes.onnx_file import save, tidy
        from attar.runtimes.onnxruntime_float import keep_float
        from attar.runtimes.onnxruntime_graph import optimise_file

        proto = export_onnx(student, example=example, dynamic_shapes=dynamic_shapes, names=names)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.model_file
        save(tidy(keep_float(proto)), path)
        if optimise:
            optimise_file(path, [t.detach().cpu().numpy() for t in example])
        share_constants(path, student)
        return [path]

    def session(self, folder: Path, *, threads: int = 1, passes: GraphPasses = "all") -> Session:
        from attar.runtimes.onnxruntime_session import OnnxSession

        return OnnxSession(self.loadable(folder, passes), threads=threads, passes=passes)

    def plain_int8(
        self, source: Path, folder: Path, calibration: Iterable[tuple[np.ndarray, ...]]
    ) -> list[Path]:
        from attar.runtimes.onnxruntime_plain import quantize_plainly

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.model_file
        quantize_plainly(source / self.model_file, path, calibration)
        return [path]

    def quantizer(
        self,
        *,
        activation: Callable[..., Any],
        weight: Callable[..., Any],
        weight_bits: int = 8,
        float_layers: Collection[str] = (),
    ) -> Any:
        from attar.runtimes.onnxruntime_quantizer import OnnxRuntimeQuantizer

        return OnnxRuntimeQuantizer(
            activation=activation, weight=weight, weight_bits=weight_bits, float_layers=float_layers
        )

    def layer_times(
        self, folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
    ) -> dict[str, float]:
        from attar.runtimes.onnxruntime_profile import layer_times

        return layer_times(folder, inputs, threads=threads, runs=runs)

    def inside(
        self, folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
    ) -> list[Operator]:
        from attar.runtimes.onnxruntime_profile import inside

        return inside(folder, inputs, threads=threads, runs=runs)

    def describe(self, folder: Path) -> dict[str, Any]:
        from attar.runtimes.onnx_file import opset
        from attar.runtimes.onnxruntime_session import CONFIG, CONFIG_WITHOUT_VNNI

        return {
            **super().describe(folder),
            "opset": opset(folder / self.model_file),
            "config": CONFIG,
            "config_without_vnni": CONFIG_WITHOUT_VNNI,
        }

    def embed(self, folder: Path, core: dict[str, Any]) -> None:
        from attar.runtimes.onnx_file import embed

        embed(folder / self.model_file, core)
