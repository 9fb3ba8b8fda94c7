"""A live teacher: left as it is, and answering alike in whichever form it runs."""

import copy
import gc
import json
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config

from attar.data.base import Batch
from attar.distill import DistillObjective, Teacher, recovery_objective
from attar.distill import teacher as teachers
from attar.distill.criteria.feature import Feature
from attar.distill.criteria.kd import KD
from attar.distill.criteria.logits_mse import LogitsMSE
from attar.distill.forms import (
    BFloat16,
    ChannelsLast,
    Compiled,
    CompiledBFloat16,
    Exported,
    Form,
    Original,
)
from attar.errors import UsageError
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.objective import TaskObjective

TASK = ImageClassification()


def make(width: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(width * 4, classes),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = make(8)
    for _ in range(3):
        made(torch.randn(16, 2, 6, 6))  # running statistics that differ from the batch's
    return made.eval()


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(16, 2, 6, 6, generator=g),
        torch.randint(0, 4, (16,), generator=g),
        torch.arange(16),
    )


def state(net: nn.Module) -> dict:
    return {
        **{k: v.clone() for k, v in net.state_dict().items()},
        "modes": [m.training for m in net.modules()],
        "grads": [p.requires_grad for p in net.parameters()],
        "strides": [p.stride() for p in net.parameters()],
        "hooks": [len(m._forward_hooks) for m in net.modules()],
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_a_teacher_left_in_training_mode_answers_in_eval_mode_and_stays_as_it_was(net, batch):
    expected = net(batch.inputs).detach()
    net.train()
    net[1].eval()
    before = state(net)
    teacher = Teacher(net, TASK, layers=["0"])
    teacher.settle(batch)
    found = teacher.signal(batch)
    assert torch.allclose(found.logits, expected, atol=1e-5)
    assert not found.logits.requires_grad and not found.features["0"].requires_grad
    assert same(state(net), before)


def test_signals_can_take_part_in_a_loss(net, batch):
    teacher = Teacher(net, TASK, layers=["0"])
    teacher.settle(batch)
    wanted = teacher.signal(batch)
    s = torch.zeros_like(wanted.features["0"]).requires_grad_()
    (s * wanted.features["0"]).sum().backward()
    assert torch.equal(s.grad, wanted.features["0"])


def test_autocast_of_the_training_leaves_the_teacher_exact(net, batch):
    teacher = Teacher(net, TASK)
    plain = teacher.signal(batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.signal(batch).logits, plain)


@pytest.mark.parametrize("kind", [ChannelsLast, BFloat16])
def test_another_form_agrees_with_the_original(net, batch, kind: type[Form]):
    before = state(net)
    wanted = Original(net, TASK, batch, ("0", "6"))(batch)
    found = kind(net, TASK, batch, ("0", "6"))(batch)
    assert teachers._agree(wanted, found, TASK)
    assert found.features["0"].shape == wanted.features["0"].shape
    assert same(state(net), before)


def test_the_exported_form_agrees_with_the_original(net, batch):
    before = state(net)
    exported = Exported(net, TASK, batch, ())
    found = exported(batch)
    assert torch.allclose(found.logits, net(batch.inputs), atol=1e-4)
    small = exported(Batch(batch.inputs[:3], None, batch.indices[:3]))
    assert torch.allclose(small.logits, found.logits[:3], atol=1e-5)
    assert same(state(net), before)


class Attention(nn.Module):
    """Images as rows of tokens: attention, norms, GELU, and a mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.encoder = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.5, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.transpose(1, 2).flatten(2))).mean(1))


def part(batch: Batch, count: int) -> Batch:
    return Batch(batch.inputs[:count], None, batch.indices[:count])


@pytest.mark.long
@pytest.mark.parametrize("kind", [Compiled, CompiledBFloat16])
@pytest.mark.parametrize(("made", "layers"), [("cnn", ("0", "2")), ("attention", ("encoder",))])
def test_a_compiled_form_answers_alike_with_inner_layers_for_any_batch(
    net, batch, kind: type[Form], made: str, layers: tuple[str, ...]
):
    torch.manual_seed(3)
    net = net if made == "cnn" else Attention().train()
    if not kind.fits(net, batch, layers):
        pytest.skip("this machine or this PyTorch has no use for that form")
    before, drawn = state(net), torch.get_rng_state()
    form = kind(net, TASK, batch, layers)
    original = Original(net, TASK, batch, layers)
    compilations = counters["stats"]["unique_graphs"]
    assert compilations > 0
    for count in (16, 3, 1, 16, 5):
        shown = part(batch, count)
        found = form(shown)
        assert teachers._agree(original(shown), found, TASK)
        assert list(found.features) == list(layers)
        assert not any(x.requires_grad for x in (found.logits, *found.features.values()))
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            assert torch.equal(form(shown).logits, found.logits)
    assert counters["stats"]["unique_graphs"] == compilations, "one compilation, whatever the size"
    assert same(state(net), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not config.freezing


@pytest.mark.long
def test_compiled_teachers_are_as_many_as_are_wanted_and_leave_a_student_as_it_trains(net, batch):
    if not Compiled.fits(net, batch, ()):
        pytest.skip("this PyTorch can't keep compilations apart")

    def trained() -> torch.Tensor:
        torch.manual_seed(7)
        student = make(3)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(3):
            TASK.loss(student(batch.inputs), batch).backward()
            optimizer.step()
        return student(batch.inputs)

    alone = trained()
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(72, 4)) for _ in range(10)]  # its limit is 8
    forms = []
    for i, one in enumerate(nets):
        before = counters["stats"]["unique_graphs"]
        forms.append(Compiled(one, TASK, batch, ()))
        assert counters["stats"]["unique_graphs"] == before + 1, f"teacher {i} is compiled"
    for one, form in zip(nets, forms, strict=True):
        assert torch.allclose(form(batch).logits, one(batch.inputs), atol=1e-5)
    assert torch.equal(trained(), alone)
    gone = weakref.ref(forms[0]._module)
    del forms, form
    gc.collect()
    assert gone() is None, "a teacher that is no longer used takes no memory"


def test_without_a_c_compiler_the_teacher_answers_as_it_would_have(
    net, batch, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(teachers, "FASTER", (Compiled,))
    monkeypatch.setattr(teachers, "COMPILE_SECONDS", 0)
    with config.patch({"cpp.cxx": (str(tmp_path / "g++"),), "force_disable_caches": True}):
        with pytest.raises(Exception, match="compiler"):
            Compiled(net, TASK, batch, ())
        teacher = Teacher(net, TASK, calls=1000)
        teacher.settle(batch)
    assert teacher.choice["form"] == "original"
    assert torch.equal(teacher.signal(batch).logits, net(batch.inputs))


class Wrong(ChannelsLast):
    """Fast, and wrong by a constant that no argmax shows."""

    name = "wrong"

    def __call__(self, batch):
        return super().__call__(batch)._replace(logits=super().__call__(batch).logits * 1.1)


class Failing(ChannelsLast):
    name = "failing"

    def __call__(self, batch):
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize("kind", [Wrong, Failing])
def test_a_form_that_answers_otherwise_or_fails_is_not_taken(net, batch, kind, monkeypatch):
    monkeypatch.setattr(teachers, "FASTER", (kind,))
    monkeypatch.setattr(
        teachers, "_seconds", lambda form, batch: 2.0 if isinstance(form, Original) else 1.0
    )
    teacher = Teacher(net, TASK)
    teacher.settle(batch)
    assert teacher.choice["form"] == "original"
    assert torch.allclose(teacher.signal(batch).logits, net(batch.inputs))


@pytest.fixture
def times(monkeypatch):
    """Stated seconds a batch of each form, instead of measured ones."""
    stated = {"original": 2.0, "channels-last": 1.0, "bfloat16": 0.8, "onnxruntime": 0.1}
    monkeypatch.setattr(teachers, "_seconds", lambda form, batch: stated[form.name])
    return stated


def test_the_fastest_form_is_taken_told_and_remembered(net, batch, times, cache):
    heard: list = []
    teacher = Teacher(net, TASK, tell=heard.append)
    teacher.settle(batch)
    chosen = teacher.choice["form"]
    assert chosen in {"channels-last", "bfloat16"}
    assert [e["event"] for e in heard] == ["note"] and chosen in heard[0]["text"]

    times.update({"original": 0.1})  # another day, another timing: the same teacher
    again = Teacher(copy.deepcopy(net), TASK)
    again.settle(batch)
    assert again.choice == teacher.choice
    assert torch.equal(again.signal(batch).logits, teacher.signal(batch).logits)

    for damaged in ("", "[]", '{"form": "?"}', json.dumps({"form": "gone", "seconds": {}})):
        (place,) = (cache / "teacher-forms").iterdir()
        place.write_text(damaged)
        Teacher(net, TASK).settle(batch)


def test_a_form_little_faster_is_not_worth_the_change(net, batch, times):
    times.update({"channels-last": 1.9, "bfloat16": 1.95})
    teacher = Teacher(net, TASK)
    teacher.settle(batch)
    assert teacher.choice["form"] == "original"


class Export(ChannelsLast):
    """Stands in for the export, which takes seconds."""

    name = "onnxruntime"
    fits = Exported.fits


@pytest.mark.parametrize(
    ("calls", "layers", "tried"),
    [(1000, (), True), (100, (), False), (None, (), False), (1000, ("0",), False)],
)
def test_an_export_is_tried_where_it_can_pay(net, batch, times, monkeypatch, calls, layers, tried):
    monkeypatch.setattr(teachers, "FASTER", (ChannelsLast, Export))
    monkeypatch.setattr(teachers, "Exported", Export)
    teacher = Teacher(net, TASK, calls=calls, layers=layers)
    teacher.settle(batch)
    assert ("onnxruntime" in teacher.choice["seconds"]) == tried
    assert teacher.choice["form"] == ("onnxruntime" if tried else "channels-last")
    assert set(teacher.signal(batch).features) == set(layers)


class Stand(ChannelsLast):
    """Stands in for a compilation, which takes seconds."""

    name = "compiled"


class HalfStand(Stand):
    name = "compiled-bfloat16"


@pytest.mark.parametrize(
    ("calls", "half", "tried"),
    [
        (130, True, {"compiled-bfloat16"}),  # 130 s in the best form till then
        (130, False, {"compiled"}),  # bfloat16 wasn't verified
        (110, True, set()),
        (None, True, set()),
    ],
)
def test_compiling_is_tried_once_and_where_it_can_pay(
    net, batch, times, monkeypatch, calls, half, tried
):
    monkeypatch.setattr(teachers, "FASTER", (ChannelsLast, HalfStand, Stand))
    monkeypatch.setattr(teachers, "Compiled", Stand)
    monkeypatch.setattr(teachers, "CompiledBFloat16", HalfStand)
    monkeypatch.setattr(HalfStand, "fits", classmethod(lambda cls, *_: half))
    times.update({"compiled": 0.5, "compiled-bfloat16": 0.25})
    teacher = Teacher(net, TASK, calls=calls, layers=["0"])
    teacher.settle(batch)
    assert set(teacher.choice["seconds"]) == {"original", "channels-last"} | tried
    assert teacher.choice["form"] == (tried or {"channels-last"}).pop()
    assert set(teacher.signal(batch).features) == {"0"}


def test_for_a_few_calls_nothing_is_tried(net, batch, times):
    teacher = Teacher(net, TASK, calls=10)
    teacher.settle(batch)
    assert teacher.choice == {"form": "original"}


def test_a_wrong_layer_is_refused_before_anything_runs(net):
    with pytest.raises(UsageError, match="Sequential has no layer '9'"):
        Teacher(net, TASK, layers=["9"])


def joint(net: nn.Module, **arguments) -> tuple[DistillObjective, nn.Module]:
    torch.manual_seed(5)
    hint = Feature(layers=["0"], weight=0.5)
    teacher = Teacher(net, TASK, layers=hint.teacher_layers)
    objective = DistillObjective(TASK, teacher, {"kd": KD(), "hint": hint}, **arguments)
    return objective, make(3)


def test_the_joint_loss_is_the_weighted_sum(net, batch):
    objective, student = joint(net, task_weight=0.3, label_smoothing=0.1)
    objective.prepare(student, batch)
    student.eval()
    terms = objective(student, batch)
    output, wanted = student(batch.inputs), net(batch.inputs).detach()
    kd = objective.criteria[0]
    assert set(terms) == {"kd", "hint", "task"}
    expected = 0.3 * TASK.loss(output, batch, label_smoothing=0.1)
    assert terms["task"].item() == pytest.approx(expected.item(), rel=1e-5)
    t = kd.settings.temperature
    p, q = (wanted / t).softmax(1), (output / t).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() * t * t
    assert terms["kd"].item() == pytest.approx(0.9 * divergence.item(), rel=1e-4)
    hint = objective.criteria[1].adapters[0](student[0](batch.inputs))
    mse = (hint - net[0](batch.inputs)).square().mean()
    assert terms["hint"].item() == pytest.approx(0.5 * mse.item(), rel=1e-4)


def test_each_network_is_called_once_a_step(net, batch):
    objective, student = joint(net)
    objective.prepare(student, batch)
    objective(student, batch)
    calls: list = []
    for part in (net, student):
        part.register_forward_pre_hook(lambda *_, part=part: calls.append(part))
    objective._teacher._form = Original(net, TASK, batch, ("0",))
    objective(student, batch)
    assert calls == [student, net]


def test_adapters_are_the_objectives_and_the_teacher_is_nobodys(net, batch):
    objective, student = joint(net)
    names = set(student.state_dict())
    before = state(student)
    objective.prepare(student, batch)
    assert same(state(student), before), "the dry run leaves the student as it was"
    objective.train()
    assert set(objective.state_dict()) == {
        "criteria.1.adapters.0.weight",
        "criteria.1.adapters.0.bias",
    }
    assert not net.training and not any(p.grad is not None for p in net.parameters())
    optimizer = torch.optim.SGD([*student.parameters(), *objective.parameters()], lr=0.3)
    weight = objective.criteria[1].adapters[0].weight
    was, losses = weight.detach().clone(), []
    for _ in range(25):
        loss = sum(objective(student.train(), batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(weight, was)
    assert set(student.state_dict()) == names
    assert not any(m._forward_hooks for net_ in (student, net) for m in net_.modules())
    assert not any(p.grad is not None for p in net.parameters())


def test_batches_without_labels_are_taught_by_the_teacher_alone(net, batch):
    objective, student = joint(net)
    objective.prepare(student, batch)
    assert set(objective(student, batch._replace(targets=None))) == {"kd", "hint"}


def test_a_wrapped_student_is_taught_like_a_bare_one(net, batch):
    objective, student = joint(net)
    objective.prepare(student, batch)
    student.eval()
    bare = objective(student, batch)
    wrapped = objective(nn.DataParallel(student), batch)
    assert all(torch.equal(bare[name], wrapped[name]) for name in bare)


def test_other_classes_than_the_teachers_are_refused_before_training(net, batch):
    objective = DistillObjective(TASK, Teacher(net, TASK), {"mse": LogitsMSE()})
    with pytest.raises(UsageError, match="with 7 classes and the teacher with 4"):
        objective.prepare(make(3, classes=7), batch)


def test_recovery_is_against_the_teacher_if_there_is_one(net, batch):
    alone = recovery_objective(TASK, None, Training(label_smoothing=0.1))
    assert isinstance(alone, TaskObjective)
    student = make(3).eval()
    smoothed = TASK.loss(student(batch.inputs), batch, label_smoothing=0.1)
    assert alone(student, batch)["task"].item() == pytest.approx(smoothed.item())
    terms = recovery_objective(TASK, net, Training(label_smoothing=0.1))(student, batch)
    assert set(terms) == {"kd", "task"}
    assert terms["task"].item() == pytest.approx(0.1 * smoothed.item())
