"""Quantization-aware training: what is trained is what is exported."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from attar.distill import DistillObjective, Teacher
from attar.distill.criterion import criteria
from attar.errors import ExportError, UsageError
from attar.prune import Masked
from attar.quantize import Quantized, Scheme, quantize, quantize_weights, quantized_reference
from attar.quantize.aware import QuantizationAware, quantize_aware
from attar.quantize.graph import capture, folds, tensors_of
from attar.quantize.on_grid import OnGrid, OnLearnedGrid, layer_weights
from attar.quantize.training_graph import TrainingGraph
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.runtimes.parity import QUANTIZED, check_parity
from attar.share import share_weights
from attar.stages.base import Context
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Optimizer, Training
from attar.training.learned_steps import grown, on_learned_grid
from attar.training.loop import make_optimizer, train
from attar.training.objective import TaskObjective
from attar.training.stand_in import StandIn
from network_fixture import Encoder
from run_fixture import stops_after

TASK = ImageClassification()
SHAPES = ({0: torch.export.Dim("batch", min=1)},)
LONG = pytest.mark.long
FAST = {"batch_size": 50, "optimizer": {"lr": 0.003}}


class Residual(nn.Module):
    """Batch norms after convolutions and alone, a shortcut, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.norm, self.drop = nn.ReLU(), nn.BatchNorm2d(8), nn.Dropout(0.1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.norm(F.max_pool2d(F.relu(x + self.bn2(self.conv2(x))), 2))
        return self.head(self.drop(F.relu(x).mean((2, 3))))


NETWORKS = {"cnn": Residual, "transformer": Encoder}


def made(name: str, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().eval()


@pytest.fixture(scope="module")
def images(digits) -> Tensor:
    return next(digits.train.batches(64)).inputs


@pytest.fixture
def run(digits, tmp_path) -> Context:
    return Context(task=TASK, data=digits, teacher=None, seed=1, work=tmp_path)


def aware(student: Student, images: Tensor, run: Context, epochs: int = 2, **given: Any) -> Student:
    training = Training.model_validate({"epochs": epochs, **FAST, **given.pop("training", {})})
    objective = given.pop("objective", None)
    return quantize_aware(
        student,
        given.pop("scheme", Scheme(weight_bits=7, observer="minmax")),
        lambda wrap: run.train(student, training, objective, wrap=wrap),
        lambda: [(images,)],
        example=(images[:2],),
        dynamic_shapes=SHAPES,
        **given,
    )


def answers(student: Student, images: Tensor) -> Tensor:
    graph = quantized_reference(student.edits, student.module, (images[:2],), SHAPES)
    assert graph is not None
    with torch.no_grad():
        return graph(images)


# --- the arithmetic


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12),
    step=st.floats(0.0625, 1, width=32),
    ends=st.sampled_from([(-8, 7), (0, 15), (-1, 1)]),
)
def test_the_gradients_are_those_of_the_papers_equations(values, step, ends):
    """Value by value, from equations 1 to 3 and 5."""
    low, high = ends
    x = torch.tensor(values, requires_grad=True)
    s = torch.tensor(step, requires_grad=True)
    y = on_learned_grid(x, s, low, high)
    weights = torch.linspace(-1, 2, len(values))
    (y * weights).sum().backward()
    of_step = 0.0
    for i, value in enumerate(x.tolist()):
        v = float(torch.tensor(value) * (1 / torch.tensor(step)))
        inside = low < v < high
        level = min(max(round(v), low), high)
        assert y[i].item() == pytest.approx(level * step, rel=1e-5, abs=1e-6)
        assert float(x.grad[i]) == (float(weights[i]) if inside else 0.0)
        of_step += float(weights[i]) * (level - v if inside else level)
    assert float(s.grad) == pytest.approx(of_step, rel=1e-3, abs=1e-3)


def test_channels_have_gradients_of_their_own():
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    steps = torch.tensor([0.1, 0.2, 0.3]).reshape(-1, 1, 1, 1).requires_grad_()
    on_learned_grid(x, steps, -7, 7).square().sum().backward()
    for channel in range(3):
        alone = x.detach()[channel].clone().requires_grad_()
        step = steps.detach()[channel].reshape(()).clone().requires_grad_()
        on_learned_grid(alone, step, -7, 7).square().sum().backward()
        torch.testing.assert_close(x.grad[channel], alone.grad)
        torch.testing.assert_close(steps.grad[channel].reshape(()), step.grad)


def test_descent_moves_a_step_as_lsq_does():
    """By its gradient over √(N·Q), to first order."""
    step, values, largest, rate = 0.37, 90, 127, 1e-4
    log_step = torch.tensor(math.log(step), requires_grad=True)
    (5.0 * grown(log_step, values, largest)).backward()
    moved = float((log_step - rate * log_step.grad).exp())
    assert moved - step == pytest.approx(-rate * 5.0 / math.sqrt(values * largest), rel=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_is_differentiated_like_the_network(name, images):
    """The graph's answers and every gradient are the evaluating network's own."""
    network = made(name)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
    graph = capture(network, (images[:2],), SHAPES)
    with torch.no_grad():  # the network moves on; the graph's own numbers don't
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tensors = tensors_of(network)
    constants = {
        **{k: v for k, v in tensors.items() if k not in folds(graph)},
        **{k: make(tensors).float() for k, make in folds(graph).items()},
    }
    found = functional_call(graph, constants, (images,), strict=False)
    expected = network(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    grads = torch.autograd.grad(found.square().sum(), list(network.parameters()))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


# --- what is trained is what is exported


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("cnn", {}),
        ("transformer", {}),
        pytest.param("cnn", {"training": {"precision": "bfloat16", "ema": 0.9}}, marks=LONG),
        pytest.param(
            "cnn",
            {"freeze": 0.0, "steps": "fixed", "scheme": Scheme(weight_bits=8)},
            marks=LONG,
        ),
        pytest.param("cnn", {"scheme": Scheme(weight_bits=7, float_layers=("conv2",))}, marks=LONG),
        pytest.param(
            "transformer",
            {"scheme": Scheme(weight_bits=8, float_layers=("*",)), "freeze": 0.0},
            marks=LONG,
        ),
    ],
)
def test_the_export_answers_as_what_was_trained(name, given, images, run, tmp_path, monkeypatch):
    graphs: list[TrainingGraph] = []
    original = TrainingGraph.__init__

    def watched(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        graphs.append(self)

    monkeypatch.setattr(TrainingGraph, "__init__", watched)
    network = made(name)
    small = aware(Student(network), images, run, **given)
    small.check()
    assert small.module is network and [e.kind for e in small.edits] == ["quantized"]
    with torch.no_grad():
        trained = graphs[-1](network, (images,), {})
    reference = answers(small, images)
    torch.testing.assert_close(trained, reference, rtol=1e-5, atol=1e-5)
    runtime = OnnxRuntime()
    names = (["input"], ["logits"])
    runtime.export(small, tmp_path, example=(images[:2],), dynamic_shapes=SHAPES, names=names)
    found = runtime.session(tmp_path)(images.numpy())[0]
    check_parity(reference.numpy(), found, TASK.agreement, QUANTIZED)


def test_validation_judges_the_export_and_steps_come_back_with_their_weights(images, run, digits):
    """The kept epoch's figure is the exported graph's own, whichever epoch that was."""
    small = aware(
        Student(made("cnn")), images, run, epochs=5,
        training={"optimizer": {"lr": 0.02}, "schedule": {"name": "constant"}},
        scheme=Scheme(weight_bits=3, observer="minmax"),
    )  # fmt: skip
    history = [record["metric"]["value"] for record in run.histories["recover"]]
    assert judged(small, images, run) == pytest.approx(max(history))
    assert len(set(history)) > 1


def test_batch_norms_live_and_then_freeze(images, digits):
    student = Student(made("cnn"))
    objective = objective_of(student, images, freeze=0.5)
    statistics = []

    def note(module: nn.Module, epoch: int) -> None:
        statistics.append(module.bn1.running_mean.clone())

    training = Training.model_validate({"epochs": 4, "keep": "last", **FAST})
    kwargs = {"data": digits, "task": TASK, "training": training}
    train(student.module, objective=objective, on_epoch=note, **kwargs)
    statistics.append(student.module.bn1.running_mean.clone())
    moved = [not torch.equal(a, b) for a, b in pairwise(statistics)]
    assert moved == [True, True, False, False]


def objective_of(student: Student, images: Tensor, **given: Any) -> QuantizationAware:
    return QuantizationAware(
        given.pop("inner", TaskObjective(TASK)),
        student,
        given.pop("scheme", Scheme(weight_bits=7, observer="minmax")),
        lambda: [(images,)],
        example=(images[:2],),
        dynamic_shapes=SHAPES,
        **given,
    )


@pytest.mark.parametrize("steps", ["learned", "fixed"])
def test_steps_are_learned_or_fixed(steps, images, digits):
    student = Student(made("cnn"))
    objective = objective_of(student, images, freeze=0.0, steps=steps)
    before = {k: v.clone() for k, v in objective.kept().items()}
    training = Training.model_validate({"epochs": 1, "keep": "last", **FAST})
    train(student.module, data=digits, task=TASK, training=training, objective=objective)
    moved = [k for k, v in objective.kept().items() if not torch.equal(v, before[k])]
    wanted = [k for k in before if k.endswith("log_step")] if steps == "learned" else []
    assert moved == wanted


def test_steps_are_not_decayed(images):
    student = Student(made("cnn"))
    objective = objective_of(student, images)
    parameters = [*student.module.parameters(), *objective.parameters()]
    for name in ("sgd", "adamw"):
        config = Optimizer(name=name, weight_decay=0.5)
        one, other = make_optimizer(parameters, config, objective.undecayed()).param_groups
        assert (one["weight_decay"], other["weight_decay"]) == (0.5, 0.0)
        assert {id(p) for p in other["params"]} == {
            id(p) for p in objective.quantizers.parameters()
        }
        assert len(one["params"]) + len(other["params"]) == len(parameters)


def test_an_interrupted_training_ends_as_an_undisturbed_one(images, run):
    def ended(at: Context) -> dict[str, Tensor]:
        small = aware(Student(made("cnn")), images, at, epochs=4, freeze=0.5)
        (edit,) = small.find(Quantized)
        return {**small.module.state_dict(), **edit.tensors()}

    whole = ended(run.at("whole"))
    disturbed = run.at("disturbed")
    for epoch in (1, 2, 3):  # in the first part, at its end, in the second
        with pytest.raises(KeyboardInterrupt):
            ended(replace(disturbed, tell=stops_after(epoch)))
    again = ended(disturbed)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


# --- features


@pytest.mark.parametrize(
    ("name", "kind", "layers"),
    [
        ("cnn", "feature", ["act", "bn2"]),
        ("cnn", "attention", ["bn1", "norm"]),
        ("transformer", "feature", ["embed", "attend", "down"]),
    ],
)
def test_inner_layers_are_taught_in_both_parts(name, kind, layers, images, run, digits):
    criterion = criteria.get(kind)(layers=layers)
    teacher = Teacher(made(name, seed=1), TASK, layers=criterion.teacher_layers)
    objective = DistillObjective(TASK, teacher, {kind: criterion})
    student = Student(made(name))
    objective.prepare(student.module, next(digits.train.batches(8)))
    heard: list[Any] = []
    at = replace(run, tell=heard.append)
    small = aware(student, images, at, epochs=3, freeze=0.3, objective=objective)
    small.check()
    losses = [e["terms"][kind] for e in heard if e["event"] == "epoch"]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_the_graph_answer_as_the_networks(name, images):
    """To what the grids leave open, and with gradients."""
    network = made(name)
    graph = TrainingGraph(
        network, Scheme(weight_bits=8, observer="minmax"), lambda: [(images,)],
        example=(images[:2],), dynamic_shapes=SHAPES,
    )  # fmt: skip
    stand_in = StandIn(network, graph.layers, graph)
    seen: dict[str, Tensor] = {}
    for where, module in (("graph", stand_in), ("network", network)):
        for path, layer in module.named_modules():
            if path and path not in graph.lost:
                layer.register_forward_hook(
                    lambda _, __, output, key=f"{where}/{path}": seen.__setitem__(
                        key, output[0] if isinstance(output, tuple) else output
                    )
                )
        module(images)
    paths = [key.partition("/")[2] for key in seen if key.startswith("graph/")]
    assert len(paths) >= 5
    for path in paths:
        found, wanted = seen[f"graph/{path}"], seen[f"network/{path}"]
        if path != "act":  # which is called once: its grid is what it hands on
            assert found.requires_grad
        assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_layer_that_is_folded_away_is_refused_at_once(images):
    criterion = criteria.get("feature")(layers=["conv1"])
    inner = DistillObjective(TASK, Teacher(made("cnn"), TASK, layers=["conv1"]), {"f": criterion})
    with pytest.raises(ExportError, match=r"'conv1'.*folded into it.*name the batch norm"):
        objective_of(Student(made("cnn")), images, inner=inner)


# --- promises


def integers(student: Student, images: Tensor) -> dict[tuple[int, ...], Tensor]:
    graph = quantized_reference(student.edits, student.module, (images[:2],), SHAPES)
    assert graph is not None
    return {
        tuple(t.shape): t
        for t in graph.state_dict().values()
        if t.dtype == torch.int8 and t.dim() > 1
    }


def test_masked_weights_stay_zero(images, run):
    network = made("cnn")
    masks = {}
    for path in ("conv1.weight", "conv2.weight", "head.weight"):
        weight = network.get_parameter(path)
        masks[path] = torch.rand_like(weight) > 0.6
        weight.data *= masks[path]
    small = aware(Student(network).edited(Masked(masks)), images, run)
    small.check()
    found = integers(small, images)
    for mask in masks.values():
        assert not found[tuple(mask.shape)][~mask].any()


def test_a_codebook_does_not_grow(images, run):
    network = made("cnn")
    edit, _ = share_weights(network, 3, [])
    small = aware(Student(network).edited(edit), images, run, freeze=0.5)
    small.check()
    for path in edit.assignments:
        shape = tuple(network.get_parameter(path).shape)
        assert len(integers(small, images)[shape].abs().unique()) <= 8


def test_modes_and_the_network_are_left_alone(images):
    network = made("cnn").train()
    network.bn1.eval()
    before = copy.deepcopy(network.state_dict())
    objective = objective_of(Student(network), images)
    stand_in = objective.judged(network)
    with torch.no_grad():
        stand_in.eval()(images)
    assert network.training and not network.bn1.training and network.drop.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    owned = {id(p) for p in objective.parameters()}
    assert not owned & {id(p) for p in network.parameters()}


# --- what can't be


def test_what_cannot_be_is_refused(images, monkeypatch):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branching"):
        objective_of(Student(Branching().eval()), images)
    with pytest.raises(UsageError, match="share of the epochs"):
        objective_of(Student(made("cnn")), images, freeze=1.0)
    objective = objective_of(Student(made("cnn")), images)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="one process"):
        objective.start_epoch(0, 4)


# --- what it is for


def trained(digits, network: nn.Module) -> nn.Module:
    training = Training.model_validate({"epochs": 8, **FAST, "optimizer": {"lr": 0.01}})
    kwargs = {"data": digits, "task": TASK, "training": training}
    train(network, objective=TaskObjective(TASK), **kwargs)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_training_regains_what_few_bits_lose(name, digits, images, run):
    network = trained(digits, made(name))
    scheme = Scheme(weight_bits=2, observer="minmax")
    plain = quantize(
        Student(network), scheme, [(images,)], example=(images[:2],), dynamic_shapes=SHAPES
    )
    lost, whole = judged(plain, images, run), run.evaluate(network)
    assert lost < whole - 0.1
    at = replace(run, teacher=copy.deepcopy(network))
    small = aware(Student(network), images, at, epochs=6, scheme=scheme)
    assert judged(small, images, run) > lost + 0.5 * (whole - lost)


def judged(student: Student, images: Tensor, run: Context) -> float:
    """The exported graph's accuracy on validation."""
    batch = next(run.data.validation.batches(1000))
    return float((answers(student, batch.inputs).argmax(1) == batch.targets).double().mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_alone_learn_to_live_in_two_bits(name, digits, run):
    network = trained(digits, made(name))
    training = Training.model_validate({"epochs": 8, **FAST, "optimizer": {"lr": 0.01}})
    kwargs = {"data": digits, "task": TASK, "training": training}
    objective = OnLearnedGrid(TaskObjective(TASK), network, bits=2)
    before = run.evaluate(objective.judged(network))
    train(network, objective=objective, **kwargs)
    after = run.evaluate(objective.judged(network))
    assert after > before + 0.1
    rebuilt = copy.deepcopy(network)
    scales = objective.scales()
    assert scales.keys() == layer_weights(network).keys()
    for path, scale in scales.items():
        weight = rebuilt.get_parameter(path)
        shaped = scale.reshape(-1, *[1] * (weight.dim() - 1))
        weight.data = (weight.data / shaped).round().clamp(-2, 1) * shaped
    assert run.evaluate(rebuilt) == after, "the scales handed back are not those trained"


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_stored_in_four_bits_is_what_was_trained(name, images):
    network = made(name)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    traced = {"example": (images[:2],), "dynamic_shapes": SHAPES}
    weights = quantize_weights(Student(network), "int4", **traced).edits[-1].weights
    objective = OnLearnedGrid(TaskObjective(TASK), network, bits=4, weights=weights)
    stored = quantize_weights(Student(network), "int4", grids=objective.scales(), **traced)
    graph = stored.edits[-1].graph(network, (images[:2],), SHAPES)
    with torch.no_grad():
        expected = objective.judged(network.eval())(images)
        torch.testing.assert_close(graph(images), expected, atol=1e-4, rtol=1e-4)


def test_a_grid_for_a_whole_weight_has_one_step():
    network = made("cnn")
    objective = OnLearnedGrid(TaskObjective(TASK), network, per_tensor={"conv2.weight"})
    shapes = {path: tuple(scale.shape) for path, scale in objective.scales().items()}
    assert shapes == {"conv1.weight": (8,), "conv2.weight": (), "head.weight": (10,)}


@pytest.mark.parametrize("wrap", [OnGrid, lambda inner: inner], ids=["on-grid", "plain"])
def test_features_reach_a_network_on_its_grid(
    wrap: Callable[[Any], Any], digits, tmp_path: Path
) -> None:
    criterion = criteria.get("feature")(layers=["bn2"])
    teacher = Teacher(made("cnn", seed=1), TASK, layers=criterion.teacher_layers)
    inner = DistillObjective(TASK, teacher, {"feature": criterion})
    network, batch = made("cnn"), next(digits.train.batches(8))
    inner.prepare(network, batch)
    terms = wrap(inner)(network.train(), batch)
    assert np.isfinite(float(terms["feature"].detach()))
