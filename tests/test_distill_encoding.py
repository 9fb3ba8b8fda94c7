"""How answers are kept: what comes back, and what it takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import softmax

from attar.distill.encoding import encoding
from attar.errors import UsageError

FLOATS = st.floats(-50, 50, width=32)
ROWS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(3, 9)).flatmap(
    lambda shape: arrays.arrays(np.float32, shape, elements=FLOATS)
)


def there_and_back(rows: np.ndarray, *how) -> np.ndarray:
    kept = encoding(rows.shape[1:], *how)
    made = kept.encode(rows)
    for name, (kind, shape) in kept.layout.items():
        assert made[name].dtype == kind and made[name].shape == (len(rows), *shape)
    assert sum(a.nbytes for a in made.values()) == kept.row_bytes * len(rows)
    return kept.decode(made)


@given(ROWS)
@settings(deadline=None)
def test_float32_is_exact(rows: np.ndarray) -> None:
    np.testing.assert_array_equal(there_and_back(rows, "float32"), rows)


@given(ROWS)
@settings(deadline=None)
def test_float16_is_rounded(rows: np.ndarray) -> None:
    np.testing.assert_allclose(there_and_back(rows, "float16"), rows, rtol=1e-3, atol=1e-7)


def test_what_float16_cannot_hold_becomes_its_largest() -> None:
    rows = np.array([[1e6, -1e6, 0.5]], np.float32)
    np.testing.assert_array_equal(there_and_back(rows, "float16"), [[65504, -65504, 0.5]])


@given(ROWS)
@settings(deadline=None)
def test_int8_is_off_by_half_a_step(rows: np.ndarray) -> None:
    found = there_and_back(rows, "int8")
    flat = rows.reshape(len(rows), -1)
    step = (flat.max(1) - flat.min(1)) / 255
    bound = 0.5 * step * (1 + 1e-3) + 1e-5
    assert (np.abs(found - rows).reshape(len(rows), -1).max(1) <= bound).all()


@given(ROWS, st.data())
@settings(deadline=None)
def test_top_k_keeps_the_largest_and_the_sum_of_the_rest(rows: np.ndarray, data) -> None:
    k = data.draw(st.integers(1, rows.shape[-1] - 1))
    found = there_and_back(rows, "float32", k)
    wanted, p = softmax(rows.astype(np.float64), -1), softmax(found.astype(np.float64), -1)
    p, wanted = np.sort(p, -1), np.sort(wanted, -1)
    np.testing.assert_allclose(p[..., -k:], wanted[..., -k:], rtol=1e-4, atol=1e-6)
    # what isn't kept shares the rest evenly
    others = p[..., :-k]
    np.testing.assert_allclose(others.sum(-1), wanted[..., :-k].sum(-1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(others.max(-1), others.min(-1), rtol=1e-4)


def test_places_are_as_wide_as_the_classes_need() -> None:
    kinds = {n: encoding((n,), "float16", 2).layout["places"][0] for n in (256, 257, 70_000)}
    assert kinds == {256: np.uint8, 257: np.uint16, 70_000: np.uint32}


def test_the_rest_of_a_thousand_classes_is_their_log_mean() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    kept = encoding((1000,), "float32", 10)
    rest = kept.encode(rows)["rest"]
    for row, found in zip(rows, rest, strict=True):
        others = np.sort(row)[:-10].astype(np.float64)
        assert found == pytest.approx(np.log(np.mean(np.exp(others))), abs=1e-5)


@pytest.mark.parametrize("k", [3, 10])
def test_as_many_as_there_are_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=rf"top_k is {k} and the teacher answers with 3 classes"):
        encoding((3,), "float32", k)
