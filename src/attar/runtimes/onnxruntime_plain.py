"""ONNX Runtime's own post-training quantization, set as its documentation advises: the baseline."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from attar.errors import ExportError
from attar.measure.processor import saturates
from attar.runtimes.onnx_file import save, tidy


class _Reader(CalibrationDataReader):
    def __init__(self, names: list[str], batches: Iterable[tuple[np.ndarray, ...]]) -> None:
        self._names = names
        self._batches: Iterator[tuple[np.ndarray, ...]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(zip(self._names, batch, strict=True))


def quantize_plainly(
    source: Path, target: Path, calibration: Iterable[tuple[np.ndarray, ...]]
) -> None:
    """Writes `source` quantized to int8 by `quantize_static`: QDQ, uint8 activations, int8 weights
    per channel, min-max calibration; 7-bit weights on x86 without VNNI, whose 8-bit products
    overflow. These are the settings that its documentation advises for CPUs.

    Raises `ExportError` with ONNX Runtime's reason.
    """
    names = [i.name for i in onnx.load(str(source)).graph.input]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        try:
            quant_pre_process(str(source), str(prepared))
            quantize_static(
                str(prepared),
                str(quantized),
                _Reader(names, calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=saturates(),
            )
        except OSError:
            raise
        except Exception as error:  # the quantizer raises whatever it stumbles on
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(f"ONNX Runtime can't quantize {source}: {reason}") from error
        save(tidy(onnx.load(str(quantized))), target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
