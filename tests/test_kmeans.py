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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), st.integers(1, 12))
def test_the_clustering_is_the_optimum(values, k):
    ours = kmeans(np.array(values), k)
    theirs = kmeans1d.cluster(values, k)
    optimum = sum(
        (v - theirs.centroids[c]) ** 2 for v, c in zip(values, theirs.clusters, strict=True)
    )
    assert ours.distortion <= optimum * (1 + 1e-9) + 1e-6
    assert (np.diff(ours.codebook) > 0).all()


@pytest.mark.parametrize(("count", "k"), [(30_000, 16), (30_000, 64)])
def test_large_tensors_come_within_a_thousandth_of_the_optimum(count, k):
    values = np.random.default_rng(0).standard_t(3, count)  # heavy tails: outliers matter
    theirs = kmeans1d.cluster(values, k)
    optimum = ((values - np.array(theirs.centroids)[theirs.clusters]) ** 2).sum()
    assert kmeans(values, k).distortion <= optimum * 1.001


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 4)), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_weight_counts_as_so_many_equal_values(pairs):
    values, weights = np.array(pairs, dtype=float).T
    repeated = np.repeat(values, weights.astype(int))
    weighted = kmeans(values, 3, weights)
    assert weighted.distortion == pytest.approx(kmeans(repeated, 3).distortion, abs=1e-6)


