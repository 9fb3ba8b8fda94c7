"""Criteria on answers beyond `kd`, against formulas written out in NumPy, and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from attar.data.base import Batch
from attar.distill import Criterion, Signal
from attar.distill.criteria.dist import DIST
from attar.distill.criteria.dkd import DKD
from attar.distill.criteria.jensen_shannon import JensenShannon
from attar.distill.criteria.kd import KD
from attar.distill.criteria.soft_cross_entropy import SoftCrossEntropy
from attar.distill.criteria.teacher_free import TeacherFree
from attar.distill.criteria.top_k import TopK
from attar.errors import UsageError

TOLERANCE = 1e-10
N, CLASSES = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])
Rows = np.ndarray
Formula = Callable[[Rows, Rows, Rows], float]


def logits(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*(shape or (N, CLASSES)), generator=generator, dtype=torch.float64)


def batch(targets: torch.Tensor | None = LABELS) -> Batch:
    return Batch(torch.zeros(N, 1), targets, torch.arange(N))


def softmax(z: Rows) -> Rows:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: Rows, q: Rows) -> float:
    return float((p * (np.log(p) - np.log(q))).sum(-1).mean())


def standard(z: Rows) -> Rows:
    return (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)


def dkd(temperature: float, target: float, others: float) -> Formula:
    def formula(s: Rows, t: Rows, right: Rows) -> float:
        total = 0.0
        for own, wanted, y in zip(
            softmax(s / temperature), softmax(t / temperature), right, strict=True
        ):
            binary = kl(np.array([[wanted[y], 1 - wanted[y]]]), np.array([[own[y], 1 - own[y]]]))
            rest = [np.delete(p, y) / np.delete(p, y).sum() for p in (wanted, own)]
            total += target * binary + others * kl(rest[0][None], rest[1][None])
        return temperature**2 * total / len(s)

    return formula


def dist(temperature: float, inter: float, intra: float) -> Formula:
    def formula(s: Rows, t: Rows, right: Rows) -> float:
        q, p = softmax(s / temperature), softmax(t / temperature)
        rows = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
        columns = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
        return temperature**2 * (inter * np.mean(rows) + intra * np.mean(columns))

    return formula


def jensen_shannon(temperature: float, beta: float) -> Formula:
    def formula(s: Rows, t: Rows, right: Rows) -> float:
        q, p = softmax(s / temperature), softmax(t / temperature)
        m = beta * p + (1 - beta) * q
        between = {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
        return temperature**2 * between

    return formula


def top_k(temperature: float, k: int) -> Formula:
    def formula(s: Rows, t: Rows, right: Rows) -> float:
        rows = []
        for own, wanted in zip(softmax(s / temperature), softmax(t / temperature), strict=True):
            best = np.argsort(-wanted)[:k]
            rows.append(kl(*(np.append(p[best], 1 - p[best].sum())[None] for p in (wanted, own))))
        return temperature**2 * np.mean(rows)

    return formula


def teacher_free(temperature: float, correct: float) -> Formula:
    def formula(s: Rows, t: Rows, right: Rows) -> float:
        u = np.full(s.shape, (1 - correct) / (s.shape[-1] - 1))
        u[np.arange(len(s)), right] = correct
        p = u ** (1 / temperature)
        return temperature**2 * kl(p / p.sum(-1, keepdims=True), softmax(s / temperature))

    return formula


def standardised(inner: Formula) -> Formula:
    return lambda s, t, right: inner(standard(s), standard(t), right)


def softened(temperature: float) -> Formula:
    return lambda s, t, right: (
        temperature**2 * kl(softmax(t / temperature), softmax(s / temperature))
    )


def soft_labels(temperature: float) -> Formula:
    return lambda s, t, right: (
        -(temperature**2)
        * (softmax(t / temperature) * np.log(softmax(s / temperature))).sum(-1).mean()
    )


CRITERIA: list[tuple[Criterion, Formula]] = [
    (DKD(), dkd(4, 1, 8)),
    (DKD(temperature=1.5, target=0.5, others=2), dkd(1.5, 0.5, 2)),
    (DKD(temperature=2, standardize=True), standardised(dkd(2, 1, 8))),
    (DIST(), dist(4, 2, 2)),
    (DIST(temperature=1, inter=1, intra=0.5), dist(1, 1, 0.5)),
    (DIST(temperature=2, standardize=True), standardised(dist(2, 2, 2))),
    (JensenShannon(), jensen_shannon(4, 0.5)),
    (JensenShannon(beta=0.1, temperature=1), jensen_shannon(1, 0.1)),
    (JensenShannon(beta=0, temperature=2), jensen_shannon(2, 0)),
    (JensenShannon(beta=1, temperature=2), jensen_shannon(2, 1)),
    (JensenShannon(beta=0.7, standardize=True), standardised(jensen_shannon(4, 0.7))),
    (TopK(k=2), top_k(4, 2)),
    (TopK(k=1, temperature=1), top_k(1, 1)),
    (TopK(k=2, standardize=True), standardised(top_k(4, 2))),
    (TeacherFree(), teacher_free(20, 0.95)),
    (TeacherFree(correct=0.6, temperature=1), teacher_free(1, 0.6)),
    (KD(temperature=2, standardize=True), standardised(softened(2))),
    (SoftCrossEntropy(standardize=True), standardised(soft_labels(1))),
]


def name(criterion: Any) -> str:
    return type(criterion).__name__ if isinstance(criterion, Criterion) else ""


@pytest.mark.parametrize(("criterion", "formula"), CRITERIA, ids=name)
def test_a_criterion_follows_its_formula(criterion, formula):
    s, t = logits(1), logits(2)
    value = formula(s.numpy(), t.numpy(), LABELS.numpy())
    loss = criterion(Signal(s), Signal(t), batch())
    assert loss.item() == pytest.approx(value, abs=TOLERANCE)
    assert value > 1e-3


@pytest.mark.parametrize(("criterion", "formula"), CRITERIA, ids=name)
def test_its_gradient_is_right(criterion, formula):
    assert torch.autograd.gradcheck(
        lambda s: criterion(Signal(s), Signal(logits(2)), batch()), (logits(1).requires_grad_(),)
    )


@pytest.mark.parametrize(("criterion", "formula"), CRITERIA, ids=name)
def test_a_sequences_positions_count_as_examples(criterion, formula):
    s, t = logits(1, 2, 3, CLASSES), logits(2, 2, 3, CLASSES)
    loss = criterion(Signal(s), Signal(t), batch(LABELS.view(2, 3)))
    value = formula(s.numpy().reshape(6, -1), t.numpy().reshape(6, -1), LABELS.numpy())
    assert loss.item() == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize(("criterion", "formula"), CRITERIA, ids=name)
def test_half_precision_is_compared_in_single(criterion, formula):
    s, t = logits(1).bfloat16(), logits(2).bfloat16()
    loss = criterion(Signal(s), Signal(t), batch())
    assert loss.dtype == torch.float32
    value = formula(s.double().numpy(), t.double().numpy(), LABELS.numpy())
    assert loss.item() == pytest.approx(value, rel=1e-4)


MATCHING = [
    KD(standardize=True),
    DKD(),
    DIST(),
    TopK(k=2),
    *(JensenShannon(beta=b) for b in (0, 0.5, 1)),
]


@pytest.mark.parametrize("criterion", MATCHING, ids=name)
def test_equal_answers_cost_nothing_and_pull_nowhere(criterion):
    s = logits(1).requires_grad_()
    loss = criterion(Signal(s), Signal(s.detach().clone()), batch())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-7


@pytest.mark.parametrize("criterion", [one for one, _ in CRITERIA], ids=name)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_extreme_logits_give_numbers(criterion, scale):
    s = (logits(1) * scale).float().requires_grad_()
    loss = criterion(Signal(s), Signal((logits(2) * scale).float()), batch())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all()


@pytest.mark.parametrize("criterion", [one for one, _ in CRITERIA], ids=name)
def test_two_classes_are_enough(criterion):
    s = logits(1, N, 2).requires_grad_()
    loss = criterion(Signal(s), Signal(logits(2, N, 2)), batch(LABELS % 2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all()


numbers = st.floats(-20, 20, width=32)
tables = arrays(np.float64, (4, 5), elements=numbers)


@settings(max_examples=60, deadline=None)
@given(tables, tables, st.floats(0.5, 8))
def test_kd_is_dkd_weighted_by_what_the_teacher_gives_the_wrong_classes(s, t, temperature):
    right = np.array([0, 1, 2, 3])
    unsure = 1 - softmax(t / temperature)[np.arange(4), right]
    total = 0.0
    for row, share in enumerate(unsure):
        parts = DKD(temperature=temperature, target=1, others=share)
        one = slice(row, row + 1)
        examples = Batch(torch.zeros(1), torch.from_numpy(right[one]), torch.arange(1))
        own, wanted = Signal(torch.from_numpy(s[one])), Signal(torch.from_numpy(t[one]))
        total += parts(own, wanted, examples).item() / 4
    whole = KD(temperature=temperature)(Signal(torch.from_numpy(s)), Signal(torch.from_numpy(t)))
    assert total == pytest.approx(whole.item(), rel=1e-6, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(tables, tables, st.integers(1, 9), st.floats(0.5, 8))
def test_top_k_grows_with_k_to_kd(s, t, k, temperature):
    def loss(criterion):
        return criterion(Signal(torch.from_numpy(s)), Signal(torch.from_numpy(t))).item()

    whole = loss(KD(temperature=temperature))
    few, more = (loss(TopK(k=n, temperature=temperature)) for n in (k, k + 1))
    assert -1e-9 <= few <= more + 1e-9 and more <= whole + 1e-9
    if k >= 4:
        assert few == pytest.approx(whole, rel=1e-8, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(tables, tables, st.floats(0.05, 0.95))
def test_jensen_shannon_is_bounded_and_turns_round_with_beta(s, t, beta):
    s, t = torch.from_numpy(s), torch.from_numpy(t)
    there = JensenShannon(beta=beta, temperature=1)(Signal(s), Signal(t)).item()
    back = JensenShannon(beta=1 - beta, temperature=1)(Signal(t), Signal(s)).item()
    assert -1e-9 <= there <= np.log(2) + 1e-9
    assert there == pytest.approx(back, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("beta", "end"), [(1e-4, 0), (1 - 1e-4, 1)])
def test_jensen_shannon_nears_its_ends(beta, end):
    near = JensenShannon(beta=beta)(Signal(logits(1)), Signal(logits(2))).item()
    exact = JensenShannon(beta=end)(Signal(logits(1)), Signal(logits(2))).item()
    assert near / min(beta, 1 - beta) == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(
    "criterion", [kind(standardize=True) for kind in (KD, DKD, DIST, TopK, JensenShannon)], ids=name
)
def test_standardised_logits_may_be_scaled_and_shifted(criterion):
    loss = criterion(Signal(logits(1)), Signal(logits(2)), batch()).item()
    other = criterion(Signal(logits(1) * 7 + 3), Signal(logits(2) / 9 - 1), batch()).item()
    assert other == pytest.approx(loss, rel=1e-8)


def test_dist_asks_only_that_probabilities_go_together():
    p = torch.softmax(logits(2), -1)
    flat = torch.log(0.5 * p + 0.5 / CLASSES)
    assert DIST(temperature=1)(Signal(flat), Signal(logits(2))).item() == pytest.approx(0, abs=1e-9)
    assert KD(temperature=1)(Signal(flat), Signal(logits(2))).item() > 0.05


@pytest.mark.parametrize("kind", [DKD, DIST, TopK, JensenShannon])
def test_other_class_counts_are_named(kind):
    with pytest.raises(UsageError, match="student answers with 10 classes and the teacher with 7"):
        kind()(Signal(torch.zeros(N, 10)), Signal(torch.zeros(N, 7)), batch())


@pytest.mark.parametrize(("kind", "called"), [(DKD, "dkd"), (TeacherFree, "teacher-free")])
@pytest.mark.parametrize("examples", [None, batch(None)])
def test_examples_without_labels_are_refused_in_a_sentence(kind, called, examples):
    with pytest.raises(UsageError, match=f"{called} needs the examples' labels"):
        kind()(Signal(logits(1)), Signal(logits(2)), examples)


def test_a_batch_of_one_has_no_correlations():
    with pytest.raises(UsageError, match="dist compares a batch's examples: it needs two"):
        DIST()(Signal(logits(1)[:1]), Signal(logits(2)[:1]))


def test_a_virtual_teacher_that_only_guesses_is_refused():
    with pytest.raises(UsageError, match=r"correct is 0.2, no more than each of 5 classes"):
        TeacherFree(correct=0.2)(Signal(logits(1)), Signal(logits(2)), batch())


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (DKD, {"others": -1}, "others should be greater than or equal to 0"),
        (JensenShannon, {"beta": 1.5}, "beta should be less than or equal to 1"),
        (TopK, {"k": 0}, "k should be greater than or equal to 1"),
        (TeacherFree, {"correct": 1}, "correct should be less than 1"),
        (KD, {"standardise": True}, "unknown key 'standardise'; did you mean 'standardize'"),
    ],
)
def test_wrong_settings_are_named(kind, arguments, said):
    with pytest.raises(UsageError, match=said):
        kind(**arguments)
