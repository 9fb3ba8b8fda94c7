"""What the tests of every runtime share: small networks, images, and bundles used without Attar."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attar.runtimes import Runtime
from attar.runtimes.bundle import write_bundle
from attar.student import Student

SHAPES = ({0: torch.export.Dim("batch", min=1)},)
CLASSES = [str(i) for i in range(10)]
DESCRIPTION = {
    "inputs": [
        {
            "name": "image",
            "layout": "NCHW",
            "dtype": "float32",
            "shape": ["batch", 1, 8, 8],
            "color": "gray",
            "resize": None,
            "scale": 1 / 255,
            "mean": [0.5],
            "std": [0.25],
        }
    ],
    "outputs": [{"name": "logits", "meaning": "logits", "classes": CLASSES}],
}
ALONE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ImportError(f"{{name}} is not on this machine")
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Encoder(nn.Module):
    """A transformer's layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x.squeeze(1))).mean(1))


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))


def net(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def same_class(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.argmax(-1) == b.argmax(-1)


def write_bundles(
    place: Path,
    runtime: Runtime,
    students: dict[str, Student],
    export: Callable[[Student, Path], list[Path]],
) -> Path:
    """A bundle for each student, by its name, in `place`."""
    for name, made in students.items():
        write_bundle(
            place / name,
            runtime=runtime,
            export=lambda folder, made=made: export(made, folder),
            task="image-classification",
            description=DESCRIPTION,
            golden=(images(8).numpy(),),
            notes={"quantization": {"summary": "int8"}} if name == "int8" else None,
        )
    return place


def predict_without(
    absent: Collection[str], bundle: Path, *arguments: Any
) -> subprocess.CompletedProcess[str]:
    """The bundle's own `predict.py` in a process that lacks these packages."""
    program = ALONE.format(absent=set(absent))
    command = [sys.executable, "-c", program, bundle / "predict.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)
