"""What tests share. Threads are few, so that tests side by side don't slow each other down."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Attar's cache and configuration, away from the person's own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ATTAR_CACHE", "ATTAR_CONFIG"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.delenv("ATTAR_DEBUG", raising=False)
        yield


@pytest.fixture(scope="session")
def attar_data() -> Path:
    """The folder of real data sets. Without it a test is skipped; in CI it fails."""
    folder = os.environ.get("ATTAR_DATA")
    if folder:
        return Path(folder)
    reason = "ATTAR_DATA is not set: it names a folder with MNIST, cifar10, checkpoints and others"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def digits():
    """Scikit-learn's digits, 300 of them to learn from: `attar.data.Data`."""
    from attar.data import DataConfig, load_data

    return load_data(DataConfig.model_validate({"source": "digits", "subset": 300}))


@pytest.fixture
def tiny_net():
    """Makes networks for 8 × 8 gray images and ten classes, newly initialised by a fixed seed:
    `tiny_net(width)`."""
    import torch
    from torch import nn

    def make(width: int = 8) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )

    return make


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of a tiny recipe with every stage: `WholeRun`. It is only looked at."""
    from run_fixture import whole_run_in

    return whole_run_in(tmp_path_factory.mktemp("whole"))
