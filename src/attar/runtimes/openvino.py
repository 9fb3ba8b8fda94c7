"""OpenVINO: an ONNX file, float or int8, compiled for the processor when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attar.errors import ExportError
from attar.runtimes.base import GraphPasses, Runtime, Session, runtimes
from attar.runtimes.inside import Operator
from attar.runtimes.onnxruntime import OnnxRuntime


@runtimes.register("openvino")
class OpenVino(Runtime):
    """OpenVINO on the CPU: float and int8 kernels, one `.onnx` file.

    The file stays ONNX, which OpenVINO reads as it is and as fast. Its own format answers the same
    and is larger: an int8 ResNet-20 takes 735 KB of it (494 KB with passes done ahead), and 297 KB
    as ONNX. Who needs that format has it by `ovc model.onnx --compress_to_fp16=False`.

    Graph passes are part of compiling, for the processor at hand: they can't be left out, and
    nothing of them is stored by `optimise`.
    """

    name: ClassVar[str] = "openvino"
    model_file: ClassVar[str] = "model.onnx"
    passes: ClassVar[tuple[GraphPasses, ...]] = ("all",)
    # Two integers to a byte (BitwiseAnd, BitShift) come out wrong in OpenVINO: no int4-weights.
    schemes: ClassVar[tuple[str, ...]] = (
        "int8",
        "int8-weights",
        "float16",
        "bfloat16",
        "int8-dynamic",
    )

    @classmethod
    def available(cls) -> tuple[bool, str]:
        from attar.runtimes.openvino_session import core, import_openvino

        try:
            core()
        except ImportError as error:
            return False, f"pip install 'attar[openvino]', or just openvino ({error})"
        except RuntimeError:
            return False, "this build of openvino has no part for CPUs: pip install openvino"
        return True, import_openvino().__version__.partition("-")[0]

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
        from attar.runtimes.onnx_bytes import store_in_bytes
        from attar.runtimes.onnx_codebooks import share_constants
        from attar.runtimes.onnx_export import export_onnx
        from attar.runtimes.onnx_file import save, tidy
        from attar.runtimes.onnx_weights import spell_out

        proto = export_onnx(student, example=example, dynamic_shapes=dynamic_shapes, names=names)
        # By a cast and a product of its weight, OpenVINO would take a layer for one in int8.
        store_in_bytes(proto, negated=True)
        spell_out(proto, negated=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.model_file
        save(tidy(proto), path)
        share_constants(path, student, inline=True)
        return [path]

    def session(self, folder: Path, *, threads: int = 1, passes: GraphPasses = "all") -> Session:
        from attar.runtimes.openvino_session import OpenVinoSession

        return OpenVinoSession(self.loadable(folder, passes), threads=threads)

    def plain_int8(
        self, source: Path, folder: Path, calibration: Iterable[tuple[np.ndarray, ...]]
    ) -> list[Path]:
        raise ExportError(
            "OpenVINO's own quantization is a package of its own, NNCF, which Attar doesn't use"
        )

    # OpenVINO wants the same of a graph: uint8 all around a layer, on one grid what is moved.
    quantizer = OnnxRuntime.quantizer

    def layer_times(
        self, folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
    ) -> dict[str, float]:
        from attar.runtimes.openvino_profile import layer_times

        return layer_times(folder / self.model_file, inputs, threads=threads, runs=runs)

    def inside(
        self, folder: Path, inputs: tuple[np.ndarray, ...], *, threads: int = 1, runs: int = 50
    ) -> list[Operator]:
        from attar.runtimes.openvino_profile import inside

        return inside(folder / self.model_file, inputs, threads=threads, runs=runs)

    def describe(self, folder: Path) -> dict[str, Any]:
        from attar.runtimes.onnx_file import opset
        from attar.runtimes.openvino_session import CONFIG

        return {
            **super().describe(folder),
            "opset": opset(folder / self.model_file),
            "config": CONFIG,
        }

    def embed(self, folder: Path, core: dict[str, Any]) -> None:
        from attar.runtimes.onnx_file import embed

        embed(folder / self.model_file, core)
