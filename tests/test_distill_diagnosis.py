"""Did the teacher help? What is measured is true, what is said follows from it, and asking changes
nothing."""

import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from torch import nn

from attar.data.arrays import ArraySplit
from attar.data.base import UNLABELLED
from attar.distill import diagnosis as diagnosis_module
from attar.distill.criteria.kd import KD
from attar.distill.diagnosis import diagnosis, findings, measure, off_top, temperature_at
from attar.distill.findings import Doubtful, Gain, Measured, OnBoth, Softness
from attar.distill.signal import Signal
from attar.distill.teacher import Teacher
from attar.report import write_report
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective
from criteria_fixture import Cnn, Transformer
from report_fixture import details, events, write_run
from run_fixture import stops_after
from test_report import HOSTILE, hostile, page_of

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
ACCURACY = ("accuracy", "fraction")


def make(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


@pytest.fixture(scope="module")
def teacher(digits) -> nn.Module:
    net = make(16, seed=5)
    training = Training(epochs=4, **FAST)
    train(net, data=digits, task=TASK, training=training, objective=TaskObjective(TASK))
    return net


@pytest.fixture
def run(digits, teacher, tmp_path) -> Context:
    return Context(task=TASK, data=digits, teacher=teacher, seed=1, work=tmp_path)


def kinds(measured: Measured) -> list[str]:
    return [found.kind for found in findings(measured)]


# --- what is said


def gain(value: float, low: float, high: float) -> Gain:
    return Gain(value, low, high, "paired Agresti-Min", 0.9 + value, 0.9, 500)


FOLLOWING = OnBoth(0.99, 0.97)
SOFT = Softness("kd", 4.0, 0.7, 0.3, 0.5, 2.2, 5.0)
QUIET = Measured(
    *ACCURACY,
    student=OnBoth(0.96, 0.94),
    teacher=OnBoth(0.985, 0.96),
    agreement=FOLLOWING,
    softened=[SOFT],
    doubtful=Doubtful(1, 1000, 3.0, [7]),
    weights={"kd": 0.9, "task": 0.1},
    teach_answers=["kd"],
    loss={"kd": [1.0, 0.3, 0.2, 0.19], "task": [1.0, 0.2, 0.1, 0.1]},
    gradients={"kd": [1.0, 0.5], "task": [0.4, 0.2]},
)
STILL = {"kd": [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]}
FALLING = {"kd": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]}
LAGGING = {"student": OnBoth(0.8, 0.78), "agreement": OnBoth(0.8, 0.79)}


def test_a_distillation_without_fault_gives_no_finding():
    assert findings(QUIET) == [] and findings(Measured(*ACCURACY)) == []


@pytest.mark.parametrize(
    ("changed", "kind", "said", "tried"),
    [
        ({"gain": gain(0.03, 0.01, 0.05)}, "helped", "3.00 points better", ""),
        (
            {"gain": gain(0.01, -0.01, 0.03)},
            "no-difference",
            "91.00 % with it and 90.00 % without. The difference is 1.00 points, and its 95 % "
            "interval −1.00 to 3.00",
            "attar compare",
        ),
        ({"gain": gain(-0.03, -0.05, -0.01)}, "harmed", "3.00 points worse", "attar compare"),
        (
            {"teacher": OnBoth(0.985, 0.93)},
            "teacher-no-better",
            "93.00 % for the teacher and 94.00 % for the student",
            "diagnose: true",
        ),
        (
            {"alone": OnBoth(None, 0.97)},
            "teacher-no-better",
            "than its student alone: accuracy on validation is 96.00 %",
            "stronger teacher",
        ),
        ({**LAGGING, "loss": STILL}, "capacity-gap", "to only 80.0 %", "distill.teacher"),
        ({**LAGGING, "loss": FALLING}, "underfits", "after 8 epochs", "epochs: 16"),
        ({**LAGGING, "loss": {"kd": [1.0, 1.0]}}, "underfits", "few epochs", "epochs: 4"),
        (
            {"student": OnBoth(0.98, 0.91)},
            "overfits",
            "98.00 % on training examples and 91.00 % on validation",
            "data.augment",
        ),
        ({"agreement": OnBoth(0.99, 0.9)}, "overfits", "to 99.0 % and 90.0 %", "data.augment"),
        (
            {"softened": [replace(SOFT, temperature=0.05, off_top=0.0002)]},
            "temperature-low",
            "At temperature 0.05 the targets of kd are nearly one-hot",
            "Try temperature: 2.2, at which they share a tenth",
        ),
        (
            {"softened": [replace(SOFT, temperature=90, top=0.12, evenness=0.997)]},
            "temperature-high",
            "nearly even: the likeliest class gets 12.0 %",
            "Try temperature: 5,",
        ),
        (
            {"gradients": {"kd": [0.01], "task": [2.0]}},
            "unbalanced",
            "kd is hardly heard: its gradient's norm is 0.01, 200 times smaller",
            "Try 18 for the weight of kd (now 0.9)",
        ),
        (
            {"gradients": {"kd": [1.0], "task": [0.1], "hint": [0.0, 0.0]}},
            "unbalanced",
            "hint changes nothing",
            "leave it out",
        ),
        (
            {"gradients": {"kd": [1.0], "task": [1.5], "hint": [100.0]}, "weights": {"hint": 50.0}},
            "unbalanced",
            "hint drowns every other term: its gradient's norm is 100, and the next largest is 1.5",
            "Try 7.5 for the weight of hint (now 50)",
        ),
        (
            {"teacher": OnBoth(1.0, 0.96), "top": 0.998},
            "memorised",
            "by heart: accuracy is 100.00 % on training examples and 96.00 % on validation",
            "data.augment",
        ),
        (
            {"doubtful": Doubtful(40, 1000, 3.0, [3, 17, 20])},
            "label-noise",
            "40 of 1,000 training examples looked at may have a wrong label: the teacher is at "
            "least 90 % sure of another class; by its own probabilities it would err on 3.0. The "
            "first are 3, 17, 20",
            "weigh less than 0.1",
        ),
    ],
)
def test_each_finding_says_what_was_seen_and_what_to_try(changed, kind, said, tried):
    (found,) = findings(replace(QUIET, **changed))
    assert found.kind == kind and said in found.says and tried in found.try_
    assert bool(found.try_) == (kind != "helped")
    assert found.says.endswith(".") and "  " not in found.says


@pytest.mark.parametrize(
    "changed",
    [
        {"doubtful": Doubtful(40, 1000, 30.0, [3])},  # as many as its own probabilities allow
        {"doubtful": Doubtful(400, 1000, 1.0, [3]), "teacher": OnBoth(1.0, 0.985)},
        {"gradients": {"kd": [30.0], "task": [0.1]}},  # kd's targets hold the labels
        {"softened": [replace(SOFT, off_top=0.0)], "weights": {"kd": 0.0}},
        {"gradients": {"kd": [None], "task": [1.0]}},
        {**LAGGING, "teacher": OnBoth(0.81, 0.8)},  # not ahead
    ],
)
def test_what_only_looks_like_a_fault_is_not_called_one(changed):
    assert findings(replace(QUIET, **changed)) == []


def test_a_verdict_points_at_the_causes_that_were_found():
    both = replace(QUIET, gain=gain(0.0, -0.01, 0.01), teacher=OnBoth(1.0, 0.96))
    verdict, cause = findings(both)
    assert cause.kind == "memorised" and "may be the cause" in verdict.try_


def test_less_is_better_where_the_metric_says_so():
    error = Measured("error", "fraction", False, student=OnBoth(0.1, 0.1), teacher=OnBoth(0.1, 0.2))
    assert kinds(error) == ["teacher-no-better"]
    assert kinds(replace(error, teacher=OnBoth(0.1, 0.05))) == []


share = st.none() | st.floats(0, 1)
both = st.builds(OnBoth, share, share)
line = st.lists(st.none() | st.floats(0, 1e6), max_size=9)
terms = st.dictionaries(st.sampled_from(["kd", "task", "hint"]), line)
temperature = st.none() | st.floats(0.01, 1000)
softness = st.builds(
    Softness, st.just("kd"), st.floats(0.01, 100), *[st.floats(0, 1)] * 3, temperature, temperature
)
spans = st.tuples(*[st.floats(-1, 1)] * 3).map(sorted)
gains = st.builds(
    lambda span, a, b, n: Gain(span[1], span[0], span[2], "m", a, b, n),
    spans, st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**6),
)  # fmt: skip
anything = st.builds(
    Measured,
    metric=st.just("accuracy"),
    unit=st.sampled_from(["fraction", "words"]),
    higher_is_better=st.booleans(),
    student=both,
    teacher=both,
    alone=both,
    agreement=both,
    top=share,
    softened=st.lists(softness, max_size=1),
    doubtful=st.none()
    | st.builds(Doubtful, st.integers(0, 99), st.integers(1, 2048), st.floats(0, 99), st.just([1])),
    weights=st.dictionaries(st.sampled_from(["kd", "task", "hint"]), st.floats(0, 1e3)),
    teach_answers=st.sampled_from([[], ["kd"]]),
    loss=terms,
    gradients=terms,
    gain=st.none() | gains,
)
APART = [
    {"helped", "no-difference", "harmed"},
    {"capacity-gap", "underfits", "overfits"},
    {"teacher-no-better", "capacity-gap"},
    {"teacher-no-better", "underfits"},
    {"temperature-low", "temperature-high"},
    {"memorised", "label-noise"},
]


def test_a_term_of_a_wrong_temperature_gets_no_other_weight_too():
    cold = [replace(SOFT, temperature=0.05, off_top=0.0)]
    faint = {"kd": [0.001], "task": [1.0]}
    assert kinds(replace(QUIET, gradients=faint)) == ["unbalanced"]
    assert kinds(replace(QUIET, gradients=faint, softened=cold)) == ["temperature-low"]


@given(anything)
def test_findings_never_contradict_each_other(measured):
    found = findings(measured)
    seen = [one.kind for one in found]
    for group in APART:
        assert sum(kind in group for kind in seen) <= 1, seen
    assert (measured.gain is not None) == bool(set(seen) & APART[0])
    for one in found:
        assert one.says.endswith(".") and "None" not in one.says + one.try_
        assert "nan" not in one.says + one.try_
    json.dumps(diagnosis(measured), allow_nan=False)


# --- what is measured


def places_of(split) -> np.ndarray:
    return np.linspace(0, len(split) - 1, min(2048, len(split))).astype(int)


def logits_of(net: nn.Module, split) -> tuple[np.ndarray, np.ndarray]:
    batch = split.pick(places_of(split).tolist())
    with torch.no_grad():
        return net.eval()(batch.inputs).double().numpy(), batch.targets.numpy()


def test_measurements_are_what_numpy_computes(digits, teacher, monkeypatch):
    monkeypatch.setattr(diagnosis_module, "AT_ONCE", 64)  # several batches, the last one smaller
    student = make(3).train()
    found = measure(
        student,
        task=TASK,
        data=digits,
        teacher=Teacher(teacher, TASK),
        criteria={"kd": KD(temperature=3, weight=2), "std": KD(temperature=2, standardize=True)},
        task_weight=0.5,
        history=[{"terms": {"kd": 1.0, "task": 2.0}, "gradients": {"kd": 0.25, "task": math.inf}}],
    )
    assert student.training
    for split in ("train", "validation"):
        own, targets = logits_of(student, getattr(digits, split))
        wanted, _ = logits_of(teacher, getattr(digits, split))
        assert found.examples[split] == len(targets)
        for who, z in (("student", own), ("teacher", wanted)):
            value = getattr(getattr(found, who), split)
            assert value == pytest.approx((z.argmax(1) == targets).mean(), abs=1e-5)
        same = (own.argmax(1) == wanted.argmax(1)).mean()
        assert getattr(found.agreement, split) == pytest.approx(same, abs=1e-5)
    z, targets = logits_of(teacher, digits.train)
    p, soft = softmax(z, 1), softmax(z / 3, 1)
    assert found.top == pytest.approx(p.max(1).mean(), abs=1e-4)
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=1e-4)
    kd, std = found.softened
    assert (kd.term, kd.temperature) == ("kd", 3)
    assert kd.off_top == pytest.approx(1 - soft.max(1).mean(), abs=1e-4)
    assert kd.top == pytest.approx(soft.max(1).mean(), abs=1e-4)
    entropy = -(soft * np.log(soft)).sum(1).mean() / math.log(10)
    assert kd.evenness == pytest.approx(entropy, abs=1e-4)
    assert 1 - softmax(z / kd.tenth_at, 1).max(1).mean() == pytest.approx(0.1, abs=1e-3)
    assert 1 - softmax(z / kd.halfway_at, 1).max(1).mean() == pytest.approx(0.45, abs=1e-3)
    level = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    assert std.off_top == pytest.approx(1 - softmax(level / 2, 1).max(1).mean(), abs=1e-4)
    against = (p.max(1) >= 0.9) & (z.argmax(1) != targets)
    assert found.doubtful.count == against.sum() and found.doubtful.examples == len(targets)
    assert found.doubtful.first == np.flatnonzero(against)[:10].tolist()
    sure = p.max(1)[p.max(1) >= 0.9]
    assert found.doubtful.expected == pytest.approx((1 - sure).sum(), rel=1e-3)
    assert found.weights == {"kd": 2.0, "std": 0.9, "task": 0.5}
    assert found.loss == {"kd": [1.0], "task": [2.0]}
    assert found.gradients == {"kd": [0.25], "task": [None]}
    json.dumps(asdict(found), allow_nan=False)


def test_few_examples_of_a_large_split_are_looked_at_spread_over_it(digits, teacher, monkeypatch):
    monkeypatch.setattr(diagnosis_module, "LOOKED_AT", 30)
    asked = []

    class Noting(Teacher):
        def signal(self, batch):
            asked.extend(batch.indices.tolist())
            return super().signal(batch)

    measure(make(3), task=TASK, data=digits, teacher=Noting(teacher, TASK), knows_validation=False)
    assert len(asked) == 30 and asked[0] == 0 and asked[-1] == len(digits.train) - 1
    assert max(np.diff(asked)) <= len(digits.train) / 29 + 1


def test_a_source_of_answers_to_training_examples_is_asked_no_others(digits):
    class Rows:
        def signal(self, batch):
            assert len(digits.validation) != len(digits.train)
            return Signal(torch.eye(10)[digits.train.targets[batch.indices]] * 9)

    found = measure(make(3), task=TASK, data=digits, teacher=Rows(), knows_validation=False)
    assert found.teacher == OnBoth(1.0, None) and found.agreement.validation is None
    assert found.student.validation is not None


def test_examples_without_a_label_count_where_none_is_needed(digits, teacher):
    split = copy.copy(digits.train)
    split.targets = split.targets.clone()
    split.targets[::2] = UNLABELLED
    data = replace(digits, train=split)
    found = measure(make(3), task=TASK, data=data, teacher=Teacher(teacher, TASK))
    own, targets = logits_of(make(3), digits.train)
    wanted, _ = logits_of(teacher, digits.train)
    odd = slice(1, None, 2)
    accuracy = (own.argmax(1) == targets)[odd].mean()
    assert found.student.train == pytest.approx(accuracy, abs=1e-5)
    same = (own.argmax(1) == wanted.argmax(1)).mean()
    assert found.agreement.train == pytest.approx(same, abs=1e-5)
    assert found.doubtful.examples == len(targets) // 2
    split.targets[:] = UNLABELLED
    none = measure(make(3), task=TASK, data=data, teacher=Teacher(teacher, TASK))
    assert none.teacher.train is None and none.doubtful is None
    assert none.agreement.train == found.agreement.train


def test_a_teacher_of_other_classes_is_not_compared(digits):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    found = measure(make(3), task=TASK, data=digits, teacher=Teacher(other, TASK))
    assert found.teacher == OnBoth() == found.agreement
    assert found.softened == [] and found.doubtful is None and found.student.train is not None


@given(st.integers(2, 30), st.floats(0.1, 20), st.floats(0.02, 0.4), st.integers(0, 99))
def test_the_temperature_that_is_named_gives_the_share(classes, scale, wanted, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, classes, generator=generator) * scale
    found = temperature_at(logits, wanted)
    if found is None:  # near ties, or two classes hardly apart
        assert off_top(logits, 0.01) > wanted or off_top(logits, 1000) < wanted
    else:
        assert off_top(logits, found) == pytest.approx(wanted, abs=2e-3)


def test_no_temperature_gives_what_cannot_be():
    assert temperature_at(torch.randn(9, 2), 0.6) is None  # two classes: at most a half
    assert temperature_at(torch.zeros(9, 4), 0.1) is None  # always even
    assert temperature_at(torch.randn(9, 4) * 1e-3, 0.1) is None  # colder than criteria take


# --- whole stages


def test_a_temperature_far_too_low_is_found_and_a_better_one_named(run, teacher, digits):
    heard: list = []
    stage = Distill(criteria=[{"kd": {"temperature": 0.05}}], epochs=2, **FAST)
    stage.apply(Student(make(4)), replace(run, tell=heard.append))
    found = {one["kind"]: one for one in run.found["diagnosis"]["findings"]}
    assert "At temperature 0.05" in found["temperature-low"]["says"]
    (softened,) = run.found["diagnosis"]["measured"]["softened"]
    z, _ = logits_of(teacher, digits.train)
    better = softened["tenth_at"]
    assert 1 - softmax(z / better, 1).max(1).mean() == pytest.approx(0.1, abs=1e-3)
    assert f"temperature: {float(f'{better:.2g}'):g}," in found["temperature-low"]["try"]
    assert not any(e["event"] == "note" and "one-hot" in e["text"] for e in heard)


def test_wrong_labels_are_found_where_the_teacher_knows_better(digits, tmp_path):
    good = make(16, seed=7)
    longer = Training(epochs=12, **FAST)
    train(good, data=digits, task=TASK, training=longer, objective=TaskObjective(TASK))
    z, targets = logits_of(good, digits.train)
    sure = np.flatnonzero((softmax(z, 1).max(1) > 0.95) & (z.argmax(1) == targets))
    wrong = sure[::7][:20]
    split = copy.copy(digits.train)
    split.targets = split.targets.clone()
    split.targets[wrong] = (split.targets[wrong] + 1) % 10
    noisy = replace(digits, train=split)
    run = Context(task=TASK, data=noisy, teacher=good, seed=0, work=tmp_path)
    Distill(epochs=2, **FAST).apply(Student(make(4)), run)
    found = {one["kind"]: one["says"] for one in run.found["diagnosis"]["findings"]}
    doubtful = run.found["diagnosis"]["measured"]["doubtful"]
    assert set(doubtful["first"]) <= set(wrong.tolist())
    assert doubtful["count"] == len(wrong)
    assert f"20 of {len(targets)} training examples" in found["label-noise"]


def test_diagnose_trains_the_same_student_alone_and_compares_paired(run, tmp_path, digits):
    heard: list = []
    stage = Distill(epochs=3, diagnose=True, **FAST)
    taught = stage.apply(Student(make(4)), replace(run, tell=heard.append))
    plain = replace(run.at("plain"), found={})
    undiagnosed = Distill(epochs=3, **FAST).apply(Student(make(4)), plain)
    for a, b in zip(taught.module.parameters(), undiagnosed.module.parameters(), strict=True):
        assert torch.equal(a, b)

    # a stage without criteria is the independent reference of the student alone
    lone = Distill(criteria=[], epochs=3, **FAST).apply(Student(make(4)), run.at("lone"))
    measured = run.found["diagnosis"]["measured"]
    rights = []
    for net in (taught.module, lone.module):
        z, targets = logits_of(net, digits.validation)
        rights.append(z.argmax(1) == targets)
    gained = measured["gain"]
    assert gained["taught"] == pytest.approx(rights[0].mean(), abs=1e-5)
    assert gained["alone"] == pytest.approx(rights[1].mean(), abs=1e-5)
    assert gained["value"] == pytest.approx(rights[0].mean() - rights[1].mean(), abs=1e-5)
    assert gained["low"] <= gained["value"] <= gained["high"] and gained["examples"] == len(targets)
    alone = torch.load(tmp_path / "alone" / "distill.pt", weights_only=True)
    for name, weight in lone.module.state_dict().items():
        assert torch.equal(alone["best"][name], weight), name

    labels = [event["label"] for event in heard if event["event"] == "epoch"]
    assert labels == ["distill"] * 3 + ["alone"] * 3
    notes = [event["text"] for event in heard if event["event"] == "note"]
    for one in run.found["diagnosis"]["findings"]:
        assert f"{one['says']} {one['try']}".strip() in notes
    assert len(measured["gradients"]["kd"]) == 3


@pytest.mark.parametrize("label", ["distill", "alone"])
def test_a_diagnosis_that_was_interrupted_ends_as_an_undisturbed_one(run, label):
    stage = Distill(epochs=3, diagnose=True, **FAST)
    undisturbed = replace(run.at("undisturbed"), found={})
    stage.apply(Student(make(4)), undisturbed)

    disturbed = replace(run.at("disturbed"), found={})
    with pytest.raises(KeyboardInterrupt):
        stage.apply(Student(make(4)), replace(disturbed, tell=stops_after(3, label)))
    stage.apply(Student(make(4)), disturbed)
    assert disturbed.found["diagnosis"] == undisturbed.found["diagnosis"]


def test_without_criteria_there_is_nothing_to_diagnose_and_it_is_said(run):
    heard: list = []
    stage = Distill(criteria=[], epochs=1, diagnose=True, **FAST)
    stage.apply(Student(make(4)), replace(run, tell=heard.append))
    assert "diagnosis" not in run.found
    assert any("without criteria none was asked" in e.get("text", "") for e in heard)


def test_a_teacher_that_is_not_asked_is_not_looked_at(run):
    Distill(criteria=["teacher-free"], epochs=1, **FAST).apply(Student(make(4)), run)
    measured = run.found["diagnosis"]["measured"]
    assert measured["teacher"] == {"train": None, "validation": None}
    assert measured["softened"] == [] and measured["student"]["train"] is not None


# --- gradients of the terms change nothing


class Wide(nn.Module):
    """The fixtures' networks for 8 × 8 images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shaped = x.expand(-1, 2, -1, -1) if isinstance(self.net, Cnn) else x.flatten(1)[:, :63]
        return self.net(shaped if isinstance(self.net, Cnn) else shaped.unflatten(1, (21, 3)))


def five_classes(digits):
    """The digits under 5, which the fixtures' networks answer with."""
    splits = {}
    for name in ("train", "validation"):
        split = getattr(digits, name)
        batch = split.pick(range(len(split)))
        keep = batch.targets < 5
        splits[name] = ArraySplit(
            name, batch.inputs[keep], batch.targets[keep], mean=[0.0], std=[1.0]
        )
    return replace(digits, **splits, classes=tuple("01234"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("student", "teacher", "path"),
    [
        (lambda: Cnn(4), lambda: Cnn(6), "net.conv"),
        (lambda: Transformer(4), lambda: Transformer(6), "net.block.linear2"),
    ],
    ids=["cnn", "transformer"],
)
def test_looking_at_gradients_leaves_every_weight(
    digits, tmp_path, monkeypatch, student, teacher, path, precision
):
    data = five_classes(digits)
    torch.manual_seed(1)
    asked, start = Wide(teacher()), Wide(student())
    hint = {"feature": {"layers": [{"student": path, "teacher": path}]}}
    stage = Distill(criteria=["kd", hint], epochs=2, clip=0.5, precision=precision, **FAST)
    heard: list = []

    def weights(name: str) -> dict[str, torch.Tensor]:
        run = Context(TASK, data, asked, 0, tmp_path / name, tell=heard.append)
        return stage.apply(Student(copy.deepcopy(start)), run).module.state_dict()

    looked = weights("looked")
    (first, *_) = (e for e in heard if e["event"] == "epoch")
    assert set(first["gradients"]) == {"kd", "feature", "task"}
    assert all(norm > 0 for norm in first["gradients"].values())
    monkeypatch.setattr("attar.training.loop.term_norms", lambda terms, parameters: {})
    heard.clear()
    blind = weights("blind")
    assert not any("gradients" in event for event in heard)
    for name, weight in looked.items():
        assert torch.equal(weight, blind[name]), name


# --- the page


def found_by(measured: Measured) -> dict:
    told = details()
    told["found"]["01-distill"]["diagnosis"] = diagnosis(measured)
    return told


def test_the_page_says_each_finding_once_with_its_figures(tmp_path):
    seen = replace(
        QUIET,
        gain=gain(0.01, -0.01, 0.03),
        examples={"train": 1500, "validation": 500},
        softened=[replace(SOFT, off_top=0.0002, top=0.9998, temperature=0.05)],
    )
    notes = [{"event": "note", "text": f"{f.says} {f.try_}".strip()} for f in findings(seen)]
    folder = write_run(tmp_path, details=found_by(seen), events=events() + notes)
    text = page_of(folder).text
    section = text[text.index("Did the teacher help?") : text.index("What was adjusted")]
    assert "was not tried" not in section
    for one in findings(seen):
        assert text.count(one.says) == 1 and one.says in section and one.try_ in section
    assert "teacher 98.50 % 96.00 %" in section and "student 96.00 % 94.00 %" in section
    assert "same answers 99.00 % 97.00 %" in section and "kd 0.05 100 % 0.02 %" in section
    assert "1,500 training" in section
    adjusted = text[text.index("What was adjusted") :]
    assert "findings" not in adjusted and "measured" not in adjusted
    assert "answers as channels-last" in adjusted


def test_the_page_says_that_the_student_alone_was_not_tried(tmp_path):
    text = page_of(write_run(tmp_path, details=found_by(QUIET))).text
    assert "was not tried: diagnose: true" in text and "Nothing stood out." in text


def test_gradients_are_drawn_beside_their_terms(tmp_path):
    told = events()
    assert "norm of each term’s gradient" not in page_of(write_run(tmp_path / "a")).text
    for event in told:
        if event["event"] == "epoch" and len(event["terms"]) > 1:
            event["gradients"] = {"task": 0.1 * event["epoch"], "kd": None}
    html = write_report(write_run(tmp_path / "b", events=told)).read_text(encoding="utf-8")
    assert html.count("norm of each term’s gradient") == 2  # distill and recover


def test_hostile_or_broken_measurements_do_nothing(tmp_path):
    bad = hostile(found_by(replace(QUIET, **{**LAGGING, "loss": STILL})))
    page = page_of(write_run(tmp_path / "a", details=bad))
    assert "script" not in page.tags and HOSTILE in " ".join(page.words)
    broken = details()
    broken["found"]["01-distill"]["diagnosis"] = {"measured": {"softened": 3}, "findings": [1, {}]}
    broken["found"]["02-prune"]["diagnosis"] = "mine"
    text = page_of(write_run(tmp_path / "b", details=broken)).text
    assert "Did the teacher help?" in text and "diagnosis mine" in text
