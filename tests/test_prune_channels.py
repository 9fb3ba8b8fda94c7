"""Pruning a student's channels: which go, what is recorded, what is refused."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.errors import CheckpointError, UsageError
from attar.models.base import ModelSpec
from attar.models.cifar_resnet import CifarResNet
from attar.prune import (
    ChannelsRemoved,
    Criterion,
    Widths,
    criteria,
    cubic,
    prune_channels,
    prune_weights,
)
from attar.student import Student, load_student, save_student

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet(spec: ModelSpec | None = None) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet((1, 1, 1), 3, 5).eval()


def plain(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 24),
        nn.ReLU(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def prune(module: nn.Module, criterion: str = "magnitude", **options):
    return prune_channels(
        Student(module), (IMAGES,), criterion=criteria.get(criterion)(), **options
    )


def test_a_saved_student_answers_the_same_in_a_fresh_network(tmp_path):
    spec = ModelSpec(model="resnet")
    student, _ = prune_channels(
        Student(resnet(), spec), (IMAGES,), criterion=criteria.get("magnitude")(), ratio=0.5
    )
    student, _ = prune_channels(
        student, (IMAGES,), criterion=criteria.get("magnitude-l2")(), ratio=0.5, widths=Widths(2, 2)
    )
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=resnet)
    assert torch.equal(loaded.module(IMAGES), student.module(IMAGES))
    assert [e.kind for e in loaded.edits] == ["channels-removed"] * 2
    assert (loaded.module.conv1.out_channels, loaded.module.layer3[0].conv2.out_channels) == (4, 16)
    assert loaded.module.layer2[0].shortcut.before == student.module.layer2[0].shortcut.before


def test_the_student_given_is_left_alone():
    module = resnet()
    before = copy.deepcopy(module.state_dict())
    prune(module, ratio=0.5)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_the_smallest_channels_go():
    module = plain()
    with torch.no_grad():
        module[0].weight[::2] *= 0.01
        module[3].weight.view(24, 32, 64)[:, ::2] *= 0.01
    student, pruned = prune(module, ratio=0.5)
    assert torch.equal(student.module[0].weight, module[0].weight[1::2])
    assert pruned.widths == {"0": (32, 16), "3": (24, 16), "5": (5, 5)}
    assert pruned.kept == {"5": "its channels are the network's output"}


@pytest.mark.parametrize("criterion", ["activation", "apoz"])
def test_silent_channels_go_by_activation(criterion):
    module = plain()
    with torch.no_grad():
        module[0].bias[:16] = -100.0  # never fires, whatever its size
        module[0].weight[:16] *= 3
    calls = [((IMAGES[:2],), {}), ((IMAGES[2:],), {})]
    student, _ = prune(module, criterion, ratio=0.5, calls=lambda: calls)
    assert torch.equal(student.module[0].weight, module[0].weight[16:])


def test_activation_streams_over_batches():
    module = plain()
    whole, parts = (criteria.get("activation")() for _ in range(2))
    with torch.no_grad():
        whole.observe(module, lambda: [((IMAGES,), {})])
        parts.observe(module, lambda: (((image[None],), {}) for image in IMAGES))
    weight = module[3].weight
    expected = module[:3](IMAGES).abs().mean(0)
    assert torch.allclose(whole.scores("3.weight", weight, 1).float(), expected, atol=1e-6)
    assert torch.allclose(
        whole.scores("3.weight", weight, 1), parts.scores("3.weight", weight, 1), atol=1e-6
    )


def test_a_threshold_takes_what_is_smaller():
    module = plain()
    with torch.no_grad():
        module[0].weight[:5] = 1e-4
    student, _ = prune(module, "threshold", threshold=1e-3, widths=Widths(8, 1))
    assert torch.equal(student.module[0].weight, module[0].weight[5:])
    assert student.module[3].out_features == 24


def test_globally_the_least_important_layers_lose_most():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    with torch.no_grad():  # the first layer: a few channels carry all
        module[1].weight[8:] *= 0.01
        module[3].weight[:, 8:] *= 0.01
    _, pruned = prune(module, ratio=0.5, scope="global")
    first, second = pruned.widths["1"], pruned.widths["3"]
    assert first[1] < second[1]
    assert 56 <= first[1] + second[1] <= 72


def test_ties_keep_residual_layers_of_one_width():
    student, pruned = prune(resnet(), ratio=0.5)
    assert pruned.widths["conv1"] == pruned.widths["layer1.0.conv2"] == (16, 8)
    assert pruned.widths["layer2.0.conv2"] == (32, 16)
    assert student.module.layer3[0].bn2.num_features == 32


def test_the_floor_is_said_aloud():
    _, pruned = prune(resnet(), ratio=0.9)
    assert pruned.widths["conv1"] == (16, 8)
    assert any("floor" in note and "conv1" in note for note in pruned.notes())


@given(st.integers(1, 300), st.floats(0, 1), st.integers(1, 32), st.integers(1, 32))
def test_allowed_widths(width, share, floor, multiple):
    widths = Widths(floor, multiple)
    kept = widths.allowed(share * width, width)
    assert min(floor, (width + 1) // 2) <= kept <= width
    if width >= 2 * multiple and kept not in (width, widths.least(width)):
        assert kept % multiple == 0


def test_steps_count_from_the_original_widths():
    student, original = Student(plain(64)), {"0": 64, "3": 24}
    for ratio in cubic(0.75, 3):
        student, _ = prune_channels(
            student, (IMAGES,), criterion=criteria.get("magnitude")(), ratio=ratio,
            original=original,
        )  # fmt: skip
    assert student.module[0].out_channels == 16
    assert student.module[3].out_features == 8


@given(st.floats(0.01, 0.99), st.integers(2, 20))
def test_the_cubic_schedule_rises_to_its_end_ever_slower(final, steps):
    shares = cubic(final, steps)
    rises = [b - a for a, b in pairwise([0.0, *shares])]
    assert shares[-1] == pytest.approx(final)
    assert all(a > b > 0 for a, b in pairwise(rises))


def test_excluded_layers_stay():
    _, pruned = prune(resnet(), ratio=0.5, exclude=["layer2", "*.0.conv1"])
    assert {n for n, (a, b) in pruned.widths.items() if a == b} == {
        "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2",
        "layer3.0.conv1", "linear",
    }  # fmt: skip
    assert pruned.kept["layer2.0.conv1"] == "excluded by 'layer2'"
    with pytest.raises(UsageError, match=r"no layer matches 'layr2.0.conv1'.*'layer2.0.conv1'"):
        prune(resnet(), ratio=0.5, exclude=["layr2.0.conv1"])


def test_a_removal_that_fails_is_undone_with_its_operator():
    class HardCoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.hidden, self.head = nn.Linear(1024, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu()).relu()
            return self.head(self.hidden(x.view(-1, 1024)).relu())

    student, pruned = prune(HardCoded(), ratio=0.5)
    assert pruned.widths == {"a": (16, 8), "b": (16, 16), "hidden": (32, 16), "head": (5, 5)}
    assert set(pruned.undone) == {"b"}
    assert "fixed by view (test_prune_channels.py" in pruned.undone["b"]
    assert any("b was undone" in note for note in pruned.notes())
    assert student.module(IMAGES).shape == (4, 5)


def test_masks_shrink_with_their_channels():
    sparse = prune_weights(Student(resnet()), criterion=criteria.get("magnitude")(), ratio=0.5)
    narrow, _ = prune_channels(sparse, (IMAGES,), criterion=criteria.get("magnitude")(), ratio=0.5)
    assert [e.kind for e in narrow.edits] == ["masked", "channels-removed"]
    narrow.check()
    mask = narrow.edits[0].masks["layer1.0.conv1.weight"]
    assert torch.equal(mask, narrow.module.layer1[0].conv1.weight != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio is 1.5: the share to remove lies between 0 and 1"),
        ({}, "exactly one"),
        ({"ratio": 0.5, "criterion": "activation"}, "hand in calls"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        prune(resnet(), **options)


def test_unknown_criterion_names_near_ones():
    with pytest.raises(UsageError, match="did you mean 'magnitude'"):
        criteria.get("magnitud")


def test_a_criterion_of_ones_own():
    class Last(Criterion):
        def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
            return torch.arange(weight.shape[dim], dtype=torch.float32)

    module = plain()
    student, _ = prune_channels(Student(module), (IMAGES,), criterion=Last(), ratio=0.5)
    assert torch.equal(student.module[0].bias, module[0].bias[16:])


@pytest.mark.parametrize(
    "record",
    [
        {"removed": {"conv1.weight": {"0": [99]}}, "attributes": {}},
        {"removed": {"conv9.weight": {"0": [0]}}, "attributes": {}},
        {"removed": {"conv1.wight": {"0": [0]}}, "attributes": {}},
        {"removed": {"conv1.weight": {"7": [0]}}, "attributes": {}},
        {"removed": {}, "attributes": {"layer2.0.shortcut": {"before": 99}}},
        {"removed": {"conv1.weight": "all"}, "attributes": {}},
        {"removed": {}},
    ],
)
def test_a_record_that_does_not_fit_is_refused(record):
    with pytest.raises(CheckpointError):
        ChannelsRemoved.from_json(json.loads(json.dumps(record)), {}).replay(resnet())
