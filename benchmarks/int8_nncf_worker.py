"""One network quantized by NNCF, in an environment of its own: what `int8_runtime.py` starts.

    PYTHON benchmarks/int8_nncf_worker.py FLOAT.onnx IMAGES.npz INT8.onnx [--transformer]

NNCF's settings are those it advises for CPUs: the mixed preset (asymmetric activations, symmetric
weights a channel), and its model type for transformers. Needs `pip install nncf onnx onnxruntime`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nncf
import numpy as np
import onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "images", "target"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--transformer", action="store_true")
    arguments = parser.parse_args()
    model = onnx.load(str(arguments.source))
    name = model.graph.input[0].name
    batch = np.load(arguments.images)["inputs"]
    images = [{name: batch[i : i + 1]} for i in range(len(batch))]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if arguments.transformer else None,
        subset_size=len(images),
    )
    onnx.save(quantized, str(arguments.target))


if __name__ == "__main__":
    main()
