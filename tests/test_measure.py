"""Figures are honest: intervals cover, drops are paired, costs are counted, memory is measured."""

import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

from attar.errors import BundleError
from attar.measure.cost import macs, nonzero, parameters
from attar.measure.intervals import (
    bootstrap_interval,
    paired_bootstrap_drop,
    paired_share_drop,
    ratio_interval,
    share_interval,
)
from attar.measure.latency import time_interleaved
from attar.measure.machine import environment, package_version
from attar.measure.memory import session_memory_mb
from attar.measure.processor import cpu_name, instructions, saturates
from attar.runtimes import _predict, runtimes
from attar.runtimes.bundle import write_bundle

hits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60).map(np.array)
pairs = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 2), min_size=1, max_size=60)


def mean(statistics: np.ndarray) -> float:
    return float(statistics[:, 0].mean())


# --- intervals


@given(hits)
def test_shares_have_wilsons_interval(right):
    ours = share_interval(right)
    theirs = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    assert ours.value == right.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def coverage(interval, truth: float, trials: int) -> float:
    """The share of simulated experiments whose interval holds the truth."""
    held = 0
    for trial in range(trials):
        found = interval(np.random.default_rng(trial))
        held += found.low <= truth <= found.high
    return held / trials


@pytest.mark.parametrize(("n", "most"), [(30, 0.995), (400, 0.97)])
def test_paired_drops_cover_the_truth(n, most):
    """Cells: right both times, lost, won, wrong both times."""
    cells = [0.85, 0.07, 0.03, 0.05]

    def once(random):
        cell = random.choice(4, size=n, p=cells)
        before, after = np.isin(cell, [0, 1]) * 1.0, np.isin(cell, [0, 2]) * 1.0
        return paired_share_drop(before, after)

    assert 0.93 <= coverage(once, 0.07 - 0.03, 1000) <= most


@given(pairs)
def test_a_paired_drop_counts_what_was_lost_and_won(pairs):
    before, after = np.array(pairs).T
    drop = paired_share_drop(before, after)
    assert drop.value == pytest.approx(before.mean() - after.mean())
    assert -1 <= drop.low < drop.high <= 1
    back = paired_share_drop(after, before)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-drop.value, -drop.high, -drop.low), abs=1e-12
    )


def test_no_change_is_not_no_doubt():
    few, many = (paired_share_drop(np.ones(n), np.ones(n)) for n in (20, 2000))
    assert few.value == many.value == 0
    assert few.low < -0.01 and few.high > 0.01
    assert 0 < many.high < few.high / 50


def test_pairing_is_worth_it():
    """Two networks that err on the same examples differ less surely than their scores suggest."""
    right = np.repeat([1.0, 0.0], [900, 100])
    other = right.copy()
    other[:5] = 0
    paired = paired_share_drop(right, other)
    alone = share_interval(right)
    assert paired.low > 0
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_bootstraps_cover_the_truth():
    def once(random):
        return bootstrap_interval(mean, random.exponential(size=(60, 1)), seed=1)

    assert coverage(once, 1.0, 30) >= 0.85


def test_paired_bootstraps_cover_the_truth():
    def once(random):
        before = random.normal(size=(60, 1))
        return paired_bootstrap_drop(mean, before, before - random.normal(0.3, 1, (60, 1)), seed=1)

    assert coverage(once, 0.3, 30) >= 0.85


def test_a_bootstrap_agrees_with_the_closed_form():
    right = (np.arange(500) % 10 > 0) * 1.0
    other = np.where(np.arange(500) % 25 == 1, 0.0, right)
    closed, drawn = share_interval(right), bootstrap_interval(mean, right[:, None])
    assert drawn[:3] == pytest.approx(closed[:3], abs=0.005)
    closed = paired_share_drop(right, other)
    drawn = paired_bootstrap_drop(mean, right[:, None], other[:, None])
    assert drawn[:3] == pytest.approx(closed[:3], abs=0.005)


def test_a_bootstrap_is_the_same_each_time_and_differs_by_seed():
    values = np.random.default_rng(0).normal(size=(40, 1))
    assert bootstrap_interval(mean, values) == bootstrap_interval(mean, values)
    assert bootstrap_interval(mean, values) != bootstrap_interval(mean, values, seed=1)


def test_where_less_is_better_a_rise_is_a_drop():
    random = np.random.default_rng(0)
    before = random.normal(10, 1, (50, 1))
    after = before + random.normal(2, 0.1, (50, 1))  # say, perplexity
    worse = paired_bootstrap_drop(mean, before, after, higher_is_better=False)
    assert 1.9 < worse.low < worse.value < worse.high < 2.1
    better = paired_bootstrap_drop(mean, before, after)
    assert better.value == pytest.approx(-worse.value)


def test_resamples_without_a_value_are_left_out():
    """A resample of one class alone has no AUC."""
    positive = np.array([0.0] * 11 + [1.0])
    score = np.concatenate([np.linspace(0, 1, 11), [0.95]])

    def auc(rows):
        ill, well = rows[rows[:, 0] == 1, 1], rows[rows[:, 0] == 0, 1]
        return float((ill[:, None] > well).mean()) if len(ill) and len(well) else float("nan")

    found = bootstrap_interval(auc, np.stack([positive, score], axis=1))
    assert found.value == pytest.approx(10 / 11)
    assert 0.5 < found.low < found.value < found.high <= 1


def test_equal_series_have_the_ratio_one():
    times = np.random.default_rng(0).uniform(1, 9, 30)
    assert ratio_interval(times, times)[:3] == (1, 1, 1)
    noise = np.random.default_rng(1).lognormal(0, 0.05, 30)
    found = ratio_interval(times * noise, times)
    assert found.low < 1 < found.high


def test_ratios_are_paired_by_round():
    """The machine's speed drifts tenfold; the ratio doesn't."""
    drift = np.linspace(1, 10, 30)
    found = ratio_interval(drift * np.random.default_rng(0).uniform(1.9, 2.1, 30), drift)
    assert 1.9 <= found.low <= found.value <= found.high <= 2.1


# --- costs


def conv_macs(c_in, c_out, kernel, out, groups=1):
    return out * out * c_out * (c_in // groups) * kernel * kernel


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


def images(channels: int) -> tuple[torch.Tensor]:
    return (torch.zeros(3, channels, 8, 8),)


TOKENS = torch.randn(3, 5, 8)
HEADS = torch.randn(3, 2, 5, 4)
PROJECTIONS = 4 * 5 * 8 * 8
PRODUCTS = 2 * 2 * 5 * 5 * 4


@pytest.mark.parametrize(
    ("module", "example", "count"),
    [
        (nn.Linear(7, 11), (torch.zeros(3, 7),), 77),
        (nn.Conv2d(4, 6, 3, padding=1), images(4), conv_macs(4, 6, 3, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), images(4), conv_macs(4, 6, 3, 4)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), images(4), conv_macs(4, 8, 3, 8, groups=2)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), images(4), conv_macs(4, 4, 3, 8, groups=4)),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)), images(4), 0),
        (Attention(), (HEADS, HEADS, HEADS), PRODUCTS),
        (SelfAttention(), (TOKENS,), PROJECTIONS + PRODUCTS),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (TOKENS,),
            PROJECTIONS + PRODUCTS + 2 * 5 * 8 * 16,
        ),
    ],
    ids=["linear", "conv", "stride", "grouped", "depthwise", "none", "sdpa", "heads", "encoder"],
)
def test_macs_by_hand(module, example, count):
    module.train()
    assert macs(module, example) == count
    assert all(m.training for m in module.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_parameters_count_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].weight[0] = 0
        net[0].bias.fill_(2)
    assert parameters(net) == 16 + 4
    assert nonzero(net) == 12 + 4


# --- latency


def test_calls_take_turns_in_rotating_order():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = time_interleaved(calls, seconds=0.01, rounds=6)
    assert list(found) == ["a", "b", "c"]
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    measured = "".join(turns).removeprefix("abc")  # the warm-up
    assert measured == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"
    for figures in found.values():
        assert figures.keys() == {"p50_ms", "p90_ms", "n", "round_ms"}
        assert 0 < figures["p50_ms"] <= figures["p90_ms"]
        assert len(figures["round_ms"]) == 6 <= figures["n"]
    json.dumps(found)


def test_slower_calls_have_larger_figures():
    found = time_interleaved(
        {"long": lambda: sum(range(20000)), "short": lambda: sum(range(200))},
        seconds=0.02,
        rounds=5,
    )
    ratio = ratio_interval(*(np.array(found[n]["round_ms"]) for n in ("long", "short")))
    assert ratio.low > 10
    assert found["short"]["n"] > found["long"]["n"]


# --- the machine


def test_the_environment_says_where_figures_come_from():
    told = environment()
    assert told.keys() == {
        "python",
        "system",
        "cpu",
        "instructions",
        "cores",
        "memory_gb",
        "packages",
    }
    assert told["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["cores"] >= 1 and told["memory_gb"] > 0 and told["cpu"]
    assert json.loads(json.dumps(told)) == told
    assert package_version("a-package-that-nobody-made") is None


# --- memory

WEIGHTS_MB = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle of a known size."""

    def export(folder):
        weight = np.ones((1000, WEIGHTS_MB * 250), np.float32)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["logits"])],
            "main",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1000])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
            [numpy_helper.from_array(weight, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / "model.onnx")
        return [folder / "model.onnx"]

    return write_bundle(
        tmp_path_factory.mktemp("run") / "bundle",
        runtime=runtimes.get("onnxruntime")(),
        export=export,
        task="image-classification",
        description={"inputs": [{"name": "x"}], "outputs": [{"name": "logits"}]},
        golden=(np.ones((2, 1000), np.float32),),
    ).folder


def test_a_sessions_memory_holds_its_weights_and_not_the_runtime(bundle):
    assert WEIGHTS_MB * 0.9 < session_memory_mb(bundle, "onnxruntime") < WEIGHTS_MB * 4


def test_a_bundle_that_does_not_load_is_named(bundle, tmp_path):
    (tmp_path / "golden.npz").write_bytes((bundle / "golden.npz").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError, match=r"does not load in a fresh process: .+") as caught:
        session_memory_mb(tmp_path, "onnxruntime")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("fpu avx2 fma", "x86_64", True),
        ("fpu avx2 avx512_vnni", "x86_64", False),
        ("fpu avx2 avx_vnni", "AMD64", False),
        ("", "aarch64", False),
    ],
)
def test_the_processor_says_whether_byte_products_overflow(flags, machine, expected, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : {flags}\n")
    assert saturates(info, machine) is expected


def test_processors_of_one_name_are_told_apart(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: AMD EPYC\nflags\t: fpu avx2 avx512_vnni\n")
    assert cpu_name(info) == "AMD EPYC"
    assert instructions(info) == ["avx2", "avx512_vnni"]
    info.write_text("processor : 0\nFeatures : fp asimd asimddp\n")
    assert instructions(info) == ["asimddp"]
    assert instructions(tmp_path / "missing") == []


def test_an_x86_processor_that_cannot_be_asked_is_taken_to_overflow(tmp_path):
    assert saturates(tmp_path / "missing", "x86_64")


def test_a_bundle_alone_knows_the_processor_as_attar_does():
    assert _predict.lacks_vnni() is saturates()
