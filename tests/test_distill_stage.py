"""The distill stage: what a recipe says, and a student taught on digits."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from attar.data.arrays import ArraySplit
from attar.errors import UsageError
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective
from run_fixture import stops_after

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
HINT = {"feature": {"layers": [{"student": "4", "teacher": "4"}], "weight": 0.5}}


def make(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    net, training = make(16), Training(epochs=5, **FAST)
    train(net, data=digits, task=TASK, training=training, objective=TaskObjective(TASK))
    return net


@pytest.fixture
def run(digits, teacher, tmp_path) -> Context:
    return Context(task=TASK, data=digits, teacher=teacher, seed=1, work=tmp_path)


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in student.module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_student_is_taught_and_comes_back_without_adapters(run, teacher):
    student, heard = Student(make(6)), []
    names = set(student.module.state_dict())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    untaught = run.evaluate(student.module)
    taught = Distill(criteria=["kd", HINT], epochs=6, **FAST).apply(
        student, replace(run, tell=heard.append)
    )
    assert run.evaluate(taught.module) > untaught + 0.4
    assert set(taught.module.state_dict()) == names
    assert not any(m._forward_hooks for m in taught.module.modules())
    assert equal(before, teacher.state_dict()) and not teacher.training
    epochs = [e for e in heard if e["event"] == "epoch"]
    assert [e["label"] for e in epochs] == ["distill"] * 6
    assert set(epochs[0]["terms"]) == {"kd", "feature", "task"}
    assert epochs[-1]["terms"]["feature"] < epochs[0]["terms"]["feature"]
    assert run.found["teacher"]["form"]


def test_a_teacher_that_no_criterion_reads_is_not_asked(run):
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the teacher was asked")

    quiet = replace(run, teacher=Silent())
    taught = Distill(criteria=["teacher-free"], epochs=2, **FAST).apply(Student(make(4)), quiet)
    assert run.evaluate(taught.module) > 0.4
    assert quiet.found["teacher"] == {"form": "nobody"}


def test_without_criteria_the_student_learns_alone_from_the_same_views(run, monkeypatch):
    seen, heard = [], []
    real = ArraySplit.with_views

    def with_views(self, views):
        seen.append(views)
        return real(self, views)

    monkeypatch.setattr(ArraySplit, "with_views", with_views)
    alone = replace(run, teacher=None, tell=heard.append)
    with pytest.raises(UsageError, match="distill needs a teacher"):
        Distill(epochs=1, **FAST).apply(Student(make(4)), alone)
    taught = Distill(criteria=[], views=2, epochs=2, **FAST).apply(Student(make(4)), alone)
    assert seen == [2] and run.evaluate(taught.module) > 0.4
    assert {t for e in heard if e["event"] == "epoch" for t in e["terms"]} == {"task"}


def test_an_interrupted_stage_ends_as_an_undisturbed_one(run, tmp_path):
    stage = Distill(criteria=["kd", HINT], epochs=3, **FAST)
    undisturbed = weights(stage.apply(Student(make(4)), run.at("undisturbed")))
    torch.manual_seed(99)  # what happened before in the process is of no consequence

    disturbed = run.at("disturbed")
    with pytest.raises(KeyboardInterrupt):
        stage.apply(Student(make(4)), replace(disturbed, tell=stops_after(2)))
    assert equal(weights(stage.apply(Student(make(4)), disturbed)), undisturbed)


def test_without_a_teacher_there_is_nothing_to_learn_from(run):
    with pytest.raises(UsageError, match="distill needs a teacher"):
        Distill().apply(Student(make(4)), replace(run, teacher=None))


def test_a_wrong_layer_ends_the_stage_before_training(run):
    stage = Distill(criteria=[{"feature": {"layers": ["4", "conv2"]}}])
    with pytest.raises(UsageError, match="Sequential has no layer 'conv2'"):
        stage.apply(Student(make(4)), run)


def test_settings_are_written_out_and_read_back():
    stage = Distill(criteria=["logits-mse", {"kd": {"temperature": 2}}, HINT], epochs=3)
    assert stage.criteria == [
        {"logits-mse": {"weight": 1.0}},
        {"kd": {"weight": 0.9, "temperature": 2.0, "standardize": False}},
        {"feature": {"weight": 0.5, "layers": [{"student": "4", "teacher": "4"}]}},
    ]
    assert Distill.model_validate(stage.model_dump(mode="json")) == stage
    assert Distill().criteria == [{"kd": {"weight": 0.9, "temperature": 4.0, "standardize": False}}]


@pytest.mark.parametrize(
    ("criteria", "place", "said"),
    [
        (["kdd"], (0,), "unknown criterion 'kdd'; did you mean 'kd'"),
        ([{"kd": {"temprature": 4}}], (0, "kd"), "did you mean 'temperature'"),
        ([{"kd": {"temperature": 0}}], (0, "kd", "temperature"), "greater than or equal to 0.01"),
        ([{"kd": {}, "feature": {}}], (0,), "one name with its settings"),
        ([{"feature": {}}], (0, "feature", "layers"), "required"),
    ],
)
def test_a_wrong_criterion_is_named_with_its_place(criteria, place, said):
    with pytest.raises(ValidationError) as caught:
        Distill(criteria=criteria)
    (error,) = caught.value.errors()
    assert error["loc"] == ("criteria", *place) and said in error["msg"]


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, 0.1),
        ({"criteria": [HINT]}, 1.0),
        ({"criteria": [HINT, "soft-cross-entropy"]}, 0.1),
        ({"criteria": ["soft-cross-entropy"], "task_weight": 1}, 1.0),
        ({"task_weight": 0}, 0.0),
    ],
)
def test_the_task_weighs_little_beside_criteria_that_teach_answers(settings, weight):
    stage = Distill(**settings)
    assert stage._task_weight(stage._built()) == weight


def test_a_criterion_named_twice_has_two_terms():
    stage = Distill(criteria=["kd", {"kd": {"temperature": 1}}, "logits-mse"])
    assert list(stage._built()) == ["kd", "kd 2", "logits-mse"]


OWN = '''
from torch import Tensor
from attar.distill import Criterion

class Gap(Criterion):
    """The mean absolute difference of the logits."""

    class Settings(Criterion.Settings):
        power: int = 1

    def forward(self, student, teacher, batch=None) -> Tensor:
        return (student.logits - teacher.logits).abs().pow(self.settings.power).mean()

class Other: ...
'''


def test_a_criterion_of_ones_own_works_once_its_file_is_allowed(run, tmp_path):
    from attar.files import allow

    file = tmp_path / "losses.py"
    file.write_text(OWN)
    stage = Distill(criteria=[{f"{file}:Gap": {"power": 2}}], epochs=1, **FAST)
    with pytest.raises(UsageError, match="has not been allowed to run"):
        stage.apply(Student(make(4)), run)
    allow(file, trusted=True)
    heard: list = []
    stage.apply(Student(make(4)), replace(run, tell=heard.append))
    assert set(heard[-1]["terms"]) == {"Gap", "task"}
    wrong = Distill(criteria=[f"{file}:Other"])
    with pytest.raises(UsageError, match="should be a subclass of Criterion"):
        wrong.apply(Student(make(4)), run)


def test_distilling_after_quantizing_is_refused_with_a_reason():
    assert "grid" in Distill.not_after["quantize"]
