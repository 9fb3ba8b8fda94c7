"""A teacher with other classes than the data's: which of its outputs are meant, and what is said
where nobody tells."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from attar.distill import Signal, Teacher
from attar.distill.classes import share_classes, shared_classes
from attar.distill.criterion import criteria
from attar.errors import UsageError
from attar.models import build, resolve
from attar.stages.base import Context
from attar.stages.distill import Distill, Mentor
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
PLACES = [12, 3, 0, 7, 14, 5, 9, 1, 10, 2]
"""Where the data's classes stand among the 15 that the teacher knows."""
LARGE = {"model": "digits-wide", "arguments": {"classes": 15}}


def named(model: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return build(resolve(model, {}, channels=1, classes=classes, shape=(1, 8, 8)))


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    net, training = named("digits-wide"), Training(epochs=4, **FAST)
    train(net, data=digits, task=TASK, training=training, objective=TaskObjective(TASK))
    return net


@pytest.fixture(scope="module")
def checkpoint(teacher, tmp_path_factory) -> Path:
    """The teacher's weights in a network that knows five more classes, in another order."""
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    for name in ("linear2.weight", "linear2.bias"):
        own = state[name]
        state[name] = 5 * torch.randn(15, *own.shape[1:])
        state[name][PLACES] = own
    path = tmp_path_factory.mktemp("teacher") / "large.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def run(digits, tmp_path) -> Context:
    return Context(task=TASK, data=digits, teacher=None, seed=1, work=tmp_path)


def taught(run: Context, epochs: int = 8, **settings) -> nn.Module:
    return (
        Distill(epochs=epochs, **FAST, **settings).apply(Student(named("digits-small")), run).module
    )


SIMKD = {"simkd": {"layers": "auto"}}
HINT = {"feature": {"layers": [{"student": "conv2", "teacher": "conv2"}]}}


@pytest.mark.parametrize("chosen", [["kd", HINT], ["logits-mse"], [SIMKD]])
def test_the_shared_part_teaches_as_a_teacher_of_these_classes_alone(
    run, teacher, checkpoint, chosen
):
    mentor = {**LARGE, "checkpoint": str(checkpoint), "classes": PLACES}
    alone = taught(replace(run.at("alone"), teacher=teacher), 2, criteria=chosen)
    shared = taught(run.at("shared"), 2, criteria=chosen, teacher=mentor)
    x = run.data.validation.pick(range(50)).inputs
    torch.testing.assert_close(shared(x), alone(x), rtol=1e-3, atol=1e-3)
    assert shared(x).shape == (50, 10)


def test_the_order_is_that_of_the_datas_classes(run, checkpoint):
    mentor = {**LARGE, "checkpoint": str(checkpoint)}
    right, wrong = (
        taught(run.at(name), teacher={**mentor, "classes": classes}, task_weight=0)
        for name, classes in (("right", PLACES), ("wrong", sorted(PLACES)))
    )
    assert run.evaluate(right) > 0.6 and run.evaluate(wrong) < 0.3


@pytest.mark.parametrize("criterion", ["kd", "dist", "logits-mse", SIMKD])
def test_other_classes_are_found_before_the_training(run, checkpoint, criterion):
    heard: list = []
    mentor = {**LARGE, "checkpoint": str(checkpoint)}
    said = (
        "the student answers with 10 classes and the teacher with 15: say which of the teacher's "
        r"are the student's \(`teacher: \{classes: \[…\]\}` of distill\), or use criteria on "
        "features or relations"
    )
    with pytest.raises(UsageError, match=said):
        taught(replace(run, tell=heard.append), criteria=[criterion], teacher=mentor)
    assert not [e for e in heard if e["event"] in ("step", "epoch") and e["label"] == "distill"]


def test_criteria_on_features_need_no_common_classes(run, checkpoint):
    mentor = {**LARGE, "checkpoint": str(checkpoint)}
    assert run.evaluate(taught(run, criteria=[HINT], teacher=mentor)) > 0.6


def test_every_criterion_on_responses_says_it():
    own, wanted = torch.randn(4, 3), torch.randn(4, 5)
    on_answers = [
        kind
        for name, kind in ((n, criteria.get(n)) for n in criteria.names())
        if kind.beside_task == 0.1 and kind.asks_teacher
    ]
    assert len(on_answers) >= 6
    for kind in on_answers:
        with pytest.raises(UsageError, match="with 3 classes and the teacher with 5: say which"):
            kind()(Signal(own), Signal(wanted))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (PLACES[:9], "name 9 of its outputs and the data have 10 classes: name one for each"),
        ([*PLACES[:9], 15], "name the output 15, and the teacher has 15: 0 to 14"),
        ([*PLACES[:9], -1], "name the output -1, and the teacher has 15"),
    ],
)
def test_classes_that_are_not_there_are_refused(run, checkpoint, classes, said):
    mentor = {**LARGE, "checkpoint": str(checkpoint), "classes": classes}
    with pytest.raises(UsageError, match=said):
        taught(run, teacher=mentor)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "resnet18", "classes": [1, 2, 1]}, "name the output 1 twice"),
        ({"model": "resnet18", "classes": []}, "at least 1 item"),
        ({"model": "resnet18", "classes": ["cat"]}, "valid integer"),
        ({"answers": "soft.npz", "classes": [0, 1]}, "belong to a `model`, not to `answers`"),
    ],
)
def test_what_can_not_be_meant_is_refused_with_the_recipe(settings, said):
    with pytest.raises(ValidationError, match=said):
        Mentor(**settings)


def test_a_librarys_network_keeps_its_own_number_of_classes(digits):
    mentor = Mentor(model="torchvision:mobilenet_v2", classes=list(range(100, 1000, 90)))
    net = mentor.load(digits, TASK)
    assert net.classifier[1].out_features == 1000
    assert net(digits.train.pick([0, 1]).inputs).shape == (2, 10)


def test_layers_keep_their_paths_and_stored_answers_are_told_apart(teacher, digits):
    torch.manual_seed(0)
    batch = digits.train.pick(range(20))
    whole = Teacher(teacher, TASK).signal(batch).logits
    known = set()
    for classes in ([3, 1], [1, 3]):
        net = named("digits-wide")
        net.load_state_dict(teacher.state_dict())
        assert shared_classes(net) is None
        share_classes(net, classes, TASK, (batch.inputs,))
        source = Teacher(net.eval(), TASK, layers=["relu3"])
        signal = source.signal(batch)
        assert torch.equal(signal.logits, whole[:, classes])
        assert signal.features["relu3"].shape == (20, 128)
        known.add(source.fingerprint)
    assert len(known) == 2
