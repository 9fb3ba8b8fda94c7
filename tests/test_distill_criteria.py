"""Criteria against formulas written out in NumPy, their gradients, and what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from attar.distill import Criterion, Signal
from attar.distill.criteria.attention import Attention
from attar.distill.criteria.feature import Feature
from attar.distill.criteria.kd import KD
from attar.distill.criteria.logits_mse import LogitsMSE
from attar.distill.criteria.similarity import Similarity
from attar.distill.criteria.soft_cross_entropy import SoftCrossEntropy
from attar.distill.criterion import criteria
from attar.errors import UsageError
from criteria_fixture import CLASSES, FAMILIES, N, both, pooled, signal

TOLERANCE = 1e-10


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kd_formula(s: np.ndarray, t: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    p, q = softmax(t / temperature), softmax(s / temperature)
    loss = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1).mean()
    return loss, temperature * (q - p) / len(s)


def soft_formula(s: np.ndarray, t: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    p, q = softmax(t / temperature), softmax(s / temperature)
    return -(temperature**2) * (p * np.log(q)).sum(-1).mean(), temperature * (q - p) / len(s)


def mse_formula(s: np.ndarray, t: np.ndarray) -> tuple[float, np.ndarray]:
    return ((s - t) ** 2).mean(), 2 * (s - t) / s.size


RESPONSES = [
    (KD(temperature=4), lambda s, t: kd_formula(s, t, 4)),
    (KD(temperature=0.7), lambda s, t: kd_formula(s, t, 0.7)),
    (SoftCrossEntropy(), lambda s, t: soft_formula(s, t, 1)),
    (SoftCrossEntropy(temperature=3), lambda s, t: soft_formula(s, t, 3)),
    (LogitsMSE(), mse_formula),
]


def logits(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*(shape or (N, CLASSES)), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("criterion", "formula"), RESPONSES)
def test_a_response_criterion_and_its_gradient_follow_the_formula(criterion, formula):
    s, t = logits(1).requires_grad_(), logits(2)
    loss = criterion(Signal(s), Signal(t))
    loss.backward()
    value, gradient = formula(s.detach().numpy(), t.numpy())
    assert loss.item() == pytest.approx(value, abs=TOLERANCE)
    assert np.allclose(s.grad.numpy(), gradient, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("criterion", "formula"), RESPONSES)
def test_positions_before_the_classes_count_as_examples(criterion, formula):
    s, t = logits(1, 2, 3, CLASSES), logits(2, 2, 3, CLASSES)
    value, _ = formula(s.numpy().reshape(6, -1), t.numpy().reshape(6, -1))
    assert criterion(Signal(s), Signal(t)).item() == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize(("criterion", "formula"), RESPONSES)
def test_half_precision_logits_are_compared_in_single(criterion, formula):
    s, t = logits(1).bfloat16(), logits(2)
    loss = criterion(Signal(s), Signal(t.float()))
    assert loss.dtype == torch.float32
    value, _ = formula(s.double().numpy(), t.numpy())
    assert loss.item() == pytest.approx(value, rel=1e-5)


def test_kd_of_equal_answers_is_zero_with_zero_gradient():
    s = logits(1).requires_grad_()
    loss = KD()(Signal(s), Signal(s.detach().clone()))
    loss.backward()
    assert loss.item() == 0
    assert s.grad.abs().max() < 1e-15


def test_soft_labels_pull_as_kd_does_at_one_temperature():
    pulls = []
    for criterion in (KD(temperature=2), SoftCrossEntropy(temperature=2)):
        s = logits(1).requires_grad_()
        criterion(Signal(s), Signal(logits(2))).backward()
        pulls.append(s.grad)
    assert torch.allclose(*pulls, atol=TOLERANCE)


numbers = st.floats(-30, 30, width=32)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, (3, 4), elements=numbers),
    arrays(np.float64, (3, 4), elements=numbers),
    arrays(np.float64, (3, 1), elements=numbers),
    st.floats(0.5, 20),
)
def test_kd_is_never_negative_and_a_shift_of_the_logits_changes_nothing(s, t, shift, temperature):
    kd = KD(temperature=temperature)
    loss = kd(Signal(torch.from_numpy(s)), Signal(torch.from_numpy(t))).item()
    assert loss >= -1e-9
    shifted = kd(Signal(torch.from_numpy(s + shift)), Signal(torch.from_numpy(t - shift))).item()
    assert shifted == pytest.approx(loss, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("temperature", [0.01, 1e6])
def test_an_extreme_temperature_gives_numbers(temperature):
    s = (logits(1) * 300).float().requires_grad_()
    loss = KD(temperature=temperature)(Signal(s), Signal((logits(2) * 300).float()))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(s.grad).all()


def attention_formula(own: np.ndarray, wanted: np.ndarray) -> float:
    def where(f):
        energy = (f**2).mean(1 if f.ndim == 4 else 2).reshape(len(f), -1)
        return energy / np.linalg.norm(energy, axis=1, keepdims=True)

    return ((where(pooled(own, wanted)) - where(wanted)) ** 2).sum(1).mean()


def similarity_formula(own: np.ndarray, wanted: np.ndarray) -> float:
    def alike(f):
        flat = f.reshape(len(f), -1)
        g = np.einsum("ik,jk->ij", flat, flat)
        return g / np.linalg.norm(g, axis=1, keepdims=True)

    return ((alike(own) - alike(wanted)) ** 2).sum() / len(own) ** 2


@pytest.mark.parametrize("family", ["cnn", "transformer"])
@pytest.mark.parametrize(
    ("kind", "formula"), [(Attention, attention_formula), (Similarity, similarity_formula)]
)
def test_attention_and_similarity_follow_their_formulas(kind, formula, family):
    _, own, wanted, path = both(family)
    criterion = kind(layers=[path])
    value = formula(own.features[path].detach().numpy(), wanted.features[path].numpy())
    assert criterion(own, wanted).item() == pytest.approx(value, abs=TOLERANCE)
    assert value > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_feature_is_the_squared_difference_after_its_adapter(family):
    _, own, wanted, path = both(family)
    criterion = Feature(layers=[path])
    criterion.prepare(own, wanted)
    loss = criterion(own, wanted)
    loss.backward()

    f, t = own.features[path].detach().numpy(), wanted.features[path].numpy()
    if family == "vectors":
        assert not list(criterion.parameters()), "equal widths need no adapter"
        assert loss.item() == pytest.approx(((f - t) ** 2).mean(), abs=TOLERANCE)
        return
    (adapter,) = criterion.adapters
    w, b = adapter.weight.detach().numpy().reshape(6, 4), adapter.bias.detach().numpy()
    width = 1 if f.ndim == 4 else -1
    rows = np.moveaxis(pooled(f, t), width, -1).reshape(-1, 4)
    off = rows @ w.T + b - np.moveaxis(t, width, -1).reshape(-1, 6)
    assert loss.item() == pytest.approx((off**2).mean(), abs=TOLERANCE)
    gradient = 2 * off.T @ rows / off.size
    assert np.allclose(adapter.weight.grad.numpy().reshape(6, 4), gradient, atol=TOLERANCE)
    assert np.allclose(adapter.bias.grad.numpy(), 2 * off.sum(0) / off.size, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["cnn", "transformer"])
@pytest.mark.parametrize("kind", [Feature, Attention, Similarity])
def test_gradients_of_layer_criteria_are_right(kind, family):
    _, own, wanted, path = both(family)
    criterion = kind(layers=[path])
    criterion.prepare(own, wanted)
    x = own.features[path].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: criterion(Signal(own.logits.detach(), {path: f}), wanted), (x,)
    )


@pytest.mark.parametrize("criterion", [one for one, _ in RESPONSES])
def test_gradients_of_response_criteria_are_right(criterion):
    wanted = Signal(logits(2))
    assert torch.autograd.gradcheck(
        lambda s: criterion(Signal(s), wanted), (logits(1).requires_grad_(),)
    )


def test_several_pairs_count_by_their_mean():
    torch.manual_seed(0)
    features = {name: torch.randn(3, 4) for name in "abcd"}
    own, wanted = Signal(torch.zeros(3, 2), features), Signal(torch.zeros(3, 2), features)

    def loss(*pairs):
        criterion = Feature(layers=[{"student": s, "teacher": t} for s, t in pairs])
        criterion.prepare(own, wanted)
        return criterion(own, wanted).item()

    expected = (loss("ab") + loss("cd")) / 2
    assert loss("ab", "cd") == pytest.approx(expected) and expected > 0.1


@pytest.mark.parametrize("size", [(2, 2), (4, 3), (9, 8), (2, 8)])
def test_maps_of_any_size_are_brought_to_the_teachers(size):
    own = Signal(torch.zeros(2, 3), {"a": torch.full((2, 3, 4, 4), 2.0)})
    wanted = Signal(torch.zeros(2, 3), {"a": torch.full((2, 3, *size), 2.0)})
    criterion = Feature(layers=["a"])
    criterion.prepare(own, wanted)
    assert criterion(own, wanted).item() == pytest.approx(0, abs=1e-12)


def test_an_adapter_learns_with_the_student_in_a_loop_of_ones_own():
    student, _, wanted, path = both("cnn")
    x = torch.randn(N, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hint = Feature(layers=[path])
    hint.prepare(signal(student, x, path), wanted)
    before = set(student.state_dict())
    optimizer = torch.optim.SGD([*student.parameters(), *hint.parameters()], lr=0.1)
    first = last = None
    for _ in range(30):
        last = hint(signal(student, x, path), wanted)
        first = last.item() if first is None else first
        optimizer.zero_grad()
        last.backward()
        optimizer.step()
    assert last.item() < 0.7 * first
    assert set(student.state_dict()) == before


def test_features_that_cannot_be_compared_are_refused_in_a_sentence():
    def prepare(own, wanted):
        criterion = Feature(layers=["a"])
        criterion.prepare(
            Signal(torch.zeros(2, 3), {"a": torch.zeros(own)}),
            Signal(torch.zeros(2, 3), {"a": torch.zeros(wanted)}),
        )

    with pytest.raises(UsageError, match=r"\(N, 4, 8, 8\) and \(N, 16, 4\) can't be compared"):
        prepare((2, 4, 8, 8), (2, 16, 4))
    with pytest.raises(UsageError, match="gives 16 tokens and the teacher's 4"):
        prepare((2, 16, 4), (2, 4, 4))
    with pytest.raises(UsageError, match="it needs two at least"):
        one = Signal(torch.zeros(1, 3), {"a": torch.ones(1, 4)})
        Similarity(layers=["a"])(one, one)


def test_a_feature_without_its_adapters_says_what_to_call():
    one = Signal(torch.zeros(2, 3), {"a": torch.ones(2, 4)})
    with pytest.raises(UsageError, match="call prepare"):
        Feature(layers=["a"])(one, one)


@pytest.mark.parametrize("kind", [KD, SoftCrossEntropy, LogitsMSE])
def test_other_class_counts_are_named(kind):
    with pytest.raises(UsageError, match="student answers with 10 classes and the teacher with 7"):
        kind()(Signal(torch.zeros(2, 10)), Signal(torch.zeros(2, 7)))


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (KD, {"temprature": 4}, "unknown key 'temprature'; did you mean 'temperature'"),
        (KD, {"temperature": 0}, "temperature should be greater than or equal to 0.01, not 0"),
        (KD, {"temperature": float("nan")}, "temperature should be a finite number"),
        (KD, {"weight": -1}, "weight should be greater than or equal to 0, not -1"),
        (Feature, {}, "layers Field required"),
    ],
)
def test_wrong_settings_are_named(kind, arguments, said):
    with pytest.raises(UsageError, match=f"{kind.__name__}: .*{said}"):
        kind(**arguments)


def test_every_criterion_is_listed_with_what_it_is():
    assert {"kd", "soft-cross-entropy", "logits-mse", "feature", "attention"} <= set(
        criteria.names()
    )
    for name, text in criteria.describe().items():
        assert text.endswith("."), name
        assert issubclass(criteria.get(name), Criterion)


def test_a_near_name_is_suggested():
    with pytest.raises(UsageError, match="did you mean 'soft-cross-entropy'"):
        criteria.get("soft-crossentropy")
