"""Criteria on inner layers against formulas written out in NumPy, and what they promise."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from attar.data.base import Batch
from attar.distill import Criterion, DistillObjective, Signal, Teacher
from attar.distill.criteria.attention_relations import MiniLM
from attar.distill.criteria.channel_wise import ChannelWise
from attar.distill.criteria.factor import FactorTransfer
from attar.distill.criteria.fsp import FSP
from attar.distill.criteria.mgd import MGD
from attar.distill.criteria.nst import NST
from attar.distill.criteria.overhaul import Overhaul
from attar.distill.criteria.review import Review
from attar.distill.criteria.vid import VID
from attar.distill.criterion import criteria, written
from attar.errors import UsageError
from attar.tasks.image_classification import ImageClassification
from criteria_fixture import CLASSES, Cnn, N, both, pooled, signal

TOLERANCE = 1e-10
ADAPTED = [ChannelWise, MGD, VID, Overhaul, Review, FactorTransfer]
BATCH_NORM = 1e-5


def features(seed: int, **shapes: tuple[int, ...]) -> Signal:
    """Layers of these shapes, at random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    count = next(iter(shapes.values()))[0]
    return Signal(torch.zeros(count, CLASSES, dtype=torch.float64), drawn)


def prepared(criterion: Criterion, own: Signal, wanted: Signal) -> Criterion:
    torch.manual_seed(1)
    criterion.prepare(own, wanted)
    return criterion


def arrays(one: Signal) -> dict[str, np.ndarray]:
    return {path: f.detach().numpy() for path, f in one.features.items()}


def close(value: float) -> object:
    return pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE)


# --- layers, written out


def positions(f: np.ndarray) -> np.ndarray:
    """(N, width, positions)."""
    return {2: lambda: f[..., None], 3: lambda: f.swapaxes(1, 2)}.get(
        f.ndim, lambda: f.reshape(*f.shape[:2], -1)
    )()


def pointwise(module: nn.Module, f: np.ndarray) -> np.ndarray:
    """A 1×1 convolution or a linear layer, on features as they come."""
    if isinstance(module, nn.Identity):
        return f
    w = module.weight.detach().numpy().reshape(module.weight.shape[:2])
    dim = 1 if f.ndim == 4 else -1
    made = np.moveaxis(f, dim, -1) @ w.T
    if module.bias is not None:
        made = made + module.bias.detach().numpy()
    return np.moveaxis(made, -1, dim)


def convolved(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """A 3×3 convolution, transposed or not, or one of three over tokens (N, D, T)."""
    w = module.weight.detach().numpy()
    if isinstance(module, nn.ConvTranspose2d):
        w = w.swapaxes(0, 1)[:, :, ::-1, ::-1]
    around = [(0, 0), (0, 0)] + [(1, 1)] * (x.ndim - 2)
    wide = np.pad(x, around)
    made = np.zeros((len(x), len(w), *x.shape[2:]))
    for shift in product(range(3), repeat=x.ndim - 2):
        seen = wide[(..., *(slice(s, s + n) for s, n in zip(shift, x.shape[2:], strict=True)))]
        made += np.einsum("oi,ni...->no...", w[(..., *shift)], seen)
    bias = module.bias
    return made if bias is None else made + bias.detach().numpy().reshape(-1, *[1] * (x.ndim - 2))


def normalised(x: np.ndarray) -> np.ndarray:
    """A batch normalisation that has not been trained."""
    axes = (0, *range(2, x.ndim))
    off = x - x.mean(axes, keepdims=True)
    return off / np.sqrt((off**2).mean(axes, keepdims=True) + BATCH_NORM)


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.1 * x)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(-1)


# --- fsp


def fsp_matrix(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of one example, (width, height, width) each."""
    _, h, w = start.shape
    made = np.zeros((len(start), len(end)))
    for m, n, i, j in product(range(len(start)), range(len(end)), range(h), range(w)):
        made[m, n] += start[m, i, j] * end[n, i, j] / (h * w)
    return made


def largest(f: np.ndarray) -> np.ndarray:
    """4×4 maps by the largest of each 2×2 window."""
    n, c, h, w = f.shape
    return f.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))


def test_fsp_compares_the_products_of_two_layers_the_larger_max_pooled():
    own = features(1, a=(3, 2, 4, 4), b=(3, 3, 2, 2))
    wanted = features(2, a=(3, 4, 2, 2), b=(3, 5, 4, 4))
    fsp = prepared(FSP(flows=[["a", "b"]]), own, wanted)
    s, t = arrays(own), arrays(wanted)
    first, second = (pointwise(m, s[path]) for m, path in zip(fsp.adapters, "ab", strict=True))
    start, end = largest(first), largest(t["b"])
    value = np.mean(
        [
            ((fsp_matrix(start[i], second[i]) - fsp_matrix(t["a"][i], end[i])) ** 2).sum()
            for i in range(3)
        ]
    )
    assert fsp(own, wanted).item() == close(value)


def test_fsp_of_tokens_takes_their_mean_product():
    own = features(1, a=(3, 5, 2), b=(3, 5, 4))
    wanted = features(2, a=(3, 7, 2), b=(3, 7, 4))
    fsp = prepared(FSP(flows=[["a", "b"]]), own, wanted)
    assert not list(fsp.parameters()), "equal widths need no adapter"
    s, t = arrays(own), arrays(wanted)
    gap = [s["a"][i].T @ s["b"][i] / 5 - t["a"][i].T @ t["b"][i] / 7 for i in range(3)]
    assert fsp(own, wanted).item() == close(np.mean([(g**2).sum() for g in gap]))


def test_several_flows_count_by_their_mean_and_share_the_adapter_of_a_layer():
    own = features(1, a=(2, 2, 4, 4), b=(2, 3, 4, 4), c=(2, 3, 2, 2))
    wanted = features(2, x=(2, 4, 4, 4), y=(2, 5, 4, 4), z=(2, 5, 2, 2))
    flows = [
        {"student": ["a", "b"], "teacher": ["x", "y"]},
        {"student": ["b", "c"], "teacher": ["y", "z"]},
    ]
    fsp = prepared(FSP(flows=flows), own, wanted)
    assert len(fsp.adapters) == 3
    assert fsp.student_layers == ("a", "b", "c") and fsp.teacher_layers == ("x", "y", "z")
    parts = []
    for flow, places in zip(flows, ((0, 1), (1, 2)), strict=True):
        one = FSP(flows=[flow])
        one.adapters = nn.ModuleList(fsp.adapters[p] for p in places)
        parts.append(one(own, wanted).item())
    assert fsp(own, wanted).item() == close(sum(parts) / 2)


# --- nst


def mmd(s: np.ndarray, t: np.ndarray, k) -> float:
    """Of one example's patterns, (neurons, positions)."""
    s, t = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (s, t))

    def mean(a, b):
        return np.mean([[k(x, y) for y in b] for x in a])

    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


def nst_formula(own: np.ndarray, wanted: np.ndarray, settings: dict) -> float:
    losses = []
    for s, t in zip(positions(pooled(own, wanted)), positions(wanted), strict=True):
        kernel = settings.get("kernel", "polynomial")
        a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (s, t))
        variance = np.mean([[((x - y) ** 2).sum() for y in b] for x in a])
        offset, degree = settings.get("offset", 0), settings.get("degree", 2)
        k = {
            "polynomial": lambda x, y, o=offset, d=degree: (x @ y + o) ** d,
            "linear": lambda x, y: x @ y,
            "gaussian": lambda x, y, v=variance: np.exp(-((x - y) ** 2).sum() / (2 * v)),
        }[kernel]
        losses.append(mmd(s, t, k))
    return np.mean(losses)


KERNELS = [
    {},
    {"kernel": "polynomial", "degree": 3, "offset": 0.5},
    {"kernel": "linear"},
    {"kernel": "gaussian"},
]


@pytest.mark.parametrize("settings", KERNELS)
@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_nst_is_the_discrepancy_of_the_neurons_patterns(family, settings):
    _, own, wanted, path = both(family)
    value = nst_formula(arrays(own)[path], arrays(wanted)[path], settings)
    assert NST(layers=[path], **settings)(own, wanted).item() == close(value)
    assert value > 1e-4


@pytest.mark.parametrize("settings", KERNELS)
def test_nst_knows_no_order_of_the_neurons(settings):
    own, wanted = features(1, a=(2, 5, 4, 4)), features(2, a=(2, 6, 4, 4))
    mixed = Signal(own.logits, {"a": own.features["a"][:, torch.tensor([3, 1, 4, 0, 2])]})
    nst = NST(layers=["a"], **settings)
    assert nst(mixed, wanted).item() == close(nst(own, wanted).item())
    assert nst(mixed, own).item() == pytest.approx(0, abs=1e-12)
    assert nst(own, wanted).item() > 1e-3


def test_a_gaussian_kernels_width_is_a_constant_to_gradients():
    own, wanted = features(1, a=(1, 3, 5)), features(2, a=(1, 3, 4))
    x = own.features["a"].requires_grad_()
    NST(layers=["a"], kernel="gaussian")(own, wanted).backward()
    s, t = positions(x.detach().numpy())[0], positions(wanted.features["a"].numpy())[0]
    a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (s, t))
    variance = np.mean([[((p - q) ** 2).sum() for q in b] for p in a])
    for i, j in product(range(5), range(3)):
        values = []
        for step in (1e-6, -1e-6):
            moved = s.copy()
            moved[i, j] += step
            values.append(mmd(moved, t, lambda p, q: np.exp(-((p - q) ** 2).sum() / 2 / variance)))
        assert x.grad[0, j, i].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("settings", KERNELS)
def test_nst_gives_numbers_for_dead_neurons(settings):
    x = torch.randn(2, 4, 3, 3).relu() * torch.tensor([1.0, 0, 1, 0]).view(1, 4, 1, 1)
    x.requires_grad_()
    one, other = Signal(torch.zeros(2, 3), {"a": x}), features(1, a=(2, 5, 3, 3))
    wanted = Signal(other.logits.float(), {"a": other.features["a"].float()})
    loss = NST(layers=["a"], **settings)(one, wanted)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


# --- cwd


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_cwd_is_the_divergence_over_the_positions_of_each_channel(family, settings):
    _, own, wanted, path = both(family)
    cwd = prepared(ChannelWise(layers=[path], **settings), own, wanted)
    f, t = arrays(own)[path], arrays(wanted)[path]
    scale = settings.get("temperature", 4)
    s = positions(pointwise(cwd.adapters[0], pooled(f, t)))
    value = scale**2 * divergence(softmax(positions(t) / scale), softmax(s / scale)).mean()
    assert cwd(own, wanted).item() == close(value)
    assert value > 1e-4


@pytest.mark.parametrize("width", [3, 5])
def test_a_constant_on_a_channel_is_nothing_to_cwd(width):
    own, wanted = features(1, a=(2, 3, 4, 4)), features(2, a=(2, width, 4, 4))
    cwd = prepared(ChannelWise(layers=["a"]), own, wanted)

    def shifted(one):
        f = one.features["a"]
        return Signal(one.logits, {"a": f + torch.randn(2, f.shape[1], 1, 1)})

    assert cwd(shifted(own), shifted(wanted)).item() == close(cwd(own, wanted).item())


# --- mgd


@pytest.mark.parametrize("masked", [0, 0.5, 0.65])
@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_mgd_makes_the_teachers_features_from_what_is_left(family, masked):
    _, own, wanted, path = both(family)
    mgd = prepared(MGD(layers=[path], masked=masked), own, wanted)
    f, t = arrays(own)[path], arrays(wanted)[path]
    shape = (N, 1, 2, 2) if family == "cnn" else (N, 3, 1)
    torch.manual_seed(5)
    kept = (torch.rand(shape) >= masked).numpy()
    assert kept.all() == (masked == 0)
    torch.manual_seed(5)
    loss = mgd(own, wanted).item()

    parts = mgd.adapters[0]
    x = pointwise(parts["align"], pooled(f, t)) * kept
    x, t = (x, t) if family == "cnn" else (x.swapaxes(1, 2), t.swapaxes(1, 2))
    first, _, last = parts["generate"]
    made = convolved(last, np.maximum(convolved(first, x), 0))
    assert loss == close(((made - t) ** 2).sum() / N)


def test_mgd_draws_its_masks_anew():
    own, wanted = features(1, a=(2, 3, 8, 8)), features(2, a=(2, 3, 8, 8))
    mgd = prepared(MGD(layers=["a"]), own, wanted)
    assert mgd(own, wanted).item() != mgd(own, wanted).item()
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(mgd(own, wanted).item())
    assert values[0] == values[1]


# --- vid


@pytest.mark.parametrize("family", ["cnn", "transformer", "vectors"])
def test_vid_is_the_likelihood_of_the_teachers_features(family):
    _, own, wanted, path = both(family)
    vid = prepared(VID(layers=[path]), own, wanted)
    guess = vid.adapters[0]
    with torch.no_grad():
        guess.scale += torch.linspace(-9, 1, len(guess.scale), dtype=torch.float64)
    f, t = arrays(own)[path], arrays(wanted)[path]
    mean = positions(pooled(f, t))
    for layer in list(guess.regressor)[::2]:
        w = layer.weight.detach().numpy()[..., 0]
        mean = np.einsum("oi,nip->nop", w, mean)
        mean = np.maximum(mean, 0) if layer is not guess.regressor[-1] else mean
    variance = np.log(1 + np.exp(guess.scale.detach().numpy())) + 1e-5
    value = 0.0
    for n, c, p in product(*(range(k) for k in mean.shape)):
        off = positions(t)[n, c, p] - mean[n, c, p]
        value += np.log(np.sqrt(variance[c])) + off**2 / (2 * variance[c])
    assert vid(own, wanted).item() == close(value / mean.size)


def test_vid_begins_with_a_variance_of_five():
    own, wanted = features(1, a=(2, 3)), features(2, a=(2, 4))
    scale = prepared(VID(layers=["a"]), own, wanted).adapters[0].scale
    assert torch.nn.functional.softplus(scale).tolist() == pytest.approx([5 - 1e-5] * 4)


# --- ofd


def ofd_formula(overhaul: Overhaul, own: np.ndarray, wanted: np.ndarray) -> float:
    t = positions(wanted)
    layer = overhaul.adapters[0].layers[0]
    w = layer.weight.detach().numpy()[..., 0]
    s = normalised(np.einsum("oi,nip->nop", w, positions(pooled(own, wanted))))
    total = 0.0
    for c in range(t.shape[1]):
        negative = t[:, c][t[:, c] < 0]
        margin = negative.mean() if len(negative) else 0.0
        for a, b in zip(np.maximum(t[:, c], margin).ravel(), s[:, c].ravel(), strict=True):
            total += 0 if b <= a <= 0 else (a - b) ** 2
    return total / len(t)


@pytest.mark.parametrize("family", ["cnn", "transformer", "vectors"])
def test_ofd_skips_what_is_negative_in_both(family):
    _, own, wanted, path = both(family)
    wanted.features[path][:, 0] = wanted.features[path][:, 0].abs()
    overhaul = prepared(Overhaul(layers=[path]), own, wanted)
    value = ofd_formula(overhaul, arrays(own)[path], arrays(wanted)[path])
    assert overhaul(own, wanted).item() == close(value)


def test_ofds_margins_are_kept_from_the_first_batch_and_saved():
    own, first = features(1, a=(3, 2, 4, 4)), features(2, a=(3, 3, 4, 4))
    overhaul = prepared(Overhaul(layers=["a"]), own, first)
    margin = overhaul.adapters[0].margin
    low = first.features["a"].transpose(0, 1).flatten(1)
    expected = [row[row < 0].mean().item() for row in low]
    assert margin.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    overhaul(own, features(4, a=(3, 3, 4, 4)))
    assert margin.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert any("margin" in name for name in overhaul.state_dict())
    assert not any("margin" in name for name, _ in overhaul.named_parameters())


def test_a_student_below_the_teachers_negative_responses_costs_nothing():
    own, wanted = features(1, a=(4, 2, 3, 3)), features(2, a=(4, 2, 3, 3))
    wanted = Signal(wanted.logits, {"a": -wanted.features["a"].abs()})
    overhaul = prepared(Overhaul(layers=["a"]), own, wanted)
    with torch.no_grad():
        overhaul.adapters[0].layers[1].bias.fill_(-50)
    assert overhaul(own, wanted).item() == 0


# --- reviewkd


def contexts(o: np.ndarray, t: np.ndarray) -> float:
    """Of maps 8×8 or 4×4."""

    def gap(size):
        def small(f):
            n, c, h, w = f.shape
            return f.reshape(n, c, size, h // size, size, w // size).mean((3, 5))

        return ((small(o) - small(t)) ** 2).mean()

    sizes = [size for size in (4, 2, 1) if size < t.shape[2]]
    weights = [0.5 ** (k + 1) for k in range(len(sizes))]
    pooled_ones = sum(w * gap(size) for w, size in zip(weights, sizes, strict=True))
    return (((o - t) ** 2).mean() + pooled_ones) / (1 + sum(weights))


def test_reviewkd_fuses_from_deep_to_shallow():
    own = features(1, a=(3, 2, 16, 16), b=(3, 3, 8, 8), c=(3, 5, 4, 4))
    wanted = features(2, a=(3, 4, 8, 8), b=(3, 6, 8, 8), c=(3, 7, 4, 4))
    review = prepared(Review(layers=["a", "b", "c"]), own, wanted)
    s, t = arrays(own), arrays(wanted)
    losses, deeper = [], None
    for path, fusion in reversed(list(zip("abc", review.adapters, strict=True))):
        x = normalised(pointwise(fusion.into[0], s[path]))
        assert x.shape[1] == 5, "as wide as the student's last layer"
        if deeper is not None:
            u = deeper.repeat(2, 2).repeat(2, 3)
            z = 1 / (1 + np.exp(-pointwise(fusion.attend[0], np.concatenate((x, u), 1))))
            x = x * z[:, :1] + u * z[:, 1:]
        deeper = x
        o = normalised(convolved(fusion.out[0], pooled(x, t[path])))
        losses.append(contexts(o, t[path]))
    assert review(own, wanted).item() == close(np.mean(losses))
    assert not hasattr(review.adapters[2], "attend"), "nothing is deeper than the last layer"


# --- factor-transfer


def factors_formula(criterion: FactorTransfer, own: np.ndarray, wanted: np.ndarray, share: float):
    parts = criterion.adapters[0]

    def encoded(part, x):
        for layer in list(part)[::2]:
            x = leaky(convolved(layer, x))
        return x

    def unit(f):
        flat = f.reshape(len(f), -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    made = encoded(parts["paraphrase"], wanted)
    first, _, second, _, last = parts["restore"]
    restored = convolved(last, leaky(convolved(second, leaky(convolved(first, made)))))
    lost = ((restored - wanted) ** 2).mean()
    apart = np.abs(unit(made) - unit(encoded(parts["translate"], pooled(own, wanted)))).mean()
    return apart + share * lost


@pytest.mark.parametrize("settings", [{}, {"rate": 0.75, "reconstruction": 0.3}])
def test_factor_transfer_compares_compressed_features(settings):
    _, own, wanted, path = both("cnn")
    factors = prepared(FactorTransfer(layers=[path], **settings), own, wanted)
    assert factors.adapters[0]["translate"][-2].out_channels == (4 if settings else 3)
    f, t = arrays(own)[path], arrays(wanted)[path]
    value = factors_formula(factors, f, t, settings.get("reconstruction", 0.002))
    assert factors(own, wanted).item() == close(value)


def test_a_paraphraser_learns_to_restore_and_nothing_else():
    own, wanted = features(1, a=(2, 2, 4, 4)), features(2, a=(2, 4, 4, 4))
    factors = prepared(FactorTransfer(layers=["a"], reconstruction=0.5), own, wanted)
    parts = factors.adapters[0]
    factors(own, wanted).backward()
    t = wanted.features["a"]
    names = ("paraphrase", "restore")
    trained = [p for name in names for p in parts[name].parameters()]
    lost = 0.5 * (parts["restore"](parts["paraphrase"](t)) - t).square().mean()
    for parameter, gradient in zip(trained, torch.autograd.grad(lost, trained), strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=0, atol=TOLERANCE)


# --- minilm

SPLIT = {"query": "q", "key": "k", "value": "v"}


def minilm_formula(own: dict, wanted: dict, relations: list[str], heads: int) -> float:
    def related(given, relation):
        a, b = (given[name] for name in relation.split("-"))
        n, t, d = a.shape
        size = d // heads
        made = np.zeros((n, heads, t, t))
        for i, h in product(range(n), range(heads)):
            part = slice(h * size, (h + 1) * size)
            made[i, h] = softmax(a[i, :, part] @ b[i, :, part].T / np.sqrt(size))
        return made

    return sum(divergence(related(wanted, r), related(own, r)).mean() for r in relations)


def named(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: given[path] for name, path in SPLIT.items()}


@pytest.mark.parametrize(
    "relations", [None, ["query-key", "value-value"], ["key-query", "value-key"]]
)
@pytest.mark.parametrize("heads", [1, 2])
def test_minilm_is_the_divergence_of_relations_head_by_head(relations, heads):
    own = features(1, q=(3, 5, 4), k=(3, 5, 4), v=(3, 5, 4))
    wanted = features(2, q=(3, 5, 6), k=(3, 5, 6), v=(3, 5, 6))
    settings = {} if relations is None else {"relations": relations}
    minilm = MiniLM(layers=[SPLIT], heads=heads, **settings)
    names = relations or ["query-query", "key-key", "value-value"]
    value = minilm_formula(named(arrays(own)), named(arrays(wanted)), names, heads)
    assert minilm(own, wanted).item() == close(value)
    assert value > 0.1


def test_a_fused_projection_is_split_in_three_and_layers_count_by_their_mean():
    apart = features(1, q=(3, 5, 4), k=(3, 5, 4), v=(3, 5, 4))
    f = apart.features
    fused = Signal(apart.logits, {"qkv": torch.cat((f["q"], f["k"], f["v"]), 2)})
    wanted = features(2, q=(3, 5, 6), k=(3, 5, 6), v=(3, 5, 6))
    expected = MiniLM(layers=[SPLIT], heads=2)(apart, wanted).item()
    layer = {"student": "qkv", "teacher": SPLIT}
    assert MiniLM(layers=[layer], heads=2)(fused, wanted).item() == close(expected)
    assert MiniLM(layers=[layer, layer], heads=2)(fused, wanted).item() == close(expected)


def test_equal_relations_are_nothing_to_minilm_whatever_the_widths():
    own = features(1, q=(3, 5, 4), k=(3, 5, 4), v=(3, 5, 4))
    wider = {
        path: (2**0.25 * f.unflatten(2, (2, 2)).repeat_interleave(2, 3) / 2**0.5).flatten(2)
        for path, f in own.features.items()
    }
    wanted = Signal(own.logits, wider)
    assert MiniLM(layers=[SPLIT], heads=2)(own, wanted).item() == pytest.approx(0, abs=1e-14)
    assert MiniLM(layers=[SPLIT], heads=1)(own, wanted).item() == pytest.approx(0, abs=1e-14)
    assert MiniLM(layers=[SPLIT], heads=4)(own, own).item() == 0


def test_minilm_reads_timms_fused_projections_as_timm_does():
    vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    nets = [
        vit.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=width, depth=1, num_heads=2, num_classes=CLASSES
        ).double()
        for width in (8, 12)
    ]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    own, wanted = (signal(net.eval(), x, "blocks.0.attn.qkv") for net in nets)
    minilm = MiniLM(layers=["blocks.0.attn.qkv"], heads=2, relations=["query-key"])

    def attention(one, size):
        f = one.features["blocks.0.attn.qkv"].detach()
        q, k, _ = f.reshape(2, 5, 3, 2, size).permute(2, 0, 3, 1, 4).numpy()
        return softmax(q @ k.swapaxes(-1, -2) / np.sqrt(size))

    value = divergence(attention(wanted, 6), attention(own, 4)).mean()
    assert minilm(own, wanted).item() == close(value)


# --- what all promise

MAPS = (features(1, a=(3, 2, 3, 3), b=(3, 3, 2, 2)), features(2, a=(3, 3, 3, 3), b=(3, 2, 2, 2)))
TOKENS = (features(1, a=(2, 4, 2), b=(2, 4, 6)), features(2, a=(2, 4, 3), b=(2, 4, 6)))
VECTORS = (features(1, a=(3, 2)), features(2, a=(3, 3)))

CASES = {
    "fsp maps": (lambda: FSP(flows=[["a", "b"]]), MAPS),
    "fsp tokens": (lambda: FSP(flows=[["a", "b"]]), TOKENS),
    "nst maps": (lambda: NST(layers=["a", "b"]), MAPS),
    "nst tokens": (lambda: NST(layers=["a"], offset=0.5, degree=3), TOKENS),
    "nst linear": (lambda: NST(layers=["a"], kernel="linear"), MAPS),
    "cwd maps": (lambda: ChannelWise(layers=["a", "b"]), MAPS),
    "cwd tokens": (lambda: ChannelWise(layers=["a"]), TOKENS),
    "mgd maps": (lambda: MGD(layers=["a"]), MAPS),
    "mgd tokens": (lambda: MGD(layers=["a"]), TOKENS),
    "vid maps": (lambda: VID(layers=["a"]), MAPS),
    "vid tokens": (lambda: VID(layers=["a"]), TOKENS),
    "vid vectors": (lambda: VID(layers=["a"]), VECTORS),
    "ofd maps": (lambda: Overhaul(layers=["a"]), MAPS),
    "ofd tokens": (lambda: Overhaul(layers=["a"]), TOKENS),
    "ofd vectors": (lambda: Overhaul(layers=["a"]), VECTORS),
    "reviewkd maps": (lambda: Review(layers=["a", "b"]), MAPS),
    "factor-transfer maps": (lambda: FactorTransfer(layers=["a"]), MAPS),
    "minilm tokens": (lambda: MiniLM(layers=["b"], heads=2), TOKENS),
}

every_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[Criterion, Signal, Signal]:
    make, (own, wanted) = CASES[case]
    return prepared(make(), own, wanted), own, wanted


@every_case
def test_gradients_are_right(case):
    criterion, own, wanted = made(case)
    paths = list(criterion.student_layers)
    names = [n for n, _ in criterion.named_parameters() if "paraphrase" not in n]  # see factors
    trained = dict(criterion.named_parameters())

    def loss(*tensors):
        torch.manual_seed(7)
        inputs, parameters = tensors[: len(paths)], tensors[len(paths) :]
        seen = Signal(own.logits, {**own.features, **dict(zip(paths, inputs, strict=True))})
        return functional_call(criterion, dict(zip(names, parameters, strict=True)), (seen, wanted))

    tensors = [own.features[p] for p in paths] + [trained[n] for n in names]
    assert torch.autograd.gradcheck(
        loss, tuple(x.detach().clone().requires_grad_() for x in tensors), fast_mode=True
    )


@every_case
def test_every_trained_parameter_is_used_and_its_own(case):
    criterion, own, wanted = made(case)
    if case.startswith(("nst", "minilm")):
        assert not criterion.state_dict(), "nothing of its own"
        return
    criterion(own, wanted).backward()
    for name, parameter in criterion.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part, which stops training on several"
        assert parameter.dtype == torch.float64


@every_case
def test_a_criterion_goes_on_from_what_a_checkpoint_kept_of_it(case):
    criterion, own, wanted = made(case)
    criterion(own, wanted)
    other = CASES[case][0]()
    torch.manual_seed(99)
    other.prepare(own, wanted)
    other.load_state_dict(criterion.state_dict())
    values = []
    for one in (criterion, other):
        torch.manual_seed(7)
        values.append(one.eval()(own, wanted).item())
    assert values[0] == values[1]


@every_case
def test_half_precision_features_are_compared_in_single(case):
    make, (own, wanted) = CASES[case]

    def half(one):
        return Signal(one.logits, {path: f.bfloat16() for path, f in one.features.items()})

    def single(one):
        return Signal(one.logits, {path: f.float() for path, f in one.features.items()})

    criterion = prepared(make(), half(own), half(wanted))
    assert all(p.dtype == torch.float32 for p in criterion.parameters())
    values = []
    for form in (half, lambda one: single(half(one))):
        torch.manual_seed(7)
        loss = criterion(form(own), form(wanted))
        assert loss.dtype == torch.float32
        values.append(loss.item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@every_case
def test_channels_innermost_in_memory_and_bfloat16_are_nothing_special(case):
    criterion, own, wanted = made(case)
    criterion.float().eval()

    def laid_out(one, form):
        given = one.features.items()
        return Signal(one.logits, {p: f.float().to(memory_format=form(f)) for p, f in given})

    def innermost(f):
        return torch.channels_last if f.dim() == 4 else torch.contiguous_format

    values = []
    for form in (lambda f: torch.contiguous_format, innermost):
        torch.manual_seed(7)
        values.append(criterion(laid_out(own, form), laid_out(wanted, form)).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    own = laid_out(own, innermost)
    for f in own.features.values():
        f.requires_grad_()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(own, laid_out(wanted, innermost))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(values[0], rel=0.1)
    used = [own.features[path] for path in criterion.student_layers]
    assert all(torch.isfinite(f.grad).all() for f in used)


@pytest.mark.parametrize("case", ["nst maps", "nst linear", "minilm tokens", "fsp tokens"])
def test_a_training_in_bfloat16_does_not_narrow_products(case):
    criterion, own, wanted = made(case)
    criterion.float()
    own, wanted = (
        Signal(one.logits, {path: f.float() for path, f in one.features.items()})
        for one in (own, wanted)
    )
    if case == "fsp tokens":  # its adapters compute as the student does
        own = Signal(own.logits, {**own.features, "a": wanted.features["a"] + 1})
        criterion = prepared(FSP(flows=[["a", "b"]]), own, wanted)
    exact = criterion(own, wanted).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert criterion(own, wanted).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FSP(flows=[["a", "b"]]),
        *(lambda k=k: NST(layers=["a", "b"], **k) for k in KERNELS),
        lambda: ChannelWise(layers=["a", "b"]),
    ],
)
@pytest.mark.parametrize("one", [MAPS[0], TOKENS[0]])
def test_equal_features_are_nothing(make, one):
    criterion = prepared(make(), one, one)
    assert criterion(one, one).item() == pytest.approx(0, abs=1e-14)


TASK = ImageClassification()
WHOLE = {
    "fsp": {"flows": [["conv", "act"]]},
    **{name: {"layers": ["conv"]} for name in ("nst", "cwd", "mgd", "vid", "ofd")},
    "reviewkd": {"layers": ["conv", "act"]},
    "factor-transfer": {"layers": ["conv"]},
}


def losses_of_a_training(student, teacher, name, settings, x):
    batch = Batch(x, torch.arange(len(x)) % CLASSES, torch.arange(len(x)))
    criterion = criteria.get(name)(**settings)
    source = Teacher(teacher, TASK, layers=criterion.teacher_layers)
    objective = DistillObjective(TASK, source, {name: criterion}, task_weight=0)
    objective.prepare(student, batch)
    trained = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(40):
        loss = sum(objective(student, batch).values())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", WHOLE)
def test_a_student_and_the_adapters_learn_together(name):
    torch.manual_seed(0)
    student, teacher = Cnn(4), Cnn(6, stride=2)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    x = torch.randn(N, 2, 4, 4)
    losses = losses_of_a_training(student, teacher, name, WHOLE[name], x)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert student.state_dict().keys() == before.keys()
    assert not torch.equal(student.conv.weight, before["conv.weight"]), "the student is taught"


def test_a_vision_transformer_learns_a_wider_ones_relations():
    vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    student, teacher = (
        vit.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=width, depth=2, num_heads=2, num_classes=CLASSES
        )
        for width in (8, 12)
    )
    layer = {"student": "blocks.1.attn.qkv", "teacher": "blocks.1.attn.qkv"}
    settings = {"layers": [layer], "heads": 2}
    losses = losses_of_a_training(student, teacher, "minilm", settings, torch.randn(4, 3, 8, 8))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", ADAPTED)
def test_what_trains_adapters_says_to_prepare(kind):
    one = features(1, a=(2, 3, 4, 4))
    with pytest.raises(UsageError, match=f"{kind.__name__} has no adapters yet: call prepare"):
        kind(layers=["a"])(one, one)


def test_fsp_says_to_prepare():
    one = features(1, a=(2, 3, 4, 4))
    with pytest.raises(UsageError, match="FSP has no adapters yet: call prepare"):
        FSP(flows=[["a", "a"]])(one, one)


@pytest.mark.parametrize(
    ("make", "own", "wanted", "said"),
    [
        (lambda: FSP(flows=[["a", "a"]]), (2, 3), (2, 3), r"fsp compares .* gives \(N, 3\)"),
        (lambda: NST(layers=["a"]), (2, 3), (2, 3), r"nst compares .* gives \(N, 3\)"),
        (lambda: NST(layers=["a"]), (2, 5, 3), (2, 4, 3), "5 tokens and the teacher's 4"),
        (lambda: ChannelWise(layers=["a"]), (2, 3), (2, 3), r"cwd compares .* gives \(N, 3\)"),
        (lambda: MGD(layers=["a"]), (2, 3), (2, 3), r"mgd compares .* gives \(N, 3\)"),
        (lambda: VID(layers=["a"]), (2, 3), (2, 3, 4), "can't be compared"),
        (lambda: Overhaul(layers=["a"]), (2, 5, 3), (2, 4, 3), "5 tokens and the teacher's 4"),
        (lambda: Review(layers=["a"]), (2, 5, 3), (2, 5, 3), r"reviewkd compares maps .*\(N, 5, 3"),
        (
            lambda: FactorTransfer(layers=["a"]),
            (2, 3),
            (2, 3),
            r"factor-transfer compares maps \(N, C, H, W\), and a layer gives \(N, 3\)",
        ),
        (
            lambda: MiniLM(layers=["a"], heads=2),
            (2, 3),
            (2, 3),
            r"query, key and value of 'a' need tokens \(N, T, D\) with D a multiple of 3",
        ),
        (
            lambda: MiniLM(layers=["a"], heads=4),
            (2, 5, 18),
            (2, 5, 12),
            r"4 heads of 'a' need tokens \(N, T, D\) with D a multiple of 4",
        ),
        (
            lambda: MiniLM(layers=["a"], heads=2),
            (2, 5, 12),
            (2, 4, 12),
            "relates 5 tokens and the teacher's 4",
        ),
    ],
)
def test_features_that_make_no_sense_are_refused_in_a_sentence(make, own, wanted, said):
    criterion = make()
    with pytest.raises(UsageError, match=said):
        one, other = features(1, a=own), features(2, a=wanted)
        criterion.prepare(one, other)
        criterion(one, other)


def test_a_flow_between_a_map_and_tokens_is_refused():
    one = features(1, a=(2, 3, 4, 4), b=(2, 5, 3))
    fsp = prepared(FSP(flows=[["a", "b"]]), one, one)
    with pytest.raises(UsageError, match="a flow goes between two layers that give maps"):
        fsp(one, one)


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (FSP, {}, "flows Field required"),
        (FSP, {"flows": []}, "flows List should have at least 1 item"),
        (FSP, {"flows": ["a", "b"]}, "flows.0 is two layers, from and to, not 'a'"),
        (FSP, {"flows": [["a"]]}, "flows.0.student.1 Field required"),
        (FSP, {"flows": [{"student": ["a", "b"]}]}, "flows.0.teacher Field required"),
        (NST, {"layers": ["a"], "kernel": "cubic"}, "kernel should be 'polynomial', 'linear' or"),
        (NST, {"layers": ["a"], "degree": 0}, "degree should be greater than or equal to 1, not 0"),
        (ChannelWise, {"layers": ["a"], "temperature": 0}, "temperature should be greater than"),
        (ChannelWise, {"layers": ["a"], "temprature": 1}, "did you mean 'temperature'"),
        (MGD, {"layers": ["a"], "masked": 1}, "masked should be less than 1, not 1"),
        (MGD, {"layers": ["a"], "masked": -0.1}, "masked should be greater than or equal to 0"),
        (FactorTransfer, {"layers": ["a"], "rate": 0}, "rate should be greater than 0, not 0"),
        (FactorTransfer, {"layers": ["a"], "reconstruction": 0}, "reconstruction should be great"),
        (MiniLM, {"layers": ["a"], "heads": 0}, "heads should be greater than or equal to 1"),
        (MiniLM, {"layers": ["a"], "relations": ["query"]}, "relations.0 should be 'query-query'"),
        (MiniLM, {"layers": [{"query": "a"}]}, "layers.0.student.key Field required"),
        (MiniLM, {"layers": [{"student": "a"}]}, "layers.0.teacher Field required"),
        (MiniLM, {"layers": [{"student": "a", "teacher": "b", "x": 1}]}, "layers.0.x Extra inputs"),
    ],
)
def test_wrong_settings_are_named(kind, arguments, said):
    with pytest.raises(UsageError, match=f"{kind.__name__}: .*{said}"):
        kind(**arguments)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fsp", {"flows": [["a", "b"], {"student": ["a", "b"], "teacher": ["c", "d"]}]}),
        ("minilm", {"layers": ["qkv", SPLIT, {"student": "qkv", "teacher": SPLIT}]}),
    ],
)
def test_settings_written_out_in_a_recipe_mean_the_same(name, settings):
    out = written({name: settings})
    assert written(out) == out
    one, other = criteria.get(name)(**settings), criteria.get(name)(**out[name])
    assert one.settings == other.settings
    assert one.student_layers == other.student_layers


def test_they_are_registered_and_described():
    names = {*WHOLE, "minilm"}
    assert names <= set(criteria.names())
    for name in names:
        text = criteria.describe()[name]
        assert text.endswith(".") and len(text) < 110, name
