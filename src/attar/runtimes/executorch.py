"""ExecuTorch with XNNPACK: one `.pte` file, float or int8, for phones and small boards too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attar.errors import ExportError
from attar.runtimes.base import GraphPasses, Runtime, Session, runtimes


@runtimes.register("executorch")
class ExecuTorch(Runtime):
    """ExecuTorch with XNNPACK on the CPU: float and int8 kernels, one `.pte` file.

    This is PyTorch's road to a phone's ARM processor, and what came of QNNPACK: the file runs from
    C++, Java or Swift there, without PyTorch. From Python it needs the package executorch, which is
    linked to PyTorch.

    Graph passes are part of exporting: they can't be left out, nor is anything left to do for
    `optimise`. Layers that stay float are stored in float.
    """

    name: ClassVar[str] = "executorch"
    model_file: ClassVar[str] = "model.pte"
    passes: ClassVar[tuple[GraphPasses, ...]] = ("all",)
    schemes: ClassVar[tuple[str, ...]] = ("int8",)

    @classmethod
    def available(cls) -> tuple[bool, str]:
        from attar.runtimes.executorch_library import import_executorch

        try:
            library = import_executorch()
            if not library._is_available("XnnpackBackend"):
                return False, "this build of executorch lacks XNNPACK: pip install executorch"
            return True, version("executorch")
        except (ImportError, PackageNotFoundError) as error:
            return False, f"pip install 'attar[executorch]', or just executorch ({error})"

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
        from attar.runtimes.executorch_export import export_executorch

        program = export_executorch(student, example=example, dynamic_shapes=dynamic_shapes)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.model_file
        path.write_bytes(program)
        return [path]

    def session(self, folder: Path, *, threads: int = 1, passes: GraphPasses = "all") -> Session:
        from attar.runtimes.executorch_session import ExecuTorchSession

        return ExecuTorchSession(self.loadable(folder, passes), threads=threads)

    def plain_int8(
        self, source: Path, folder: Path, calibration: Iterable[tuple[np.ndarray, ...]]
    ) -> list[Path]:
        raise ExportError(
            "ExecuTorch quantizes a network before it is exported, not the exported file"
        )

    def quantizer(
        self,
        *,
        activation: Callable[..., Any],
        weight: Callable[..., Any],
        weight_bits: int = 8,
        float_layers: Collection[str] = (),
    ) -> Any:
        from attar.runtimes.executorch_quantizer import XnnpackQuantizer

        return XnnpackQuantizer(
            activation=activation, weight=weight, weight_bits=weight_bits, float_layers=float_layers
        )

    def describe(self, folder: Path) -> dict[str, Any]:
        from attar.runtimes.executorch_session import ExecuTorchSession

        session = ExecuTorchSession(folder / self.model_file)
        return {
            **super().describe(folder),
            "backend": "xnnpack",
            "largest_batch": session.largest_batch,
        }
