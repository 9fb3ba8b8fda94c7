"""The machine and the software a figure was measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil

from attar.measure.processor import cpu_name, instructions

PACKAGES = (
    "torch", "torchvision", "torchao", "onnx", "onnxruntime", "openvino", "executorch",
    "accelerate", "numpy",
)  # fmt: skip


def package_version(name: str) -> str | None:
    """An installed distribution's version; `None` where it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """What `ledger.json` says of where its figures come from."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "instructions": instructions(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "packages": {p: v for p in PACKAGES if (v := package_version(p))},
    }
