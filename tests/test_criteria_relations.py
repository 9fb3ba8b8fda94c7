"""Criteria on relations against formulas written out in NumPy, and what they promise."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from attar.data.base import Batch
from attar.distill import DistillObjective, Signal, Teacher
from attar.distill.criteria.correlation_congruence import CorrelationCongruence
from attar.distill.criteria.crd import CRD
from attar.distill.criteria.ickd import ICKD
from attar.distill.criteria.pkt import PKT
from attar.distill.criteria.rkd import RKD
from attar.distill.criteria.similarity import Similarity
from attar.distill.criterion import criteria
from attar.distill.relations import unit
from attar.errors import UsageError
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from criteria_fixture import FAMILIES, Cnn, N, both, signal
from run_fixture import stops_after

TOLERANCE = 1e-10
EXAMPLES = 40
TASK = ImageClassification()

# --- between the examples of a batch


def huber(difference: np.ndarray) -> np.ndarray:
    size = np.abs(difference)
    return np.where(size <= 1, size**2 / 2, size - 0.5)


def rkd_formula(own: np.ndarray, wanted: np.ndarray, distance: float, angle: float) -> float:
    def relations(f):
        x, n = f.reshape(len(f), -1), len(f)
        d = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(n)] for i in range(n)])
        cosine = np.zeros((n, n, n))
        for i, j, k in product(range(n), repeat=3):
            if i != j and k != j:
                cosine[i, j, k] = (x[i] - x[j]) @ (x[k] - x[j]) / d[i, j] / d[k, j]
        return d / d[d > 0].mean(), cosine

    (d_s, c_s), (d_t, c_t) = relations(own), relations(wanted)
    return distance * huber(d_s - d_t).mean() + angle * huber(c_s - c_t).mean()


def congruence_formula(own: np.ndarray, wanted: np.ndarray, gamma: float, order: int) -> float:
    def correlation(f):
        x = f.reshape(len(f), -1)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        terms = [(2 * gamma) ** p / math.factorial(p) * (x @ x.T) ** p for p in range(order + 1)]
        return np.exp(-2 * gamma) * sum(terms)

    return ((correlation(own) - correlation(wanted)) ** 2).sum() / len(own) ** 2


def pkt_formula(own: np.ndarray, wanted: np.ndarray) -> float:
    def neighbours(f):
        x, n = f.reshape(len(f), -1), len(f)
        k = np.zeros((n, n))
        for i, j in product(range(n), repeat=2):
            if i != j:
                k[i, j] = (x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) + 1) / 2
        return k / k.sum(1, keepdims=True)

    p, q, others = neighbours(wanted), neighbours(own), ~np.eye(len(own), dtype=bool)
    return (p[others] * np.log(p[others] / q[others])).sum() / len(own)


def similarity_formula(own: np.ndarray, wanted: np.ndarray) -> float:
    def alike(f):
        g = f.reshape(len(f), -1) @ f.reshape(len(f), -1).T
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    return ((alike(own) - alike(wanted)) ** 2).mean()


BETWEEN_EXAMPLES = [
    (RKD, {}, lambda s, t: rkd_formula(s, t, 1, 2)),
    (RKD, {"distance": 25, "angle": 0}, lambda s, t: rkd_formula(s, t, 25, 0)),
    (RKD, {"distance": 0, "angle": 0.5}, lambda s, t: rkd_formula(s, t, 0, 0.5)),
    (CorrelationCongruence, {}, lambda s, t: congruence_formula(s, t, 0.4, 2)),
    (
        CorrelationCongruence,
        {"gamma": 1.5, "order": 5},
        lambda s, t: congruence_formula(s, t, 1.5, 5),
    ),
    (PKT, {}, pkt_formula),
    (Similarity, {}, similarity_formula),
]
NAMES = [f"{kind.__name__}{given or ''}" for kind, given, _ in BETWEEN_EXAMPLES]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "given", "formula"), BETWEEN_EXAMPLES, ids=NAMES)
def test_a_relation_criterion_follows_its_formula(kind, given, formula, family):
    _, own, wanted, path = both(family)
    value = formula(own.features[path].detach().numpy(), wanted.features[path].numpy())
    assert kind(layers=[path], **given)(own, wanted).item() == pytest.approx(value, abs=TOLERANCE)
    assert value > 1e-5


def loss(kind, own, wanted, **given) -> torch.Tensor:
    """One pair's, of features alone."""
    own, wanted = (torch.as_tensor(f) for f in (own, wanted))
    criterion = kind(layers=["a"], **given)
    signals = Signal(own[:, :0], {"a": own}), Signal(wanted[:, :0], {"a": wanted})
    criterion.prepare(*signals)
    return criterion(*signals)


@pytest.mark.parametrize("family", ["cnn", "transformer"])
@pytest.mark.parametrize(("kind", "given", "formula"), BETWEEN_EXAMPLES, ids=NAMES)
def test_gradients_are_right(kind, given, formula, family):
    _, own, wanted, path = both(family)
    x = own.features[path].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: loss(kind, f, wanted.features[path], **given), (x,))


KINDS = [RKD, CorrelationCongruence, PKT, Similarity, ICKD]
embeddings = arrays(np.float64, (5, 3), elements=st.floats(-10, 10, width=32))
sizes = st.floats(0.01, 100)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(embeddings, embeddings, sizes, sizes, st.integers(0, 99))
def test_moving_scaling_and_rotating_changes_no_distance_and_no_angle(s, t, size, other, seed):
    turn = np.linalg.qr(some(seed, 3, 3).numpy())[0]
    # nearly coinciding points have directions that rounding turns: a grid keeps them apart
    s, t = np.round(s), np.round(t)
    before = loss(RKD, s, t).item()
    assert loss(RKD, size * s @ turn + 3, other * t).item() == pytest.approx(before, abs=1e-8)
    assert loss(RKD, s, other * t @ turn - 1).item() == pytest.approx(before, abs=1e-8)


@settings(max_examples=50, deadline=None)
@given(embeddings, embeddings, sizes, sizes)
@pytest.mark.parametrize("kind", [CorrelationCongruence, PKT, Similarity])
def test_the_features_scale_changes_nothing(kind, s, t, size, other):
    before = loss(kind, s, t).item()
    assert loss(kind, size * s, other * t).item() == pytest.approx(before, abs=1e-9)
    assert before >= -1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(5)))
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_batch_changes_nothing(kind, seed, order):
    s, t = some(seed, 5, 3, 4), some(seed + 1, 5, 3, 4)
    changed = loss(kind, s[list(order)], t[list(order)]).item()
    assert changed == pytest.approx(loss(kind, s, t).item(), abs=TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
@pytest.mark.parametrize("kind", KINDS)
def test_equal_features_teach_nothing(kind, seed):
    s = some(seed, 5, 3, 4).requires_grad_()
    value = loss(kind, s, s.detach().clone())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dead_and_coinciding_examples_have_finite_gradients_of_ordinary_size(kind, dtype):
    s = some(1, 5, 3, 4).to(dtype)
    s[0] = 0
    s[1] = s[2]
    s[3] = -s[2]
    s.requires_grad_()
    value = loss(kind, s, some(2, 5, 3, 4).to(dtype))
    value.backward()
    assert torch.isfinite(value) and s.grad.abs().max() < 1e4
    alike = torch.ones(4, 3, 2, dtype=dtype, requires_grad=True)
    value = loss(kind, alike, torch.ones(4, 3, 2, dtype=dtype))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and torch.isfinite(alike.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_in_bfloat16_does_not_narrow_relations(kind):
    s, t = some(1, 8, 5, 4).float() + 3, some(2, 8, 5, 4).float() + 3
    with torch.autocast("cpu", torch.bfloat16):
        narrow = loss(kind, s, t)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(loss(kind, s, t).item(), rel=1e-6)


def test_close_pairs_far_from_the_origin_keep_their_angles_in_single_precision():
    x = some(1, 6, 4)
    x[0] = x[1] + 1e-2 * x[2]
    moved = (x + 10).float()
    value = loss(RKD, moved, some(2, 6, 4).float()).item()
    assert value == pytest.approx(loss(RKD, moved.double(), some(2, 6, 4)).item(), rel=1e-4)


def test_a_high_order_is_the_gaussian_kernel_itself():
    s, t = some(1, 5, 3), some(2, 5, 3)
    kernels = [torch.exp(-0.7 * torch.cdist(unit(f), unit(f)).square()).numpy() for f in (s, t)]
    value = loss(CorrelationCongruence, s, t, gamma=0.7, order=20).item()
    assert value == pytest.approx(((kernels[0] - kernels[1]) ** 2).mean(), abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_batch_of_one_has_no_relations(kind):
    name = next(n for n in criteria.names() if criteria.get(n) is kind)
    with pytest.raises(UsageError, match=f"^{name} compares a batch's examples: it needs two at"):
        loss(kind, torch.ones(1, 4), torch.ones(1, 4))


# --- between the channels of a layer


def ickd_formula(own: np.ndarray, wanted: np.ndarray) -> float:
    """own: already at the teacher's width; both (N, channels, positions)."""
    total = 0.0
    for f, t in zip(own, wanted, strict=True):
        for c in range(len(f)):
            rows = [np.array([m[c] @ m[other] for other in range(len(m))]) for m in (f, t)]
            total += (
                (rows[0] / np.linalg.norm(rows[0]) - rows[1] / np.linalg.norm(rows[1])) ** 2
            ).sum()
    return total / len(own) / own.shape[1]


def channels_first(f: np.ndarray) -> np.ndarray:
    return f.reshape(*f.shape[:2], -1) if f.ndim == 4 else f.transpose(0, 2, 1)


@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_ickd_follows_its_formula_and_learns_its_adapter(family):
    _, own, wanted, path = both(family)
    ickd = ICKD(layers=[path])
    ickd.prepare(own, wanted)
    value = ickd(own, wanted)
    (adapter,) = ickd.adapters
    w, b = adapter.weight.detach().numpy(), adapter.bias.detach().numpy()
    f = channels_first(own.features[path].detach().numpy())
    f = np.einsum("dc,ncp->ndp", w, f) + b[:, None]
    expected = ickd_formula(f, channels_first(wanted.features[path].numpy()))
    assert value.item() == pytest.approx(expected, abs=TOLERANCE) and expected > 1e-3

    inputs = (own.features[path].detach().clone().requires_grad_(), *ickd.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: ickd(Signal(own.logits.detach(), {path: x}), wanted), inputs
    )


def test_a_map_may_be_compared_with_tokens_and_equal_widths_need_no_adapter():
    tokens = some(1, 3, 7, 4)
    layout = tokens.transpose(1, 2).reshape(3, 4, 7, 1)
    ickd = ICKD(layers=["a"])
    own, wanted = (Signal(torch.zeros(3, 2), {"a": f}) for f in (layout, tokens))
    ickd.prepare(own, wanted)
    assert not list(ickd.parameters())
    assert ickd(own, wanted).item() == pytest.approx(0, abs=1e-12)


def test_ickd_refuses_what_it_cannot_compare():
    vectors = Signal(torch.zeros(2, 3), {"a": torch.ones(2, 8)})
    with pytest.raises(UsageError, match=r"ickd compares .* a layer gives \(N, 8\)"):
        ICKD(layers=["a"]).prepare(vectors, vectors)
    maps = Signal(torch.zeros(2, 3), {"a": torch.ones(2, 8, 2, 2)})
    with pytest.raises(UsageError, match="call prepare"):
        ICKD(layers=["a"])(maps, maps)


# --- between all training examples


def contrastive(own: Signal, wanted: Signal, *paths: str, **given) -> CRD:
    torch.manual_seed(7)
    crd = CRD(layers=list(paths), **({"width": 4, "negatives": 9, "temperature": 0.5} | given))
    crd.expect(EXAMPLES)
    crd.prepare(own, wanted)
    return crd


def shown(targets: bool = True, seed: int = 1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    indices = torch.randperm(EXAMPLES, generator=g)[:N]
    return Batch(torch.empty(N, 0), indices % 4 if targets else None, indices)


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def crd_formula(
    crd: CRD, own: np.ndarray, wanted: np.ndarray, batch: Batch, negatives: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss of one pair before its first step, and both networks' embeddings."""
    contrast, t = crd.adapters[0], crd.settings.temperature
    positions = {2: (), 3: (1,), 4: (2, 3)}[own.ndim]

    def embedded(layer, f):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        return normalised(f.mean(positions) @ weight.T + bias)

    v_s, v_t = embedded(contrast.student, own), embedded(contrast.teacher, wanted)
    total = 0.0
    places = np.hstack([batch.indices.numpy()[:, None], negatives])
    for anchor, bank in ((v_s, contrast.banks[1].numpy()), (v_t, contrast.banks[0].numpy())):
        scores = [[np.exp(anchor[i] @ bank[k] / t) for k in places[i]] for i in range(N)]
        z = EXAMPLES * np.mean(scores)
        ratio = negatives.shape[1] / EXAMPLES
        for i in range(N):
            p = np.array(scores[i]) / z
            total -= np.log(p[0] / (p[0] + ratio)) + np.log(1 - p[1:] / (p[1:] + ratio)).sum()
    return total / N, v_s, v_t


@pytest.mark.parametrize("targets", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_crd_follows_its_formula_and_remembers(family, targets):
    _, own, wanted, path = both(family)
    crd, batch = contrastive(own, wanted, path), shown(targets)
    if targets:
        crd.labels[batch.indices] = batch.targets  # what forward does first
    torch.manual_seed(2)
    negatives = crd._others(batch).numpy()
    before = crd.adapters[0].banks.clone().numpy()
    expected, v_s, v_t = crd_formula(
        crd, own.features[path].detach().numpy(), wanted.features[path].numpy(), batch, negatives
    )
    torch.manual_seed(2)
    assert crd(own, wanted, batch).item() == pytest.approx(expected, abs=TOLERANCE)

    banks = before.copy()
    for bank, v in zip(banks, (v_s, v_t), strict=True):
        bank[batch.indices] = normalised(0.5 * bank[batch.indices] + 0.5 * v)
    assert np.allclose(crd.adapters[0].banks.numpy(), banks, rtol=0, atol=TOLERANCE)
    seen = crd.labels >= 0
    assert seen.sum() == (N if targets else 0)
    assert not targets or torch.equal(crd.labels[batch.indices], batch.targets)


def test_the_normaliser_is_measured_once():
    _, own, wanted, path = both("cnn")
    crd = contrastive(own, wanted, path)
    assert crd.adapters[0].log_z.isinf().all()
    crd(own, wanted, shown())
    measured = crd.adapters[0].log_z.clone()
    assert measured.isfinite().all()
    crd(own, wanted, shown(seed=2))
    assert torch.equal(crd.adapters[0].log_z, measured)


def test_nothing_is_remembered_in_evaluation_and_while_preparing():
    _, own, wanted, path = both("cnn")
    crd = contrastive(own, wanted, path).eval()
    before = {k: v.clone() for k, v in crd.state_dict().items()}
    assert crd(own, wanted, shown()).isfinite()
    assert all(torch.equal(v, before[k]) for k, v in crd.state_dict().items())


@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_crds_gradients_are_right(family):
    _, own, wanted, path = both(family)
    crd, batch = contrastive(own, wanted, path), shown()
    crd(own, wanted, batch)
    crd.eval()  # the bank stays

    def value(x, *_):
        torch.manual_seed(3)
        return crd(Signal(own.logits.detach(), {path: x}), wanted, batch)

    inputs = (own.features[path].detach().clone().requires_grad_(), *crd.parameters())
    assert len(inputs) == 5
    assert torch.autograd.gradcheck(value, inputs)


def test_several_pairs_count_by_their_mean_with_a_bank_each():
    _, own, wanted, path = both("cnn")
    own = Signal(own.logits, {**own.features, "b": own.features[path] ** 2})
    wanted = Signal(wanted.logits, {**wanted.features, "b": wanted.features[path] ** 2})
    crd, batch = contrastive(own, wanted, path, "b"), shown()
    torch.manual_seed(2)
    together = crd(own, wanted, batch).item()
    alone = []
    for index in range(2):
        one = contrastive(own, wanted, path, "b")
        one.adapters, one.pairs = one.adapters[index:][:1], one.pairs[index:][:1]
        torch.manual_seed(2)
        alone.append(one(own, wanted, batch).item())
    assert together == pytest.approx(sum(alone) / 2) and alone[0] != pytest.approx(alone[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=EXAMPLES, max_size=EXAMPLES), st.integers(0, 999))
def test_negatives_are_drawn_from_all_others_that_may_be_drawn(classes, seed):
    crd = CRD(layers=["a"], negatives=2000)
    crd.expect(EXAMPLES)
    features = Signal(torch.zeros(N, 2), {"a": torch.zeros(N, 3)})
    crd.prepare(features, features)
    labels, indices = torch.tensor(classes), torch.arange(N)
    crd.labels.copy_(labels)
    torch.manual_seed(seed)
    for drawn, index in zip(crd._others(Batch(None, None, indices)), indices, strict=True):
        assert set(drawn.tolist()) == set(range(EXAMPLES)) - {index.item()}
    drawn = crd._others(Batch(None, labels[:N], indices))
    for some_of, label in zip(drawn, labels[:N], strict=True):
        allowed = set(torch.nonzero(labels != label).flatten().tolist())
        assert not allowed or set(some_of.tolist()) == allowed


def test_negatives_come_from_the_seeded_generator():
    _, own, wanted, path = both("cnn")
    crd = contrastive(own, wanted, path)
    torch.manual_seed(5)
    first, second = crd._others(shown()), crd._others(shown())
    torch.manual_seed(5)
    assert torch.equal(crd._others(shown()), first) and not torch.equal(first, second)


def test_crd_brings_matching_embeddings_together_in_a_loop_of_ones_own():
    torch.manual_seed(3)
    student, teacher = Cnn(8).double(), Cnn(12).double().eval()
    x = some(4, EXAMPLES, 2, 4, 4) + 2 * some(5, EXAMPLES, 2, 1, 1)
    with torch.no_grad():
        known = signal(teacher, x, "conv")
    crd = contrastive(signal(student, x, "conv"), known, "conv", width=8, temperature=0.2)
    optimizer = torch.optim.SGD([*student.parameters(), *crd.parameters()], lr=0.1, momentum=0.9)

    def alike() -> tuple[float, float]:
        """The two embeddings of one example, and those of different ones."""
        with torch.no_grad():
            own = signal(student, x, "conv").features["conv"].mean((2, 3))
            s = unit(crd.adapters[0].student(own))
            t = unit(crd.adapters[0].teacher(known.features["conv"].mean((2, 3))))
        others = ~torch.eye(EXAMPLES, dtype=torch.bool)
        return (s @ t.T).diagonal().mean().item(), (s @ t.T)[others].mean().item()

    before = alike()
    for step in range(30):
        batch = Batch(x[step % 4 :: 4], None, torch.arange(EXAMPLES)[step % 4 :: 4])
        wanted = Signal(known.logits, {"conv": known.features["conv"][batch.indices]})
        value = crd(signal(student, batch.inputs, "conv"), wanted, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    after = alike()
    assert after[0] > before[0] + 0.3
    assert after[0] - after[1] > before[0] - before[1] + 0.3


def test_a_bank_survives_its_state():
    _, own, wanted, path = both("cnn")
    crd = contrastive(own, wanted, path)
    for seed in range(3):
        crd(own, wanted, shown(seed=seed))
    torch.manual_seed(99)
    other = CRD(layers=[path], width=4, negatives=9, temperature=0.5)
    other.expect(EXAMPLES)
    other.prepare(own, wanted)
    other.load_state_dict(crd.state_dict())
    values = []
    for one in (crd, other):
        torch.manual_seed(3)
        values += [one(own, wanted, shown(seed=4)), one(own, wanted, shown(seed=5))]
    assert torch.equal(values[0], values[2]) and torch.equal(values[1], values[3])
    assert all(torch.equal(v, crd.state_dict()[k]) for k, v in other.state_dict().items())


STAGE = {
    "criteria": [{"crd": {"layers": ["6"], "negatives": 50, "width": 16}}],
    "epochs": 3,
    "batch_size": 50,
    "optimizer": {"lr": 0.01},
}


def test_an_interrupted_training_with_a_bank_ends_as_an_undisturbed_one(
    digits, tiny_net, tmp_path, monkeypatch
):
    taught: list[DistillObjective] = []
    real = DistillObjective.prepare

    def prepare(self, *args, **kwargs):
        taught.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(DistillObjective, "prepare", prepare)
    run = Context(task=TASK, data=digits, teacher=tiny_net(16).eval(), seed=1, work=tmp_path)
    stage = Distill(**STAGE)
    whole = stage.apply(Student(tiny_net(4)), run.at("undisturbed")).module.state_dict()

    disturbed = run.at("disturbed")
    with pytest.raises(KeyboardInterrupt):
        stage.apply(Student(tiny_net(4)), replace(disturbed, tell=stops_after(2)))
    torch.manual_seed(99)  # what happened before in the process is of no consequence
    resumed = stage.apply(Student(tiny_net(4)), disturbed).module.state_dict()
    assert all(torch.equal(v, whole[k]) for k, v in resumed.items())
    banks, again = taught[0].state_dict(), taught[-1].state_dict()
    assert set(banks) >= {"criteria.0.labels", "criteria.0.adapters.0.banks"}
    assert all(torch.equal(v, again[k]) for k, v in banks.items())
    assert banks["criteria.0.labels"].shape == (300,) and (banks["criteria.0.labels"] >= 0).all()


def test_what_prepares_is_forgotten(digits, tiny_net):
    torch.manual_seed(0)
    crd = CRD(layers=["6"], negatives=20, width=8)
    teacher = Teacher(tiny_net(8).eval(), TASK, layers=crd.teacher_layers)
    objective = DistillObjective(TASK, teacher, {"crd": crd})
    objective.prepare(tiny_net(4), digits.train.pick(range(8)), examples=len(digits.train))
    assert (crd.labels == -1).all() and crd.adapters[0].log_z.isinf().all()
    assert crd.training


def test_crd_says_what_it_needs():
    _, own, wanted, path = both("cnn")
    with pytest.raises(UsageError, match=r"call expect\(examples\) with their number"):
        CRD(layers=[path]).prepare(own, wanted)
    with pytest.raises(UsageError, match="call prepare"):
        CRD(layers=[path])(own, wanted, shown())
    with pytest.raises(UsageError, match="it needs the batch, for its indices"):
        contrastive(own, wanted, path)(own, wanted)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (RKD, {"distance": 0, "angle": 0}, "one of distance and angle should be more than 0"),
        (RKD, {"angle": -1}, "angle should be greater than or equal to 0, not -1"),
        (RKD, {"angel": 1}, "unknown key 'angel'; did you mean 'angle'"),
        (CorrelationCongruence, {"gamma": 0}, "gamma should be greater than 0, not 0"),
        (CorrelationCongruence, {"order": 0}, "order should be greater than or equal to 1"),
        (CRD, {"temperature": 0}, "temperature should be greater than or equal to 0.01"),
        (CRD, {"momentum": 2}, "momentum should be less than 1"),
        (CRD, {"negatives": 0}, "negatives should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_named(kind, given, said):
    with pytest.raises(UsageError, match=f"{kind.__name__}: .*{said}"):
        kind(**({"layers": ["a"]} | given))


def test_they_are_found_by_their_names():
    assert criteria.get("rkd") is RKD and criteria.get("pkt") is PKT
    assert criteria.get("correlation-congruence") is CorrelationCongruence
    assert criteria.get("ickd") is ICKD and criteria.get("crd") is CRD
