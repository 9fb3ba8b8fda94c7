"""What a student costs in its runtime: bytes of the file, and times freed of the machine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attar.runtimes import target
from attar.runtimes.base import runtimes
from attar.runtimes.target import Target
from attar.student import Student

X = torch.randn(2, 8)


def made(**options) -> Target:
    runtime = options.pop("runtime", None) or runtimes.get("onnxruntime")()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    return Target(runtime, (X,), shapes, (["x"], ["y"]), (X[:1].numpy(),), seconds=0.02)


def test_bytes_are_those_of_the_file():
    small, large = (Student(nn.Sequential(nn.Linear(8, n), nn.Linear(n, 2))) for n in (16, 512))
    small_bytes, large_bytes = made().bytes(small), made().bytes(large)
    assert large_bytes - small_bytes == pytest.approx((512 - 16) * (8 + 1 + 2) * 4, rel=0.02)


def test_a_student_is_answered_and_timed():
    assert made().latency_ms(Student(nn.Linear(8, 2))) > 0


def test_a_machine_that_slows_down_slows_no_figure(monkeypatch):
    slower = iter([1.0, 3.0, 0.5])
    base = {"it": 0.2, "first": 0.4}

    def timed(calls, seconds):
        factor = next(slower)
        if len(calls) == 1:
            return {"it": {"p50_ms": base["first"] * factor}}
        return {name: {"p50_ms": base[name] * factor} for name in calls}

    monkeypatch.setattr(target, "time_interleaved", timed)
    runtime = SimpleNamespace(
        export=lambda student, folder, **options: [],
        session=lambda folder, threads: lambda *inputs: inputs,
    )
    measured = made(runtime=runtime)
    found = [measured.latency_ms(None) for _ in range(3)]
    np.testing.assert_allclose(found, [0.4, 0.2, 0.2])
