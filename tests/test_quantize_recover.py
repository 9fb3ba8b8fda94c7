"""Recovery on the weights' integer grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attar.quantize.on_grid import OnGrid, rounded
from attar.stages.base import Context
from attar.stages.quantize import Quantize
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective

TASK = ImageClassification()
COARSE = 3
"""Bits so few that a network suffers from being rounded."""


def test_rounding_is_the_runtimes_and_its_gradient_straight_through() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    on_grid = rounded(weight, 63)
    steps = on_grid.detach() / (weight.detach().abs().flatten(1).amax(1) / 63).view(-1, 1, 1, 1)
    torch.testing.assert_close(steps, steps.round())
    assert float(steps.abs().max()) == pytest.approx(63)
    on_grid.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * on_grid.detach())


def test_zeros_and_equal_values_stay_so() -> None:
    weight = torch.tensor([[0.0, 0.3, 0.3], [0.0, 0.0, 0.0], [5.0, 0.3, 0.0]])
    on_grid = rounded(weight, 127, per_tensor=True)
    assert torch.equal(on_grid == 0, weight == 0)
    assert len(on_grid.unique()) == len(weight.unique())


def test_a_network_learns_to_live_on_its_grid(digits, tiny_net) -> None:
    """Rounded to three bits, a network trained on that grid beats one that wasn't."""
    network = tiny_net(8)
    training = Training.model_validate({"epochs": 6, "batch_size": 32, "optimizer": {"lr": 0.01}})
    kwargs = {"data": digits, "task": TASK, "training": training}
    train(network, objective=TaskObjective(TASK), **kwargs)
    before = accuracy_rounded(network, digits)
    objective = OnGrid(TaskObjective(TASK), bits=COARSE)
    train(network, objective=objective, label="recover", **kwargs)
    assert accuracy_rounded(network, digits) > before + 0.02


def accuracy_rounded(network: nn.Module, data) -> float:
    import copy

    coarse = copy.deepcopy(network).eval()
    with torch.no_grad():
        for layer in coarse.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.copy_(rounded(layer.weight, 2 ** (COARSE - 1) - 1))
        batch = next(data.validation.batches(1000))
        return float((coarse(batch.inputs).argmax(1) == batch.targets).double().mean())


def test_the_stage_recovers_and_keeps_the_students_promises(
    digits, tiny_net, tmp_path: Path
) -> None:
    from attar.prune import criteria, prune_weights

    network = tiny_net(4)
    sparse = prune_weights(Student(network), criterion=criteria.get("magnitude")(), ratio=0.5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    run = Context(TASK, digits, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    stage = Quantize.model_validate(
        {"fallback": "off", "calibration": 64, "recover": {"epochs": 1, "batch_size": 64}}
    )
    done = stage.apply(sparse.copy(), run)
    done.check()
    assert [e.kind for e in done.edits] == ["masked", "quantized"]
    assert not torch.equal(done.module.state_dict()["4.weight"], before["4.weight"])
    assert (tmp_path / "recover.pt").exists()
