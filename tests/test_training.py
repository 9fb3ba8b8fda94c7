"""A training ends with the same weights however often it was stopped, and says what went wrong."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from attar.data import DataConfig, load_data
from attar.errors import CheckpointError, StorageError, TrainingError
from attar.events import Log, several
from attar.tasks.base import Metric
from attar.tasks.image_classification import ImageClassification
from attar.training.checkpoint import load_checkpoint_state, save_checkpoint
from attar.training.config import Optimizer, Schedule, Training
from attar.training.evaluation import evaluating, outputs_of, statistics_of
from attar.training.loop import augmentation_seed, make_optimizer, train
from attar.training.objective import TaskObjective
from attar.training.schedules import rate_factor

HERE = Path(__file__).parent
SGD = {"name": "sgd", "lr": 0.1}
ADAMW = {"name": "adamw", "lr": 0.01}
PLAIN_SGD = {"name": "sgd", "lr": 0.1, "momentum": 0, "weight_decay": 0}
STEADY = {"name": "constant", "warmup": 0}
TASK = ImageClassification()


class Stopped(Exception):
    """What stands for Ctrl-C or a crash."""


class WithAdapter(TaskObjective):
    """An objective with weights of its own, as feature distillation has."""

    def __init__(self) -> None:
        super().__init__(TASK)
        torch.manual_seed(1)
        self.adapter = nn.Linear(10, 10)

    def forward(self, model, batch):
        logits = model(batch.inputs)
        wanted = F.one_hot(batch.targets, 10).float()
        return {
            "task": TASK.loss(logits, batch),
            "adapter": F.mse_loss(self.adapter(logits), wanted),
        }


def make_data():
    """64 digits to learn from, randomly cropped."""
    return load_data(
        DataConfig.model_validate(
            {
                "source": "digits",
                "subset": 64,
                "augment": [{"random_crop": {"size": 8, "padding": 1}}],
            }
        )
    )


def make_net() -> nn.Module:
    """Convolution, running statistics and chance: what makes resuming hard."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def make_linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fit(net, data, *, objective=None, task=TASK, settings=None, **arguments):
    """Trains for 4 epochs of 4 steps, or as `settings` say; the history."""
    given = {"epochs": 4, "batch_size": 16, "optimizer": SGD, "precision": "float32"}
    return train(
        net,
        data=data,
        task=task,
        training=Training.model_validate(given | (settings or {})),
        objective=objective or TaskObjective(task),
        **arguments,
    )


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_other(a, b) -> None:
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def data():
    return make_data()


# --- stopped and resumed


def stop_while_told():
    def tell(event):
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise Stopped

    return {"tell": tell}


def stop_between_epochs():
    def on_epoch(module, epoch):
        if epoch == 2:
            raise Stopped

    return {"on_epoch": on_epoch}


def stop_within_an_epoch():
    steps = []

    def after_step(module):
        steps.append(0)
        if len(steps) == 10:
            raise Stopped

    return {"after_step": after_step}


@pytest.mark.parametrize("stop", [stop_while_told, stop_between_epochs, stop_within_an_epoch])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("ema", [0, 0.7], ids=["weights", "average"])
def test_a_stopped_training_goes_on_to_the_same_weights(data, tmp_path, stop, optimizer, ema):
    settings = {"optimizer": optimizer, "ema": ema}
    undisturbed, whole = make_net(), WithAdapter()
    history = fit(undisturbed, data, objective=whole, settings=settings)

    place = tmp_path / "train.pt"
    begun = {"objective": WithAdapter(), "settings": settings, "checkpoint": place}
    with pytest.raises(Stopped):
        fit(make_net(), data, **begun, **stop())
    resumed, rest = make_net(), WithAdapter()
    again = fit(resumed, data, objective=rest, settings=settings, checkpoint=place)

    assert_same(weights(resumed), weights(undisturbed))
    assert_same(weights(rest), weights(whole))
    untimed = [[{**epoch, "seconds": 0} for epoch in told] for told in (again, history)]
    assert untimed[0] == untimed[1]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_training as t
steps = []
def after_step(module):
    steps.append(0)
    if len(steps) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
t.fit(t.make_net(), t.make_data(), checkpoint=t.Path(sys.argv[2]), after_step=after_step)
"""


def test_a_killed_process_resumes_to_the_same_weights(data, tmp_path):
    place = tmp_path / "train.pt"
    command = [sys.executable, "-c", KILLED, str(HERE), str(place)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint_state(place)["epoch"] == 2

    resumed, undisturbed = make_net(), make_net()
    fit(resumed, data, checkpoint=place)
    fit(undisturbed, data)
    assert_same(weights(resumed), weights(undisturbed))


def test_a_finished_training_is_not_repeated(data, tmp_path):
    net, again, steps = make_net(), make_net(), []
    history = fit(net, data, checkpoint=tmp_path / "train.pt")
    known = fit(again, data, checkpoint=tmp_path / "train.pt", after_step=steps.append)
    assert not steps and known == history
    assert_same(weights(again), weights(net))


def test_what_on_epoch_draws_is_the_same_after_resuming(data, tmp_path):
    def drawn(stop_at=None):
        draws = {}

        def on_epoch(module, epoch):
            if epoch == stop_at:
                raise Stopped
            draws[epoch] = torch.rand(3).tolist()

        return draws, on_epoch

    undisturbed, draw = drawn()
    fit(make_net(), data, on_epoch=draw)
    _, stopping = drawn(stop_at=2)
    with pytest.raises(Stopped):
        fit(make_net(), data, checkpoint=tmp_path / "train.pt", on_epoch=stopping)
    resumed, draw = drawn()
    fit(make_net(), data, checkpoint=tmp_path / "train.pt", on_epoch=draw)
    assert resumed == {epoch: undisturbed[epoch] for epoch in (2, 3)}


@pytest.mark.parametrize("change", [{"seed": 1}, {"label": "recover"}])
def test_seed_and_label_decide_chance(data, change):
    net, same, other = make_net(), make_net(), make_net()
    fit(net, data)
    torch.rand(5)  # what else draws random numbers doesn't matter
    fit(same, data)
    fit(other, data, **change)
    assert_same(weights(net), weights(same))
    assert_other(weights(net), weights(other))


def test_every_epoch_visits_all_examples_in_another_order(data):
    visited: list[int] = []

    class Noting(TaskObjective):
        def forward(self, model, batch):
            visited.extend(batch.indices.tolist())
            return super().forward(model, batch)

    fit(make_linear(), data, objective=Noting(TASK), settings={"epochs": 3})
    epochs = [visited[i : i + 64] for i in (0, 64, 128)]
    assert [sorted(order) for order in epochs] == [list(range(64))] * 3
    assert len({tuple(order) for order in epochs}) == 3


# --- checkpoints


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the disk can't be full")
def test_a_full_disk_is_said_and_keeps_the_old_checkpoint(data, tmp_path):
    place = tmp_path / "train.pt"

    def fill_disk(module, epoch):
        if epoch == 2:
            place.with_suffix(".part").symlink_to("/dev/full")

    with pytest.raises(StorageError, match=r"no room .*train\.pt.*free some space"):
        fit(make_net(), data, checkpoint=place, on_epoch=fill_disk)
    assert load_checkpoint_state(place)["epoch"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["train.pt"]

    resumed, undisturbed = make_net(), make_net()
    fit(resumed, data, checkpoint=place)
    fit(undisturbed, data)
    assert_same(weights(resumed), weights(undisturbed))


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    place = tmp_path / "train.pt"
    save_checkpoint({"epoch": 1}, place)

    def half(state, file):
        file.write(b"half")
        raise Stopped

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Stopped):
        save_checkpoint({"epoch": 2}, place)
    assert load_checkpoint_state(place) == {"epoch": 1}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "cut"])
def test_a_damaged_checkpoint_is_named(data, tmp_path, content):
    place = tmp_path / "train.pt"
    save_checkpoint({"step": make_net().state_dict()}, place)
    place.write_bytes(place.read_bytes()[:700] if content is None else content)
    with pytest.raises(CheckpointError, match=r"train\.pt is damaged .*delete it"):
        fit(make_net(), data, checkpoint=place)


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.unlink, (self.victim,))


def test_a_hostile_checkpoint_is_refused_and_not_run(data, tmp_path):
    victim = tmp_path / "precious"
    victim.touch()
    torch.save({"step": Hostile(victim)}, tmp_path / "train.pt")
    with pytest.raises(CheckpointError):
        fit(make_net(), data, checkpoint=tmp_path / "train.pt")
    assert victim.exists()


@pytest.mark.parametrize(
    ("net", "settings"),
    [(make_linear, {}), (make_net, {"epochs": 6}), (make_net, {"optimizer": ADAMW})],
    ids=["network", "epochs", "optimizer"],
)
def test_another_trainings_checkpoint_is_refused(data, tmp_path, net, settings):
    fit(make_net(), data, checkpoint=tmp_path / "train.pt")
    with pytest.raises(CheckpointError, match=r"train\.pt is another training's .*delete it"):
        fit(net(), data, settings=settings, checkpoint=tmp_path / "train.pt")


# --- what is kept


def visit(*states):
    """At each epoch's start, the network becomes one of these; training leaves it almost so."""

    def on_epoch(module, epoch):
        module.load_state_dict(states[epoch])

    return on_epoch


ALMOST_STILL = {"optimizer": PLAIN_SGD | {"lr": 1e-9}, "epochs": 3}


@pytest.fixture(scope="module")
def states(data):
    """A network that knows little, one that knows most, and one that knows nothing."""
    little = weights(make_linear())
    net = make_linear()
    fit(net, data, settings={"optimizer": {"lr": 0.05}, "epochs": 12})
    return little, weights(net), {k: torch.zeros_like(v) for k, v in net.state_dict().items()}


class ErrorRate(ImageClassification):
    """The share of wrong answers: less is better."""

    def __init__(self) -> None:
        self.metric = Metric("error", "fraction", higher_is_better=False)

    def value(self, statistics):
        return 1 - super().value(statistics)


@pytest.mark.parametrize("task", [TASK, ErrorRate()], ids=["accuracy", "error"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_epoch(data, states, task, keep):
    net = make_linear()
    settings = {**ALMOST_STILL, "keep": keep}
    history = fit(net, data, task=task, settings=settings, on_epoch=visit(*states))
    assert [epoch["best"] for epoch in history] == [True, True, False]
    torch.testing.assert_close(weights(net), states[1 if keep == "best" else 2], rtol=0, atol=1e-6)
    value = task.value(statistics_of(net, data.validation, task))
    assert value == history[1 if keep == "best" else 2]["metric"]["value"]


class UnknownAtFirst(ImageClassification):
    """A metric that the first epoch's answers don't define, such as a correlation."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def value(self, statistics):
        self.asked += 1
        return math.nan if self.asked in (1, 3) else super().value(statistics)


def test_a_metric_that_is_no_number_never_wins(data, states):
    net = make_linear()
    task = UnknownAtFirst()
    history = fit(net, data, task=task, settings=ALMOST_STILL, on_epoch=visit(*states))
    assert [epoch["best"] for epoch in history] == [True, True, False]
    torch.testing.assert_close(weights(net), states[1], rtol=0, atol=1e-6)


def test_the_average_of_the_weights_is_kept(data):
    settings = {"optimizer": PLAIN_SGD, "schedule": STEADY, "epochs": 1, "ema": 0.5}
    seen = []
    net = make_linear()
    fit(net, data, settings=settings, after_step=lambda module: seen.append(weights(module)))
    for name, value in weights(net).items():
        average = seen[0][name]
        for state in seen[1:4]:
            average = 0.5 * average + 0.5 * state[name]
        torch.testing.assert_close(value, average)


def test_the_average_keeps_the_promises_that_after_step_keeps(data):
    """Half of the weights become zero in epoch 2: an average would remember what they were."""
    zero = torch.zeros(10, 64, dtype=torch.bool)

    def on_epoch(module, epoch):
        zero[:, ::2] = epoch >= 1

    def after_step(module):
        with torch.no_grad():
            module[1].weight.masked_fill_(zero, 0)

    net = make_linear()
    settings = {"ema": 0.9, "epochs": 2, "keep": "last"}
    fit(net, data, settings=settings, on_epoch=on_epoch, after_step=after_step)
    assert not net[1].weight[zero].any() and net[1].weight[~zero].all()


def test_a_trained_network_is_handed_back_tidy(data):
    net = make_net()
    fit(net, data, settings={"epochs": 1})
    assert not any(m.training for m in net.modules())
    assert all(p.is_contiguous() and p.grad is None for p in net.parameters())


def test_adapters_are_trained_and_left_behind(data):
    net, objective = make_net(), WithAdapter()
    keys, before = net.state_dict().keys(), weights(objective)
    history = fit(net, data, objective=objective, settings={"epochs": 1})
    assert_other(weights(objective), before)
    assert net.state_dict().keys() == keys
    assert set(history[0]["terms"]) == {"task", "adapter"}
    assert history[0]["loss"] == pytest.approx(sum(history[0]["terms"].values()))


# --- steps


def test_hooks_are_called_around_every_step(data):
    calls = []

    def before(module):
        calls.append(("before", weights(module), module[1].weight.grad is not None))

    def after(module):
        calls.append(("after", weights(module), module[1].weight.grad is not None))

    fit(make_linear(), data, settings={"epochs": 1}, before_step=before, after_step=after)
    assert [name for name, _, _ in calls] == ["before", "after"] * 4
    for (_, old, gradient), (_, new, left) in zip(calls[::2], calls[1::2], strict=True):
        assert gradient and not left
        assert_other(old, new)
    for (_, new, _), (_, old, _) in zip(calls[1:-1:2], calls[2::2], strict=True):
        assert_same(new, old)


def test_before_step_may_hold_weights_still(data):
    def before(module):
        module[1].weight.grad.zero_()

    net = make_linear()
    start = weights(net)
    fit(net, data, settings={"optimizer": PLAIN_SGD, "epochs": 1}, before_step=before)
    assert torch.equal(net[1].weight, start["1.weight"])
    assert not torch.equal(net[1].bias, start["1.bias"])


def step_lengths(data, **settings) -> list[float]:
    """How far each step of plain SGD at rate 0.1 moves all weights together."""
    net = make_linear()
    path = [torch.cat([p.detach().flatten() for p in net.parameters()])]

    def after(module):
        path.append(torch.cat([p.detach().flatten() for p in module.parameters()]))

    settings = {"optimizer": PLAIN_SGD, "schedule": STEADY, "epochs": 1, **settings}
    fit(net, data, settings=settings, after_step=after)
    return [float((b - a).norm()) for a, b in pairwise(path)]


def test_clipping_bounds_the_gradient(data):
    free, clipped = step_lengths(data), step_lengths(data, clip=0.5)
    assert min(free) > 0.1 * 0.5
    assert clipped == pytest.approx([0.1 * 0.5] * 4, rel=1e-3)
    assert step_lengths(data, clip=1000) == pytest.approx(free)


def test_every_step_counts_from_the_first(data):
    """Even a training of one step learns; a warm-up doesn't start from nothing."""
    one = {"epochs": 1, "batch_size": 64, "optimizer": SGD}
    net = make_linear()
    start = weights(net)
    fit(net, data, settings=one)
    assert_other(weights(net), start)
    lengths = step_lengths(data, schedule={"name": "cosine", "warmup": 0.5})
    assert all(length > 0 for length in lengths)


def test_label_smoothing_reaches_the_loss(data):
    net, batch = make_linear(), data.validation.pick(range(8))
    logits = net(batch.inputs)
    term = TaskObjective(TASK, 0.2)(net, batch)["task"]
    torch.testing.assert_close(term, F.cross_entropy(logits, batch.targets, label_smoothing=0.2))
    assert not torch.allclose(term, F.cross_entropy(logits, batch.targets))


def test_bfloat16_runs_in_the_process_that_ran_float32(data):
    exact, coarse = make_net(), make_net()
    fit(exact, data)
    history = fit(coarse, data, settings={"precision": "bfloat16"})
    assert all(p.dtype == torch.float32 for p in coarse.parameters())
    assert all(math.isfinite(epoch["loss"]) for epoch in history)
    assert_other(weights(exact), weights(coarse))
    for a, b in zip(exact.parameters(), coarse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


class Pulling(WithAdapter):
    """Terms that pull at the network through an adapter, little, and not at all."""

    def forward(self, model, batch):
        terms = super().forward(model, batch)
        own = sum(p.square().sum() for p in self.adapter.parameters())
        return {**terms, "own": own, "constant": torch.ones(())}


def test_an_epoch_tells_the_norm_of_each_terms_gradient(data):
    """At the only step of the first epoch, it is the gradient of the network as it was."""
    told: list = []
    fit(
        make_linear(),
        data,
        objective=Pulling(),
        settings={"epochs": 1, "batch_size": 64},
        tell=told.append,
    )
    net, objective = make_linear(), Pulling()
    # all examples: whatever their order and augmentation, what was seen is drawn again
    (batch,) = data.train.batches(
        64, shuffle=True, augment=True, seed=augmentation_seed(0, "train"), epoch=0
    )
    for name in ("task", "adapter"):
        net.zero_grad()
        objective(net, batch)[name].backward()
        flat = torch.cat([p.grad.flatten() for p in net.parameters()])
        norm = told[-1]["gradients"][name]
        assert norm == pytest.approx(float(flat.norm()), rel=1e-5) and norm > 0
    assert told[-1]["gradients"]["own"] == told[-1]["gradients"]["constant"] == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_looking_at_gradients_changes_no_weight(data, monkeypatch, precision):
    settings = {"epochs": 2, "precision": precision, "clip": 0.5, "ema": 0.5}
    looked, objective = make_net(), Pulling()
    seen = fit(looked, data, objective=objective, settings=settings)
    monkeypatch.setattr("attar.training.loop.term_norms", lambda terms, parameters: {})
    blind, other = make_net(), Pulling()
    unseen = fit(blind, data, objective=other, settings=settings)
    assert all("gradients" in epoch for epoch in seen)
    assert not any("gradients" in epoch for epoch in unseen)
    assert_same(weights(looked), weights(blind))
    assert_same(weights(objective), weights(other))


def test_one_term_has_no_gradient_to_compare(data):
    assert not any("gradients" in epoch for epoch in fit(make_linear(), data))


def test_a_graph_that_refuses_to_be_gone_through_twice_trains_all_the_same(data):
    """As compiled networks and some checkpointed ones do: by a RuntimeError, at the gradient."""

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                raise RuntimeError("this graph can't be kept")
            return gradient

    class Reluctant(WithAdapter):
        def forward(self, model, batch):
            terms = super().forward(model, batch)
            return {**terms, "task": Plain.apply(terms["task"])}

    net, like = make_net(), make_net()
    history = fit(net, data, objective=Reluctant())
    fit(like, data, objective=WithAdapter())
    assert not any("gradients" in epoch for epoch in history)
    assert_same(weights(net), weights(like))


def test_a_loss_that_is_no_number_says_what_helps(data, tmp_path):
    place = tmp_path / "train.pt"

    def ruin(module, epoch):
        if epoch == 1:
            nn.init.constant_(module[1].bias, math.nan)

    with pytest.raises(TrainingError) as caught:
        fit(make_linear(), data, checkpoint=place, on_epoch=ruin, label="recover")
    said = str(caught.value)
    assert "\n" not in said and said.startswith("recover: the loss became nan in epoch 2")
    assert all(cure in said for cure in ("optimizer.lr is 0.1", "clip: 1.0", "schedule.warmup"))
    assert load_checkpoint_state(place)["epoch"] == 1


def test_a_rate_far_too_high_is_a_training_error(data):
    with pytest.raises(TrainingError, match="lower learning rate"):
        fit(make_linear(), data, settings={"optimizer": PLAIN_SGD | {"lr": 1e38}})


class Repeated:
    """A split whose batches come `times` over, as a person's own sampler may do."""

    def __init__(self, split, times: int) -> None:
        self._split, self._times = split, times

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, *arguments, **options):
        for _ in range(self._times):
            yield from self._split.batches(*arguments, **options)


def test_no_batch_is_a_training_error(data):
    with pytest.raises(TrainingError, match="no batch"):
        fit(make_linear(), replace(data, train=Repeated(data.train, 0)))


def test_more_batches_than_examples_promise_never_turn_the_rate_around(data):
    schedule = {"name": "linear", "warmup": 0}
    longer = replace(data, train=Repeated(data.train, 3))
    history = fit(make_linear(), longer, settings={"schedule": schedule})
    rates = [epoch["lr"] for epoch in history]
    assert rates == sorted(rates, reverse=True) and rates[-1] >= 0


def test_optimizers_are_what_the_recipe_says():
    parameters = [nn.Parameter(torch.zeros(2))]
    sgd = make_optimizer(parameters, Optimizer(name="sgd", lr=0.3, momentum=0.8, weight_decay=0.01))
    (group,) = sgd.param_groups
    assert type(sgd) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert group["nesterov"]
    adamw = make_optimizer(parameters, Optimizer(name="adamw", lr=0.3, weight_decay=0.01))
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.3, 0.01)


# --- schedules

names = st.sampled_from(["cosine", "constant", "steps", "linear"])
shares = st.floats(0, 1, exclude_max=True)


@given(names, shares, st.floats(0, 1))
def test_rates_stay_within_the_base_rate(name, warmup, progress):
    assert 0 <= rate_factor(Schedule(name=name, warmup=warmup), progress) <= 1


@given(names, st.floats(0.01, 0.9), st.floats(0, 1, exclude_max=True))
def test_warm_up_is_linear(name, warmup, share):
    assert rate_factor(Schedule(name=name, warmup=warmup), share * warmup) == pytest.approx(share)


@given(st.floats(0, 0.9), st.floats(0, 1))
def test_schedules_follow_their_formulas(warmup, share):
    progress = min(1.0, warmup + share * (1 - warmup))

    def factor(name, **options):
        return rate_factor(Schedule(name=name, warmup=warmup, **options), progress)

    assert factor("cosine") == pytest.approx(math.cos(math.pi * share / 2) ** 2, abs=1e-6)
    assert factor("linear") == pytest.approx(1 - share, abs=1e-6)
    assert factor("constant") == 1
    milestones = [0.25, 0.95]
    fallen = np.searchsorted(milestones, progress, side="right")
    assert factor("steps", milestones=milestones, factor=0.5) == 0.5**fallen


def test_the_loop_follows_the_schedule(data):
    schedule = Schedule(name="cosine", warmup=0.25)
    history = fit(make_linear(), data, settings={"schedule": schedule.model_dump()})
    middles = [(4 * epoch + 3.5) / 16 for epoch in range(4)]  # of each epoch's last step
    expected = [SGD["lr"] * rate_factor(schedule, middle) for middle in middles]
    assert [epoch["lr"] for epoch in history] == pytest.approx(expected)
    assert history[-1]["lr"] < 0.02 * SGD["lr"]


# --- evaluation


def modes(net: nn.Module) -> list[bool]:
    return [m.training for m in net.modules()]


def test_evaluating_gives_every_submodule_its_mode_back():
    net = make_net().train()
    net[1].eval()  # frozen statistics, as for fine-tuning
    before = modes(net)
    with pytest.raises(Stopped), evaluating(net):
        assert not any(modes(net)) and not torch.is_grad_enabled()
        raise Stopped
    assert modes(net) == before and torch.is_grad_enabled()


def test_reading_outputs_leaves_the_caller_as_it_was(data):
    net = make_net().train()
    before = modes(net)
    stream = outputs_of(net, data.validation, TASK, batch_size=16)
    logits, batch = next(stream)
    assert modes(net) == before and torch.is_grad_enabled()
    assert logits.shape == (16, 10) and batch.indices.tolist() == list(range(16))


def test_outputs_do_not_depend_on_the_batch_size(data):
    net = make_net().eval()
    at_once = statistics_of(net, data.validation, TASK)
    assert len(at_once) == len(data.validation)
    np.testing.assert_allclose(
        at_once, statistics_of(net, data.validation, TASK, batch_size=7), rtol=1e-5, atol=1e-6
    )


class Remembering(nn.Module):
    """Keeps what its first forward computed, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.full((64,), 0.5) * 2
        return self.linear(x.flatten(1) * self.scale)


def test_what_a_network_remembers_from_evaluation_can_be_trained_with(data):
    net = Remembering()
    statistics_of(net, data.validation, TASK)
    start = weights(net)
    fit(net, data, settings={"epochs": 1})
    assert_other(weights(net), start)


# --- events


def test_epochs_are_told_and_logged(data, tmp_path):
    told, log = [], Log(tmp_path / "log.jsonl")
    tell = several(told.append, log)
    tell({"event": "step", "loss": 1.0})
    history = fit(make_linear(), data, settings={"epochs": 2}, tell=tell, label="teacher")
    epochs = [event for event in told if event["event"] == "epoch"]
    assert [{k: e[k] for k in history[0]} for e in epochs] == history
    for number, event in enumerate(epochs, start=1):
        assert (event["label"], event["epoch"], event["epochs"]) == ("teacher", number, 2)
        metric = event["metric"]
        assert (metric["name"], metric["unit"]) == ("accuracy", "fraction")
        assert 0 <= metric["value"] <= 1
        assert event["seconds"] >= 0 and event["eta_s"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == epochs


# --- several processes

SHARED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import test_training as t
results = {}
torch.manual_seed(int(os.environ.get("RANK", 0)))
for name, make in {"linear": t.make_linear, "net": t.make_net}.items():
    net, objective = make(), t.WithAdapter()
    if os.environ.get("RANK") == "1":
        net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})  # of no consequence
    history = t.fit(net, t.make_data(), objective=objective, settings={"ema": 0.5})
    kept = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history]
    results[name] = (net.state_dict(), objective.state_dict(), kept)
torch.save(results, sys.argv[2] + os.environ.get("RANK", "alone"))
"""


@pytest.mark.long
def test_two_processes_train_one_network(data, tmp_path):
    program = tmp_path / "shared.py"
    program.write_text(SHARED)
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, "-m", *launch, str(program), str(HERE), str(tmp_path / "rank")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    for name in ("linear", "net"):
        for one, other in zip(first[name][:2], second[name][:2], strict=True):
            assert_same(one, other)
        assert first[name][2] == second[name][2]

    alone, objective = make_linear(), WithAdapter()
    fit(alone, data, objective=objective, settings={"ema": 0.5})
    torch.testing.assert_close(first["linear"][0], weights(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["linear"][1], weights(objective), rtol=1e-4, atol=1e-5)
