"""Layers paired by themselves: by stage, shape and measured similarity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attar.data.base import Batch
from attar.distill.pairing import _in_order, _Layer, _similarity, pair_layers
from attar.errors import UsageError
from attar.models import ModelSpec, build
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification

TASK = ImageClassification()


def batch(*shape: int, seed: int = 0) -> Batch:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return Batch(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))


def resnet(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return build(ModelSpec(model=name, channels=3, classes=10))


class Encoder(nn.Module):
    """Rows of an image as tokens through transformer blocks."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(24, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.transpose(1, 2).flatten(2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_residual_networks_are_paired_stage_by_stage():
    student, teacher = resnet("cifar-resnet8"), resnet("cifar-resnet20")
    paired = pair_layers(student, teacher, TASK, [batch(16, 3, 32, 32)])
    assert [one.pair.student for one in paired] == ["layer1", "layer2", "layer3"]
    for stage, one in enumerate(paired, 1):
        assert one.pair.teacher.startswith(f"layer{stage}")
        assert one.student_shape[1:] == one.teacher_shape[1:]
        assert -1 <= one.similarity <= 1.01


@pytest.mark.parametrize("kind", ["cnn", "transformer", "plain"])
def test_a_network_is_paired_with_itself_layer_by_layer(kind):
    torch.manual_seed(0)
    network = {
        "cnn": lambda: resnet("cifar-resnet8"),
        "transformer": lambda: Encoder(8, 6),
        "plain": lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Flatten()
        ),
    }[kind]()
    shape = (16, 3, 8, 8) if kind == "transformer" else (16, 3, 32, 32)
    paired = pair_layers(network, network, TASK, [batch(*shape), batch(*shape, seed=1)])
    assert len(paired) > 1
    for one in paired:
        assert one.pair.student == one.pair.teacher
        assert one.similarity == pytest.approx(1, abs=1e-6)


def test_a_copied_block_is_found_among_others():
    student, teacher = Encoder(8, 2), Encoder(8, 6)
    student.embed.load_state_dict(teacher.embed.state_dict())
    for own, wanted in ((0, 0), (1, 1)):
        student.blocks[own].load_state_dict(teacher.blocks[wanted].state_dict())
    paired = pair_layers(student.eval(), teacher.eval(), TASK, [batch(16, 3, 8, 8)])
    assert [(o.pair.student, o.pair.teacher) for o in paired] == [
        ("blocks.0", "blocks.0"),
        ("blocks.1", "blocks.1"),
    ]


def test_similarity_is_unbiased_linear_cka():
    rng = np.random.default_rng(0)
    n, x, y = 7, rng.normal(size=(7, 3)), rng.normal(size=(7, 5))
    y[:, :3] += x

    def hsic(a, b):
        k, m = (f @ f.T * (1 - np.eye(n)) for f in (a, b))
        one = np.ones(n)
        value = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (value - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    x, y = x - x.mean(0), y - y.mean(0)
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    layers = []
    for f in (x, y):
        gram = torch.from_numpy(f @ f.T).fill_diagonal_(0)
        layers.append(_Layer("a", (f.shape[1],), [gram]))
    assert _similarity(*layers) == pytest.approx(expected, abs=1e-12)


def test_pairs_keep_their_order_and_are_as_many_as_possible():
    everything = [[True] * 3] * 2
    assert _in_order(everything, [[0.0, 0.9, 0.1], [0.8, 0.0, 0.1]]) == [(0, 1), (1, 2)]
    assert _in_order([[True, False], [True, False]], [[0.1, 0], [0.9, 0]]) == [(1, 0)]
    assert _in_order([], []) == []


def test_networks_are_left_as_they_were():
    student, teacher = resnet("cifar-resnet8").train(), resnet("cifar-resnet8").eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    pair_layers(student, teacher, TASK, [batch(8, 3, 32, 32)])
    assert all(m.training for m in student.modules()) and not teacher.training
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_networks_of_two_kinds_are_refused_in_a_sentence():
    with pytest.raises(UsageError, match="have no inner layers that can be compared"):
        pair_layers(
            Encoder(8, 2),
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)),
            TASK,
            [batch(8, 3, 8, 8)],
        )
    with pytest.raises(UsageError, match="4 examples at least"):
        pair_layers(Encoder(8, 2), Encoder(8, 2), TASK, [batch(2, 3, 8, 8)])


def small(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def test_a_recipe_leaves_the_pairs_open(digits, tmp_path):
    heard = []
    run = Context(task=TASK, data=digits, teacher=small(8).eval(), seed=1, work=tmp_path)
    stage = Distill(criteria=["kd", {"feature": {"layers": "auto", "weight": 0.5}}], epochs=1)
    assert Distill.model_validate(stage.model_dump()).criteria[1]["feature"]["layers"] == "auto"
    stage.apply(Student(small(4)), replace(run, tell=heard.append))
    assert [one["student"] for one in run.found["pairs"]] == ["0", "3"]
    said = [e["text"] for e in heard if e["event"] == "note"]
    assert any("paired by itself: 0 (4, 8, 8) with 0 (8, 8, 8), similarity" in s for s in said)
