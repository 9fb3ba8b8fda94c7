"""What each pruning criterion scores, held to its paper's formula, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from attar.data.base import Batch
from attar.errors import UsageError
from attar.pipeline.sensitivity import sensitivity_of
from attar.prune import (
    Call,
    Criterion,
    Widths,
    channel_graph,
    criteria,
    prune_channels,
    prune_weights,
)
from attar.prune.criteria.movement import Movement
from attar.prune.criteria.random import Random
from attar.prune.selection import atom_scores
from attar.prune.sensitivity import sensitivity
from attar.prune.weights import weight_matrices
from attar.recipe import load_recipe
from attar.stages.base import Context
from attar.stages.prune import Prune, calls_of
from attar.student import Student
from run_fixture import write_recipe

BY_GRADIENT = ["fisher", "movement", "taylor"]
CHANNELS = [*BY_GRADIENT, "bn-scale", "geometric-median", "lamp", "random"]
WEIGHTS = [*BY_GRADIENT, "lamp", "random"]
ONE = Widths(1, 1)


class Convolutional(nn.Module):
    """Two convolutions, one with a batch norm of its own statistics, and a linear layer."""

    shape = (6, 2, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 3, 3), nn.Linear(3, 3)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.second(x).tanh().mean((2, 3)))


class Attending(nn.Module):
    """A layer of a transformer between an embedding and a head."""

    shape = (6, 3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def examples(module: Any) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(module.shape, generator=draws, dtype=torch.float64)
    return x, torch.arange(len(x)) % 3


def batches(x: Tensor, y: Tensor, size: int = 2) -> Callable[[], list[Call]]:
    def calls() -> list[Call]:
        pairs = zip(x.split(size), y.split(size), strict=True)
        return [Call((a,), {}, lambda out, b=b: F.cross_entropy(out, b)) for a, b in pairs]

    return calls


def observed(name: str, module: nn.Module, calls: Any) -> Criterion:
    criterion = criteria.get(name)()
    criterion.observe(module, calls)
    return criterion


def slopes(module: nn.Module, calls: Any, scaled: Callable[[float], Any]) -> np.ndarray:
    """Each batch's derivative of the loss by a factor at 1, by central differences."""
    h = 1e-5
    values = []
    for factor in (1 + h, 1 - h):
        with torch.no_grad(), scaled(factor):
            values.append([float(c.loss(module(*c.args, **c.kwargs))) for c in calls()])
    return (np.array(values[0]) - np.array(values[1])) / (2 * h)


@contextmanager
def multiplied(weight: Tensor, where: tuple[Any, ...], factor: float) -> Iterator[None]:
    before = weight[where].clone()
    weight[where] *= factor
    yield
    weight[where] = before


def slices(weight: Tensor, dim: int | None) -> list[tuple[Any, ...]]:
    """The places that one score each is for."""
    if dim is None:
        return list(itertools.product(*map(range, weight.shape)))
    return [(*[slice(None)] * dim, i) for i in range(weight.shape[dim])]


networks = pytest.mark.parametrize("kind", [Convolutional, Attending])


# -- by gradients ---------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_taylor_is_the_mean_square_of_what_a_factor_on_the_weights_does(kind, dim) -> None:
    module = made(kind)
    calls = batches(*examples(module))
    criterion = observed("taylor", module, calls)
    for path, weight in weight_matrices(module).items():
        expected = [
            np.mean(slopes(module, calls, lambda f, w=weight, at=at: multiplied(w, at, f)) ** 2)
            for at in slices(weight, dim)
        ]
        scores = criterion.scores(path, weight.detach(), dim)
        np.testing.assert_allclose(scores.flatten(), expected, rtol=1e-5, atol=1e-9)
        assert scores.shape == (weight.shape if dim is None else (weight.shape[dim],))
        assert max(expected) > 1e-6


@pytest.mark.parametrize(
    ("kind", "path", "channel"),
    [(Convolutional, "second", 1), (Convolutional, "head", -1), (Attending, "block.linear2", -1)],
)
def test_fisher_is_half_the_mean_square_of_what_a_mask_on_the_input_does(
    kind, path, channel
) -> None:
    module = made(kind)
    calls = batches(*examples(module), size=1)
    reader = module.get_submodule(path)

    @contextmanager
    def masked(index: int, factor: float) -> Iterator[None]:
        def scale(_: nn.Module, args: tuple[Tensor]) -> Tensor:
            mask = torch.ones(args[0].shape[channel], dtype=torch.float64)
            mask[index] = factor
            return args[0] * (mask.view(-1, 1, 1) if channel == 1 else mask)

        hook = reader.register_forward_pre_hook(scale)
        yield
        hook.remove()

    expected = [
        np.mean(slopes(module, calls, lambda f, i=i: masked(i, f)) ** 2) / 2
        for i in range(reader.weight.shape[1])
    ]
    scores = observed("fisher", module, calls).scores(f"{path}.weight", reader.weight, 1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-9)
    assert max(expected) > 1e-6


@networks
def test_fisher_of_single_weights_is_the_diagonal_of_the_empirical_fisher(kind) -> None:
    module = made(kind)
    x, y = examples(module)
    criterion = observed("fisher", module, batches(x, y, size=1))
    for path, weight in weight_matrices(module).items():
        diagonal = torch.zeros_like(weight)
        for a, b in zip(x, y, strict=True):
            odds = module(a[None]).log_softmax(1)[0]
            diagonal += torch.autograd.grad(odds[b], weight)[0] ** 2 / len(x)
        expected = weight**2 * diagonal / 2
        scores = criterion.scores(path, weight.detach(), None)
        torch.testing.assert_close(scores, expected.detach(), rtol=1e-9, atol=1e-12)


def test_movement_of_a_linear_layer_is_what_the_formula_gives_by_hand() -> None:
    draws = np.random.default_rng(0)
    w, x, t = draws.normal(size=(3, 4)), draws.normal(size=(2, 5, 4)), draws.normal(size=(2, 5, 3))
    layer = nn.Linear(4, 3, bias=False).double()
    layer.weight.data[:] = torch.tensor(w)
    calls = [
        Call((torch.tensor(a),), {}, lambda out, b=b: (out - torch.tensor(b)).square().mean())
        for a, b in zip(x, t, strict=True)
    ]
    moved = np.zeros_like(w)
    for a, b in zip(x, t, strict=True):
        gradient = 2 / b.size * (a @ w.T - b).T @ a
        moved -= w * gradient
        w = w - 0.1 * gradient
    criterion = Movement(lr=0.1)
    criterion.observe(layer, lambda: calls)
    for dim, expected in ((None, moved), (0, moved.sum(1)), (1, moved.sum(0))):
        scores = criterion.scores("weight", layer.weight.detach(), dim)
        np.testing.assert_allclose(scores, expected - expected.min(), atol=1e-9)


@networks
def test_movement_adds_up_over_steps_of_sgd(kind) -> None:
    module = made(kind)
    calls = batches(*examples(module))
    criterion = observed("movement", module, calls)
    trained = copy.deepcopy(module)
    steps = torch.optim.SGD(trained.parameters(), lr=0.01)
    moved = {path: torch.zeros_like(w) for path, w in trained.named_parameters()}
    for call in calls():
        steps.zero_grad()
        call.loss(trained(*call.args)).backward()
        for path, w in trained.named_parameters():
            moved[path] -= (w * w.grad).detach()
        steps.step()
    for path, weight in weight_matrices(module).items():
        scores = criterion.scores(path, weight.detach(), None)
        torch.testing.assert_close(scores, moved[path] - moved[path].min(), rtol=0, atol=1e-9)
        rows = moved[path].flatten(1).sum(1)
        scores = criterion.scores(path, weight.detach(), 0)
        torch.testing.assert_close(scores, rows - rows.min(), rtol=0, atol=1e-9)


class Restless(Convolutional):
    """Draws at random even in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_the_network_and_the_random_state_are_left_as_they_were(name) -> None:
    module = made(Restless).train()
    module.norm.eval()
    module.first.weight.requires_grad_(False)
    module.head.weight.grad = torch.ones_like(module.head.weight)
    before = copy.deepcopy(module.state_dict())
    parameters = dict(module.named_parameters())
    random = torch.get_rng_state()
    criterion = observed(name, module, batches(*examples(module)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[path]) for path, t in module.state_dict().items())
    assert all(p is parameters[path] for path, p in module.named_parameters())
    assert [path for path, p in module.named_parameters() if not p.requires_grad] == [
        "first.weight"
    ]
    assert [path for path, p in module.named_parameters() if p.grad is not None] == ["head.weight"]
    assert torch.equal(module.head.weight.grad, torch.ones_like(module.head.weight))
    assert [p for p, m in module.named_modules() if not m.training] == ["norm"]
    frozen = criterion.scores("first.weight", module.first.weight, 0)
    assert (frozen > 0).sum() >= len(frozen) - 1


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_network_in_training_is_scored_as_it_answers(name) -> None:
    module = made(Convolutional)
    calls = batches(*examples(module))
    quiet, busy = observed(name, module, calls), observed(name, module.train(), calls)
    for path, weight in weight_matrices(module).items():
        a, b = (c.scores(path, weight.detach(), 0) for c in (quiet, busy))
        assert torch.equal(a, b)


class Tied(nn.Module):
    """One weight under two names."""

    shape = (6, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).tanh()).tanh())


def test_a_shared_weight_has_one_gradient_and_goes_once() -> None:
    module = made(Tied)
    calls = batches(*examples(module))
    criterion = observed("taylor", module, calls)
    weight = module.a.weight
    expected = [
        np.mean(slopes(module, calls, lambda f, at=at: multiplied(weight, at, f)) ** 2)
        for at in slices(weight, 1)
    ]
    for path in ("a.weight", "b.weight"):
        scores = criterion.scores(path, weight.detach(), 1)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-9)
    for name in ("taylor", "random"):
        sparse = prune_weights(
            Student(module), criterion=criteria.get(name)(), ratio=0.25, floor=1, calls=calls
        )
        assert list(sparse.edits[0].masks) == ["a.weight", "head.weight"]
        assert int((sparse.module.b.weight == 0).sum()) == 4


# -- by weights -----------------------------------------------------------------------------------


def lamp_by_the_paper(squares: np.ndarray) -> np.ndarray:
    scores = np.zeros_like(squares)
    for place in np.ndindex(squares.shape):
        scores[place] = squares[place] / squares[squares >= squares[place]].sum()
    return scores


@networks
def test_lamp_is_a_square_over_those_no_smaller(kind) -> None:
    lamp = criteria.get("lamp")()
    for path, weight in weight_matrices(made(kind)).items():
        w = weight.detach().numpy()
        for dim, squares in ((None, w**2), (0, (w**2).reshape(len(w), -1).sum(1))):
            scores = lamp.scores(path, weight.detach(), dim)
            np.testing.assert_allclose(scores, lamp_by_the_paper(squares), atol=1e-12)


def test_lamp_of_equal_weights_counts_them_in_order_and_of_none_is_nothing() -> None:
    lamp = criteria.get("lamp")()
    np.testing.assert_allclose(
        lamp.scores("w", torch.tensor([[2.0, -2.0], [0.0, 1.0]]), None), [[4 / 8, 1], [0, 1 / 9]]
    )
    assert torch.equal(lamp.scores("w", torch.zeros(2, 3), 1), torch.zeros(3, dtype=torch.float64))


@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0.001, 1000))
@settings(max_examples=25, deadline=None)
def test_globally_lamp_compares_layers_as_they_are(seed, ratio, scale) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 30), nn.Linear(30, 2)).double()
    with torch.no_grad():
        module[1].weight *= scale
    sparse = prune_weights(
        Student(module), criterion=criteria.get("lamp")(), ratio=ratio, scope="global", floor=1
    )
    scores = [lamp_by_the_paper(layer.weight.detach().numpy() ** 2) for layer in module]
    every = np.sort(np.concatenate([s.ravel() for s in scores]))
    least = every[int(ratio * len(every))]
    for layer, old, score in zip(sparse.module, module, scores, strict=True):
        np.testing.assert_array_equal((layer.weight != 0).numpy(), score >= least * (1 - 1e-12))
        assert score.max() == 1 and layer.weight.flatten()[old.weight.abs().argmax()] != 0


def test_globally_lamp_compares_channels_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 20), nn.ReLU())
    module = nn.Sequential(*module, nn.Linear(20, 2)).double()
    graph = channel_graph(module, (torch.randn(1, 4, dtype=torch.float64),))
    scores = atom_scores(module, graph, criteria.get("lamp")())
    for place in graph.producers:
        w = module.get_parameter(place.path).detach().numpy()
        np.testing.assert_allclose(scores[place.atoms], lamp_by_the_paper((w**2).sum(1)))


@networks
def test_the_geometric_median_is_near_to_all(kind) -> None:
    criterion = criteria.get("geometric-median")()
    for path, weight in weight_matrices(made(kind)).items():
        w = weight.detach()
        for dim in (0, 1):
            filters = w.movedim(dim, 0).flatten(1).numpy()
            scores = criterion.scores(path, w, dim)
            np.testing.assert_allclose(scores, cdist(filters, filters).sum(1), atol=1e-6)


class Residual(nn.Module):
    """Channels that go through two batch norms, and units that go through none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.plain, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.a(x))
        x = x + self.two(self.b(x.relu()))
        return self.head(self.plain(x.mean((2, 3))).relu())


def test_batch_norms_score_what_goes_through_them_and_size_the_rest() -> None:
    module = made(Residual)
    with torch.no_grad():
        module.one.weight.normal_()
        module.two.weight.normal_().mul_(10)
    graph = channel_graph(module, (torch.randn(1, 2, 5, 5, dtype=torch.float64),))
    scores = atom_scores(module, graph, criteria.get("bn-scale")())
    atoms = {place.layer: place.atoms for place in graph.producers}
    one, two = (np.abs(norm.weight.detach().numpy()) for norm in (module.one, module.two))
    expected = (one / one.mean() + two / two.mean()) / 2
    np.testing.assert_allclose(scores[atoms["a"]], expected)
    np.testing.assert_array_equal(atoms["a"], atoms["b"])
    made_by = module.plain.weight.detach().abs().sum(1).numpy()
    read_by = module.head.weight.detach().abs().sum(0).numpy()
    expected = (made_by / made_by.mean() + read_by / read_by.mean()) / 2
    np.testing.assert_allclose(scores[atoms["plain"]], expected)


def test_without_batch_norms_the_same_goes_as_by_size() -> None:
    module, x = made(Attending).float(), torch.randn(2, 3, 4)
    pruned = [
        prune_channels(Student(module), (x,), criterion=criteria.get(n)(), ratio=0.5, widths=ONE)[0]
        for n in ("bn-scale", "magnitude")
    ]
    a, b = (p.module.block.linear1.weight for p in pruned)
    assert a.shape == (3, pruned[0].module.embed.out_features) and torch.equal(a, b)


# -- by chance ------------------------------------------------------------------------------------


def test_chance_is_the_same_for_the_same_seed_whatever_was_asked_before() -> None:
    w = torch.zeros(50, 40)
    state = torch.get_rng_state()
    first, second = Random(3), Random(3)
    a, b = first.scores("a.weight", w, 0), first.scores("b.weight", w, 0)
    assert torch.equal(second.scores("b.weight", w, 0), b)
    assert torch.equal(second.scores("a.weight", w, 0), a)
    assert not torch.equal(a, b) and not torch.equal(a, Random(4).scores("a.weight", w, 0))
    every = first.scores("a.weight", w, None)
    assert every.shape == w.shape and every.min() >= 0 and every.max() < 1
    assert float(every.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / w.numel()) ** 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_recipes_seed_is_what_chance_goes_by() -> None:
    def kept(seed: int) -> Tensor:
        data = SimpleNamespace(train=Examples())
        run = Context(Judge(), data, None, seed, Path("unused"))
        stage = Prune(criterion="random", granularity="weight", ratio=0.5)
        return stage.apply(Student(made(Convolutional).float()), run).module.second.weight != 0

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))


# -- properties -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_filters_in_another_order_score_the_same(shape, seed, first) -> None:
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draws, dtype=torch.float64)
    dim = 0 if first else 1
    order = torch.randperm(shape[dim], generator=draws)
    for name in ("geometric-median", "lamp", "magnitude", "magnitude-l2", "threshold"):
        criterion = criteria.get(name)()
        scores = criterion.scores("w", weight, dim)
        assert (scores >= 0).all()
        moved = criterion.scores("w", weight.index_select(dim, order), dim)
        torch.testing.assert_close(moved, scores[order], rtol=0, atol=1e-6)


@given(st.permutations(range(5)), st.integers(0, 10**6), st.sampled_from(BY_GRADIENT))
@settings(max_examples=20, deadline=None)
def test_units_in_another_order_score_the_same_by_gradients(order, seed, name) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    turned = copy.deepcopy(module)
    with torch.no_grad():
        turned[0].weight[:], turned[0].bias[:] = module[0].weight[order], module[0].bias[order]
        turned[2].weight[:] = module[2].weight[:, order]
    calls = batches(torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    straight, other = observed(name, module, calls), observed(name, turned, calls)
    for path, dim in (("0.weight", 0), ("2.weight", 1)):
        a = straight.scores(path, module.get_parameter(path).detach(), dim)
        b = other.scores(path, turned.get_parameter(path).detach(), dim)
        torch.testing.assert_close(b, a[order], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "sides"),
    [("fisher", "in"), ("geometric-median", "out"), ("random", "out"), ("taylor", "out in")],
)
def test_a_channel_scores_by_the_weights_that_make_it_or_read_it(name, sides) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    criterion = observed(name, module, batches(x, torch.tensor([0, 1, 2, 1])))
    graph = channel_graph(module, (x[:1],))
    (atoms,) = (p.atoms for p in graph.producers if p.layer == "0")
    ends = {"out": ("0.weight", 0), "in": ("2.weight", 1)}
    parts = []
    for path, dim in (ends[side] for side in sides.split()):
        part = criterion.scores(path, module.get_parameter(path).detach(), dim)
        parts.append(part if criterion.comparable else part / part.mean())
    scores = atom_scores(module, graph, criterion)[atoms]
    np.testing.assert_allclose(scores, sum(parts) / len(parts), rtol=1e-6)


@networks
@pytest.mark.parametrize("name", sorted({*CHANNELS} - {"bn-scale"}))
def test_scores_are_finite_and_not_negative(kind, name) -> None:
    module = made(kind).float()
    x, y = examples(module)
    criterion = observed(name, module, batches(x.float(), y))
    for path, weight in weight_matrices(module).items():
        for dim in (0, 1, None) if "weight" in criterion.granularities else (0, 1):
            shape = weight.shape if dim is None else (weight.shape[dim],)
            scores = criterion.scores(path, weight.detach(), dim)
            assert scores.isfinite().all() and (scores >= 0).all()
            assert scores.shape == shape


# -- whole networks -------------------------------------------------------------------------------


def positive(faint: Callable[[nn.Module], None]) -> nn.Sequential:
    """A network in which every weight pulls the output the same way, some of them faintly."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.8, 1.2)
        faint(module)
    return module


IMAGES = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.5
RISING = [Call((x,), {}, lambda out: -out.mean() / 1e4) for x in IMAGES.split(2)]


@pytest.mark.parametrize("name", CHANNELS)
def test_what_matters_little_goes_from_a_cnn(name) -> None:
    def faint(module: nn.Module) -> None:
        module[0].weight[::2] *= 0.01
        module[1].weight[::2] *= 0.01
        module[3].weight[:, ::2] *= 0.01

    module = positive(faint)
    student, pruned = prune_channels(
        Student(module), (IMAGES,), criterion=criteria.get(name)(), ratio=0.5, widths=ONE,
        calls=lambda: RISING,
    )  # fmt: skip
    assert {k: v for k, v in pruned.widths.items() if v[0] != v[1]} == {"0": (8, 4), "3": (6, 3)}
    assert not pruned.undone and student.module(IMAGES).shape == (4, 2)
    kept = torch.arange(1, 8, 2)
    if name == "random":
        kept = Random().scores("0.weight", module[0].weight, 0).argsort()[4:].sort().values
    assert torch.equal(student.module[0].weight, module[0].weight[kept])


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_of_a_transformer_go(name) -> None:
    module = made(Attending).float()
    x, y = examples(module)
    student, pruned = prune_channels(
        Student(module), (x.float(),), criterion=criteria.get(name)(), ratio=0.5, widths=ONE,
        calls=batches(x.float(), y),
    )  # fmt: skip
    assert pruned.widths["block.linear1"] == (6, 3) and pruned.widths["embed"] == (8, 4)
    assert student.module(x.float()).shape == (6, 3)


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_matter_little_become_zero(name, scope) -> None:
    module = positive(lambda m: [m[i].weight.view(-1)[::2].mul_(0.001) for i in (0, 3, 6)])
    sparse = prune_weights(
        Student(module), criterion=criteria.get(name)(), ratio=0.5, scope=scope,
        calls=lambda: RISING,
    )  # fmt: skip
    zeros = {i: sparse.module[i].weight.flatten() == 0 for i in (0, 3, 6)}
    assert sum(int(z.sum()) for z in zeros.values()) == (72 + 432 + 48) // 2
    if name != "random" and scope == "local":
        assert all(z[::2].all() and not z[1::2].any() for z in zeros.values())
    assert torch.equal(module[3].weight, positive(lambda m: [
        m[i].weight.view(-1)[::2].mul_(0.001) for i in (0, 3, 6)
    ])[3].weight)  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_what_is_masked_already_counts_and_is_not_kept_in_place_of_the_rest(name, scope) -> None:
    module = made(Convolutional).float()
    x, y = examples(module)
    student = Student(module)
    for ratio in (0.3, 0.6):
        student = prune_weights(
            student, criterion=criteria.get(name)(), ratio=ratio, scope=scope, floor=1,
            calls=batches(x.float(), y),
        )  # fmt: skip
    masks = student.edits[0].masks.values()
    assert sum(int((~m).sum()) for m in masks) == (
        sum(int(0.6 * m.numel()) for m in masks)
        if scope == "local"
        else int(0.6 * sum(m.numel() for m in masks))
    )


# -- what has to be handed in ---------------------------------------------------------------------


def ways(module: nn.Module, x: Tensor, name: str, calls: Any) -> list[Callable[[], object]]:
    how: dict[str, Any] = {"criterion": criteria.get(name)(), "calls": calls}
    student = Student(module)
    found = {"evaluate": lambda m: float(m(x).mean()), "ratios": [0.5], **how}
    return [
        lambda: prune_channels(student, (x,), ratio=0.5, **how),
        lambda: prune_weights(student, ratio=0.5, **how),
        lambda: sensitivity(student, (x,), **found),
        lambda: sensitivity(student, (x,), granularity="weight", **found),
    ]


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_without_a_loss_it_is_said_what_to_hand_in(name) -> None:
    module = made(Convolutional)
    x, _ = examples(module)
    for calls in (None, lambda: [((x,), {})], lambda: [Call((x,), {})]):
        for way in ways(module, x, name, calls):
            with pytest.raises(UsageError, match=r"hand in calls of \(args, kwargs, loss\)") as e:
                way()
            assert criteria.get(name).__name__ in str(e.value)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([], "calls gives no batch"),
        ([lambda out: out], "which must be one number"),
        ([lambda out: 0.5], "which must be one number"),
        ([lambda out: out.sum().detach()], "doesn't depend on any weight"),
        ([lambda out: out.sum() * float("nan")], "the loss of a batch is nan"),
    ],
)
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_loss_that_is_none_is_refused(name, calls, said) -> None:
    module = made(Convolutional)
    x, _ = examples(module)
    with pytest.raises(UsageError, match=said):
        observed(name, module, lambda: [((x,), {}, loss) for loss in calls])


def test_a_criterion_that_needs_no_loss_gets_batches_without() -> None:
    class Counting(Criterion):
        needs_data = True
        seen = 0

        def observe(self, module: nn.Module, calls: Any) -> None:
            for args, kwargs in calls():
                module(*args, **kwargs)
                self.seen += len(args[0])

        def scores(self, path: str, weight: Tensor, dim: int | None) -> Tensor:
            return weight.abs()

    module, counting = made(Convolutional), Counting()
    x, y = examples(module)
    prune_weights(Student(module), criterion=counting, ratio=0.5, calls=batches(x, y))
    assert counting.seen == 6


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_sensitivity_takes_what_the_criterion_takes(name, granularity) -> None:
    module = made(Convolutional).float()
    x, y = examples(module)
    x, calls = x.float(), batches(x.float(), y)
    found = sensitivity(
        Student(module), (x,), evaluate=lambda m: float(m(x).square().mean()), ratios=[0.5],
        criterion=criteria.get(name)(), granularity=granularity, calls=calls,
    )  # fmt: skip
    one = next(row for row in found.rows if row.layers == ("second",))
    alone: dict[str, Any] = {"exclude": ["first"], "ratio": 0.5, "calls": calls}
    if granularity == "channel":
        pruned, _ = prune_channels(
            Student(module), (x,), criterion=criteria.get(name)(), widths=ONE, **alone
        )
    else:
        alone["exclude"] += ["head"]
        pruned = prune_weights(Student(module), criterion=criteria.get(name)(), floor=1, **alone)
    with torch.no_grad():
        assert one.cells[0].metric == pytest.approx(float(pruned.module(x).square().mean()))


# -- recipes --------------------------------------------------------------------------------------


class Examples:
    """Images with labels, as a split."""

    def __init__(self, count: int = 1200) -> None:
        self.images = torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(0))

    def batches(self, size: int, **options: Any) -> Iterator[Batch]:
        for at in torch.arange(len(self.images)).split(size):
            yield Batch(self.images[at], at % 3, at)


class Judge:
    """The task of telling them apart."""

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch.inputs,), {}

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch.targets)

    def example(self, data: Any) -> tuple[Tensor, ...]:
        return (data.train.images[:2],)


@pytest.mark.parametrize(("name", "size", "count"), [("taylor", 128, 8), ("fisher", 1, 256)])
def test_the_stage_scores_by_the_tasks_loss_on_training_examples(name, size, count) -> None:
    module = made(Convolutional).float()
    split = Examples()
    given = list(
        calls_of(
            Judge(), SimpleNamespace(train=split), 0, criteria.get(name)(), torch.device("cpu")
        )()
    )
    assert [len(call.args[0]) for call in given] == [size] * count
    losses = [
        Call((x,), {}, lambda out, y=y: F.cross_entropy(out, y))
        for x, y in zip(
            split.images[: size * count].split(size),
            (torch.arange(size * count) % 3).split(size),
            strict=True,
        )
    ]
    run = Context(Judge(), SimpleNamespace(train=split), None, 0, Path("unused"))
    pruned = Prune(criterion=name, ratio=0.5, floor=1, round_to=1).apply(Student(module), run)
    expected, _ = prune_channels(
        Student(module), (split.images[:2],), criterion=criteria.get(name)(), ratio=0.5,
        widths=ONE, calls=lambda: losses,
    )  # fmt: skip
    assert pruned.module.first.out_channels == 2
    for path, tensor in expected.module.state_dict().items():
        assert torch.equal(pruned.module.state_dict()[path], tensor)


def test_the_stage_scores_single_weights_by_the_tasks_loss() -> None:
    module = made(Convolutional).float()
    data = SimpleNamespace(train=Examples(64))
    run = Context(Judge(), data, None, 0, Path("unused"))
    stage = Prune(criterion="taylor", granularity="weight", ratio=0.5)
    pruned = stage.apply(Student(module), run).module
    x, y = data.train.images, torch.arange(64) % 3
    criterion = observed("taylor", module, batches(x, y, size=64))
    scores = criterion.scores("second.weight", module.second.weight, None)
    kept = pruned.second.weight != 0
    assert int(kept.sum()) == kept.numel() // 2 and scores[kept].min() >= scores[~kept].max()


RECIPE = """\
name: scored
data: {source: digits, subset: 300}
teacher: {model: digits-small, train: {epochs: 1, batch_size: 32, optimizer: {lr: 0.01}}}
stages:
  - prune: {ratio: 0.5, criterion: taylor}
"""


def test_attar_sensitivity_scores_by_the_tasks_loss(tmp_path) -> None:
    loaded = load_recipe(write_recipe(tmp_path, RECIPE))
    found = sensitivity_of(loaded, tmp_path / "channels", ratios=[0.5], examples=20)
    assert found["criterion"] == "taylor" and [r["name"] for r in found["rows"]] == [
        "conv1", "conv2", "linear1",
    ]  # fmt: skip
    weights = sensitivity_of(
        loaded, tmp_path / "weights", ratios=[0.5], examples=20, criterion="movement",
        granularity="weight", only=["conv2"],
    )  # fmt: skip
    (one,) = weights["rows"]
    assert one["cells"][0]["removed"] == one["size"] // 2


@pytest.mark.parametrize("name", ["bn-scale", "geometric-median"])
def test_what_scores_channels_is_refused_for_weights(name) -> None:
    with pytest.raises(ValueError, match="scores channels, not single weights"):
        Prune(criterion=name, granularity="weight", ratio=0.5)
    with pytest.raises(UsageError, match="use granularity: channel"):
        prune_weights(Student(made(Convolutional)), criterion=criteria.get(name)(), ratio=0.5)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/recipes.md"])
def test_the_documents_name_every_criterion(page) -> None:
    lines = (Path(__file__).parents[1] / page).read_text(encoding="utf-8").splitlines()
    if page == "docs/recipes.md":
        start = lines.index(next(line for line in lines if line.startswith("| criterion | for |")))
        rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
        named = [row.split("`")[1] for row in rows]
    else:
        (row,) = (line for line in lines if line.startswith("| `prune` | `"))
        named = row.split("`")[3::2]
    own = {n for n in criteria.names() if criteria.get(n).__module__.startswith("attar.")}
    assert sorted(named) == sorted(own)
