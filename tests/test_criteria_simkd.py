"""SimKD: the student's features against the teacher's, and the teacher's classifier on the student
through everything that follows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attar.distill import Signal
from attar.distill.criteria.simkd import SimKD
from attar.distill.ending import ending
from attar.distill.head import Projected, TeacherHead
from attar.errors import CheckpointError, UsageError
from attar.models import build, resolve
from attar.prune import criteria as pruning
from attar.prune import prune_channels
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.stages.prune import Prune
from attar.stages.quantize import Quantize
from attar.student import Student, load_student, save_student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective
from criteria_fixture import Cnn, Transformer, signal
from run_fixture import in_fresh_process, run_recipe, stops_after, write_recipe

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
BATCH_NORM = 1e-5
PAIRS = {"maps": "act", "tokens": "block", "vectors": "flat"}


class Vectors(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, width)
        self.flat = nn.Tanh()
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flat(self.hidden(x)))


def both(kind: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A student, a wider teacher (of maps at half the size) and images, in float64."""
    torch.manual_seed(3)
    student, teacher, shape = {
        "maps": (Cnn(4), Cnn(6, stride=2), (6, 2, 4, 4)),
        "tokens": (Transformer(4), Transformer(6), (6, 3, 3)),
        "vectors": (Vectors(4), Vectors(6), (6, 6)),
    }[kind]
    return student.double(), teacher.double().eval(), torch.randn(*shape, dtype=torch.float64)


def steps(projector: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """The projector, newly made and training, written out; channels last."""
    for module in projector:
        if isinstance(module, nn.Conv2d):
            w = module.weight.detach().numpy()
            around = w.shape[2] // 2
            padded = np.pad(x, [(0, 0), (around, around), (around, around), (0, 0)])
            h, v = x.shape[1:3]
            x = sum(
                padded[:, i : i + h, j : j + v] @ w[:, :, i, j].T
                for i in range(w.shape[2])
                for j in range(w.shape[3])
            )
        elif isinstance(module, nn.Linear):
            x = x @ module.weight.detach().numpy().T
        elif isinstance(module, nn.ReLU):
            x = np.maximum(x, 0)
        else:
            axes = tuple(range(x.ndim - 1))
            x = (x - x.mean(axes)) / np.sqrt(x.var(axes) + BATCH_NORM)
    return x


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("layers", ["named", "auto"])
def test_features_are_projected_compared_and_classified_by_the_teachers_head(kind, layers):
    net, teacher, x = both(kind)
    path = PAIRS[kind]
    with torch.no_grad():
        before = signal(net, x, path).features[path].numpy()
        wanted = signal(teacher, x, path)
    student = Student(net)
    simkd = SimKD(layers="auto" if layers == "auto" else [path], reduction=3)
    with simkd.changing(student, teacher, (x,)):
        own = signal(net, x, path)
    assert (*simkd.student_layers, *simkd.teacher_layers) == (path, path)
    assert [edit.layer for edit in student.edits] == [path]

    projected = net.get_submodule(path)
    assert isinstance(projected, Projected)
    widths = [m.weight.shape[0] for m in projected.projector if hasattr(m, "weight")]
    assert widths == [2, 2, 2, 2, 6, 6]
    assert isinstance(projected.projector[-1], nn.ReLU) == (kind == "maps")
    maps = kind == "maps"
    made = steps(projected.projector, np.moveaxis(before, 1, -1) if maps else before)
    target = wanted.features[path].numpy()
    pooled = made.reshape(6, 2, 2, 2, 2, 6).mean((2, 4)) if maps else made
    target = np.moveaxis(target, 1, -1) if maps else target
    loss = simkd(own, wanted)
    assert loss.item() == pytest.approx(((pooled - target) ** 2).mean(), rel=1e-9)

    read = {
        "maps": lambda: made.mean((1, 2)),
        "tokens": lambda: made[:, 0],
        "vectors": lambda: made,
    }
    w, b = (p.detach().numpy() for p in teacher.head.parameters())
    np.testing.assert_allclose(own.logits.detach().numpy(), read[kind]() @ w.T + b, atol=1e-9)


# --- the layers and heads of networks


class PreActivated(nn.Module):
    """A batch normalisation between the last block and the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.act(self.conv(x)).mean((2, 3))))


def named(model: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return build(resolve(model, arguments, channels=1, classes=10, shape=(1, 8, 8)))


def images(size: int = 8) -> torch.Tensor:
    return torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "layer", "shape", "head"),
    [
        ("cifar-resnet8", "layer3", (64, 2, 2), "linear"),
        ("digits-small", "relu3", (32,), "linear2"),
        ("torchvision:mobilenet_v2", "features", (1280, 2, 2), "classifier.1"),
    ],
)
def test_the_last_layer_before_the_head_is_found(model, layer, shape, head):
    found = ending(named(model), (images(64 if ":" in model else 8),))
    assert (found.layer, tuple(found.features.shape[1:]), found.head) == (layer, shape, head)


def test_what_lies_inside_the_layer_keeps_its_path_where_it_can():
    student = Student(named("torchvision:mobilenet_v2"))
    simkd, teacher = SimKD(layers="auto"), named("torchvision:mobilenet_v2", width_mult=1.5)
    with simkd.changing(student, teacher, (images(64),)):
        pass
    assert simkd.student_layers == ("features.18.2",) and simkd.teacher_layers == ("features",)
    assert isinstance(student.module.get_submodule("features.18.0"), nn.Conv2d)
    assert student.module(images(64)).shape == (2, 10)


def flat(width: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(size),
        nn.Flatten(),
        nn.Linear(width * size**2, 10),
    )


CONVOLUTIONAL = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
BEYOND = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 10), nn.BatchNorm1d(10))


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "said"),
    [
        (PreActivated(4), PreActivated(8), {"layers": ["conv"]}, "name 'bn' as the layer"),
        (flat(4, 2), PreActivated(8), {"layers": [{"student": "1", "teacher": "conv"}]},
         "the teacher's layer 'conv' and its head 'fc'"),
        (flat(4, 2), flat(8, 4), {"layers": "auto"}, "it gets 32 values and takes 128"),
        (flat(4, 2), named("digits-small"), {"layers": "auto"}, "can't be compared"),
        (Repeated(), flat(8, 1), {"layers": [{"student": "act", "teacher": "1"}]},
         "the student's layer 'act' runs more than once"),
        (CONVOLUTIONAL, flat(8, 1), {"layers": "auto"}, "the student ends in no nn.Linear"),
        (BEYOND, flat(8, 1), {"layers": "auto"}, "'3' has weights and runs after"),
        (flat(4, 1), flat(8, 1), {"layers": ["4"]}, "does not end before its head '4' begins"),
        (flat(4, 1), flat(8, 1), {"layers": ["layer9"]}, "has no layer 'layer9'"),
        (flat(4, 1), flat(8, 1), {"layers": "auto", "head": "1"}, "is a ReLU: name an nn.Linear"),
        (flat(4, 1), nn.Sequential(*flat(8, 1)[:-1], nn.Linear(8, 1000)), {"layers": "auto"},
         r"10 classes and the teacher with 1,000: .*`teacher: \{classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_and_leaves_the_student_as_it_was(
    student, teacher, settings, said
):
    one, before = Student(student), str(student)
    with (
        pytest.raises(UsageError, match=said),
        SimKD(**settings).changing(one, teacher, [images()]),
    ):
        pass
    assert str(one.module) == before and not one.edits
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.module.modules())


def test_a_student_that_was_changed_is_refused():
    student = Student(flat(8, 1))
    pruned, _ = prune_channels(
        student, (images(),), criterion=pruning.get("magnitude")(), ratio=0.5
    )
    with (
        pytest.raises(UsageError, match=r"changed already \(channels-removed\).*simkd first"),
        SimKD(layers="auto").changing(pruned, flat(16, 1), (images(),)),
    ):
        pass


def test_without_a_network_there_is_no_head_to_reuse():
    with (
        pytest.raises(UsageError, match="simkd needs the teacher's network"),
        SimKD(layers="auto").changing(Student(flat(4, 1)), None, (images(),)),
    ):
        pass


def test_a_student_that_was_not_changed_is_not_compared():
    some = Signal(torch.zeros(2, 3), {"a": torch.zeros(2, 4)})
    other = Signal(torch.zeros(2, 3), {"a": torch.zeros(2, 5)})
    for settings in ({"layers": "auto"}, {"layers": ["a"]}):
        with pytest.raises(UsageError, match="enter changing"):
            SimKD(**settings)(some, other)


@pytest.mark.parametrize("layers", [[], ["a", "b"], "all"])
def test_one_pair_is_compared(layers):
    with pytest.raises(UsageError, match="SimKD: layers"):
        SimKD(layers=layers)


def test_the_head_is_frozen_until_the_end_whatever_happens():
    student, simkd = Student(flat(4, 1)), SimKD(layers="auto")
    with pytest.raises(KeyboardInterrupt), simkd.changing(student, flat(8, 1), (images(),)):
        head = student.module[4]
        assert not any(p.requires_grad for p in head.parameters())
        assert all(p.requires_grad for p in student.module[:4].parameters())
        raise KeyboardInterrupt
    assert all(p.requires_grad for p in head.parameters())


# --- saving


def changed(tmp_path: Path) -> tuple[Student, Path]:
    spec = resolve("cifar-resnet8", {}, channels=1, classes=10, shape=(1, 8, 8))
    student = Student(build(spec), spec)
    with SimKD(layers="auto").changing(student, named("cifar-resnet14"), (images(),)):
        pass
    student.module.eval()
    save_student(student, tmp_path / "student")
    return student, tmp_path / "student"


def test_a_student_is_saved_and_loaded_with_its_projector(tmp_path):
    student, folder = changed(tmp_path)
    loaded = load_student(folder, build=build)
    assert torch.equal(loaded.module(images()), student.module(images()))
    assert loaded.edits == student.edits and isinstance(loaded.edits[0], TeacherHead)
    assert "the teacher's classifier, behind a projector of 32" in loaded.edits[0].summary()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("inside", "many", "'teacher-head' is damaged"),
        ("colour", 1, "'teacher-head' is damaged"),
        ("layer", "layer9", "put behind layer9, which the network doesn't have"),
        ("head", "conv1", "in the place of conv1, which is a Conv2d here"),
        ("inside", 7, "don't fit the network"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, key, value, said):
    _, folder = changed(tmp_path)
    record = json.loads((folder / "student.json").read_text())
    record["edits"][0][key] = value
    (folder / "student.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=said):
        load_student(folder, build=build)


# --- the stage


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    net = named("digits-wide")
    training = Training(epochs=4, **FAST)
    train(net, data=digits, task=TASK, training=training, objective=TaskObjective(TASK))
    return net


@pytest.fixture
def run(digits, teacher, tmp_path) -> Context:
    return Context(task=TASK, data=digits, teacher=teacher, seed=1, work=tmp_path)


SIMKD = {"simkd": {"layers": "auto"}}


def test_the_stage_teaches_by_features_alone_and_keeps_the_teachers_head(run, teacher):
    heard: list = []
    student = Student(named("digits-small"))
    stage = Distill(criteria=[SIMKD], epochs=4, diagnose=True, **FAST)
    taught = stage.apply(student, replace(run, tell=heard.append))
    epochs = [e for e in heard if e["event"] == "epoch" and e["label"] == "distill"]
    assert [set(e["terms"]) for e in epochs] == [{"simkd"}] * 4
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert run.evaluate(taught.module) > 0.75
    assert torch.equal(taught.module.linear2.weight, teacher.linear2.weight)
    assert torch.equal(taught.module.linear2.bias, teacher.linear2.bias)
    assert all(p.requires_grad for p in taught.module.parameters())
    alone = [e for e in heard if e["event"] == "epoch" and e["label"] == "alone"]
    assert [set(e["terms"]) for e in alone] == [{"task"}] * 4
    assert "pairs" not in run.found, "nothing else was left to be paired"


def test_the_tasks_own_loss_and_others_may_join(run):
    hint = {"feature": {"layers": [{"student": "conv2", "teacher": "conv2"}]}}
    stage = Distill(criteria=[SIMKD, "kd", hint], task_weight=0.5, epochs=1, **FAST)
    heard: list = []
    stage.apply(Student(named("digits-small")), replace(run, tell=heard.append))
    (terms,) = [e["terms"] for e in heard if e["event"] == "epoch"]
    assert set(terms) == {"simkd", "kd", "feature", "task"}
    assert Distill(criteria=[SIMKD, "kd"])._task_weight(stage._built()) == 0


def test_an_interrupted_stage_ends_as_an_undisturbed_one(run):
    stage = Distill(criteria=[SIMKD], epochs=3, **FAST)

    def weights(student: Student) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in student.module.state_dict().items()}

    whole = weights(stage.apply(Student(named("digits-small")), run.at("undisturbed")))
    torch.manual_seed(99)  # what happened before in the process is of no consequence

    disturbed = run.at("disturbed")
    with pytest.raises(KeyboardInterrupt):
        stage.apply(Student(named("digits-small")), replace(disturbed, tell=stops_after(2)))
    again = weights(stage.apply(Student(named("digits-small")), disturbed))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_table_of_answers_has_no_head():
    with pytest.raises(ValueError, match="simkd compares inner layers"):
        Distill(criteria=[SIMKD], teacher={"answers": "soft.npz"})


# --- a whole run

RECIPE = """\
name: tiny
data: {source: digits, subset: 300}
teacher:
  model: cifar-tiny
  arguments: {widths: [16, 48], strides: [1, 2]}
  train: {epochs: 12, batch_size: 32, optimizer: {lr: 0.01}}
student: {model: cifar-tiny, arguments: {widths: [8, 24], strides: [1, 2]}}
stages:
  - distill:
      criteria: [{simkd: {layers: auto}}]
      epochs: 12
      batch_size: 32
      optimizer: {lr: 0.01}
  - prune: {ratio: 0.3, floor: 4, recover: {epochs: 4, batch_size: 32, optimizer: {lr: 0.01}}}
  - quantize: {fallback: off}
budget: {max_drop: 90%}
"""


def answer(folder: Path, x: Path, answers: Path) -> None:
    """In a process that knows nothing but the student's folder."""
    from attar.api import load

    np.save(answers, load(folder)(torch.from_numpy(np.load(x))).detach().numpy())


def answers_elsewhere(folder: Path, x: torch.Tensor, place: Path) -> np.ndarray:
    np.save(place / "x.npy", x.numpy())
    assert in_fresh_process(answer, folder, place / "x.npy", place / "answers.npy") == 0
    return np.load(place / "answers.npy")


def test_the_changed_student_is_pruned_quantized_and_loaded_elsewhere(digits, tmp_path):
    """The projector and the head go through every stage like layers of the student's own."""
    tiny = {"strides": [1, 2]}
    net, teacher = (named("cifar-tiny", widths=w, **tiny) for w in ([8, 24], [16, 48]))
    spec = resolve("cifar-tiny", {"widths": [8, 24], **tiny}, channels=1, classes=10)
    run = Context(task=TASK, data=digits, teacher=teacher, seed=1, work=tmp_path)
    training = Training(epochs=15, **FAST)
    train(teacher, data=digits, task=TASK, training=training, objective=TaskObjective(TASK))
    student = Student(net, spec)
    for stage in (
        Distill(criteria=[SIMKD], epochs=12, **FAST),
        Prune(ratio=0.3, floor=4, recover=Training(epochs=4, **FAST)),
        Quantize(fallback="off"),
    ):
        student = stage.apply(student, run.at(stage.name))
        student.check()
    assert [e.kind for e in student.edits] == ["teacher-head", "channels-removed", "quantized"]
    assert student.module.relu2.projector[0].out_channels < 24
    assert student.module.linear.in_features < 48
    assert run.evaluate(student.module) > 0.7
    save_student(student, tmp_path / "student")
    x = next(iter(digits.test.batches(100))).inputs
    with torch.no_grad():
        own = student.module(x).numpy()
    np.testing.assert_array_equal(answers_elsewhere(tmp_path / "student", x, tmp_path), own)


@pytest.mark.long
def test_a_run_prunes_quantizes_and_deploys_the_changed_student(tmp_path, digits):
    from attar.api import load_student

    folder = tmp_path / "run"
    run_recipe(write_recipe(tmp_path, RECIPE), folder)
    student = load_student(folder)
    assert [edit.kind for edit in student.edits] == [
        "teacher-head",
        "channels-removed",
        "quantized",
    ]
    ledger = json.loads((folder / "ledger.json").read_text())
    values = {row["stage"]: row["metric"]["value"] for row in ledger["rows"]}
    assert values["distill"] > 0.5 and values["quantize"] > 0.5

    x = next(iter(digits.test.batches(100))).inputs
    with torch.no_grad():
        own = student.module(x).numpy()
    np.testing.assert_array_equal(answers_elsewhere(folder, x, tmp_path), own)
