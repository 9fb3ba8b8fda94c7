import kmeans1d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.share import kmeans
from attar.share.buckets import buckets
from attar.share.histogram import BINS, histogram


def optimum(values: np.ndarray, k: int) -> float:
    theirs = kmeans1d.cluster(values, k)
    return float(((values - np.array(theirs.centroids)[theirs.clusters]) ** 2).sum())


def drawn(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "two modes":
        half = count // 2
        return np.concatenate([rng.normal(-1, 0.01, half), rng.normal(1, 0.1, half)])
    kinds = {
        "normal": lambda: rng.standard_normal(count),
        "heavy tails": lambda: rng.standard_t(2, count),
        "far from zero": lambda: rng.normal(100, 0.5, count),
    }
    return kinds[kind]()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.integers(1, 12))
def test_the_clustering_is_the_optimum(values, k):
    ours = kmeans(np.array(values), k)
    assert ours.distortion <= optimum(np.array(values), k) * (1 + 1e-9) + 1e-6
    assert (np.diff(ours.codebook) > 0).all()


@pytest.mark.parametrize(("count", "k"), [(30_000, 16), (30_000, 64)])
def test_large_tensors_come_within_a_thousandth_of_the_optimum(count, k):
    values = np.random.default_rng(0).standard_t(3, count)  # heavy tails: outliers matter
    assert kmeans(values, k).distortion <= optimum(values, k) * 1.001


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two modes", "far from zero"])
def test_so_do_those_of_which_only_a_histogram_is_clustered(kind):
    values = drawn(kind, 2 * BINS).astype(np.float32)
    ours = kmeans(values, 16)
    exact = values.astype(np.float64)
    assert ours.indices.dtype == np.uint8 and ours.indices.shape == values.shape
    assert ours.distortion == pytest.approx(((exact - ours.codebook[ours.indices]) ** 2).sum())
    assert ours.distortion <= optimum(exact, 16) * 1.001


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 4)), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_weight_counts_as_so_many_equal_values(pairs):
    values, weights = np.array(pairs, dtype=float).T
    repeated = np.repeat(values, weights.astype(int))
    for dtype in (np.float64, np.float32):
        weighted = kmeans(values.astype(dtype), 3, weights)
        assert weighted.distortion == pytest.approx(kmeans(repeated, 3).distortion, abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_count_in_a_histogram_too(dtype):
    values = drawn("heavy tails", BINS + 5000).astype(dtype)
    counts = np.random.default_rng(1).integers(1, 4, values.size)
    repeated = np.repeat(values.astype(np.float64), counts)
    assert kmeans(values, 8, counts).distortion <= optimum(repeated, 8) * 1.001


def test_a_single_outlier_does_not_spoil_the_rest():
    values = drawn("normal", 2 * BINS)
    values[7] = 1e5
    ours = kmeans(values.astype(np.float32), 17)
    assert ours.codebook[-1] == 1e5
    assert ours.distortion <= optimum(np.delete(values, 7), 16) * 1.002


@settings(max_examples=25, deadline=None)
@given(
    st.floats(-1e6, 1e6),
    st.sampled_from([1e-3, 1.0, 1e30]),
    st.integers(1, 300),
    st.sampled_from([np.float32, np.float64]),
)
def test_buckets_are_those_of_a_search(offset, spread, count, dtype):
    rng = np.random.default_rng(count)
    values = (offset + spread * rng.standard_t(2, BINS + 1)).astype(dtype)
    starts = np.unique(np.append(rng.choice(values, count - 1), values.min()))
    expected = np.searchsorted(starts, values, side="right") - 1
    assert (buckets(values, starts) == expected).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_histogram_has_the_sums_of_what_lies_in_each_bin(weighted):
    values = drawn("normal", 3 * BINS).astype(np.float32)
    weights = np.random.default_rng(2).random(values.size) + 0.5 if weighted else None
    bins = histogram(values, weights)
    mass = np.ones(values.size) if weights is None else weights / weights.max()
    place = np.searchsorted(bins.lows, values, side="right") - 1
    assert (values <= bins.highs[place]).all()
    for sums, each in (
        (bins.weight, mass),
        (bins.first, mass * (values - bins.centre)),
        (bins.second, mass * (values - bins.centre) ** 2),
    ):
        assert np.allclose(np.diff(sums), np.bincount(place, each), rtol=1e-4, atol=1e-6)
