"""Dividing examples: stratified, and the same for the same seed for ever."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attar.data.config import Subset, Validation
from attar.data.parts import Examples, Parts
from attar.errors import DataError, UsageError

TEST_SHARE = 0.2


class Rows(NamedTuple):
    """Some of a source's examples, by their places in it."""

    examples: Examples
    rows: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        return self.examples.targets[self.rows]

    def carve(self, fraction: float, seed: int) -> tuple[Rows, Rows]:
        """What is left and what was taken: disjoint, stratified."""
        count = round(fraction * len(self.rows))
        taken = draw(self.targets, count, seed, leave_one=True)
        left = np.setdiff1d(np.arange(len(self.rows)), taken)
        return Rows(self.examples, self.rows[left]), Rows(self.examples, self.rows[taken])


class Division(NamedTuple):
    train: Rows
    validation: Rows
    test: Rows
    notes: list[str]


def divided(parts: Parts, validation: Validation | None, seed: int) -> Division:
    """Train, validation and test from what a source has; whatever is decided is in the notes."""
    notes: list[str] = []
    own_validation, own_test = parts.validation, parts.test
    train = _all(parts.train)
    if own_test is None and own_validation is not None:
        own_test, own_validation = own_validation, None
        notes.append("The data have no test split, so their validation split is the test.")
    if own_test is None:
        if validation is not None and validation.from_ == "test":
            raise UsageError("validation can't come from test: the data have no test split")
        train, test = train.carve(TEST_SHARE, seed)
        notes.append(_carved("The data have no test split, so", test, TEST_SHARE, "train", seed))
    else:
        test = _all(own_test)
    if validation is None and own_validation is not None:
        return Division(train, _all(own_validation), test, notes)
    if own_validation is not None:
        notes.append(
            f"The data's own validation split ({len(own_validation):,} examples) is not used, "
            "because the recipe says where validation comes from."
        )
    wanted = validation or Validation()
    if wanted.from_ == "train":
        train, chosen = train.carve(wanted.share, seed)
    else:
        test, chosen = test.carve(wanted.share, seed)
    if not len(chosen.rows) or not len(test.rows):
        raise DataError(
            f"{wanted.from_} has too few examples to take {wanted.share:.0%} of them for validation"
        )
    notes.append(_carved("For validation,", chosen, wanted.share, wanted.from_, seed))
    return Division(train, chosen, test, notes)


def reduced(train: Rows, subset: Subset, seed: int) -> Rows:
    """The part of the training split that the recipe's `subset` asks for."""
    total = len(train.rows)
    count = count_of("a subset", subset.count, subset.fraction, total)
    groups = train.targets if subset.method == "stratified" else np.zeros(total, np.int64)
    return Rows(train.examples, train.rows[draw(groups, count, seed)])


def count_of(what: str, count: int | None, fraction: float | None, total: int) -> int:
    """How many of `total` training examples a count, or else a fraction, asks for; `what` is what
    messages call them. Raises `UsageError` for none, or more than there are."""
    wanted = count or round((fraction or 0) * total)
    if not 1 <= wanted <= total:
        raise UsageError(f"{what} of {wanted:,} can't be drawn from {total:,} training examples")
    return wanted


def draw(targets: np.ndarray, count: int, seed: int, *, leave_one: bool = False) -> np.ndarray:
    """`count` places, sorted, with every class in its share to within one example.

    leave_one: never take all of a class, if need be by taking fewer than `count`.

    NumPy promises that `RandomState`'s stream never changes, so neither do the splits.
    """
    random = np.random.RandomState(seed % 2**32)
    labels, places = np.unique(targets, return_inverse=True)
    sizes = np.bincount(places, minlength=len(labels))
    quotas = quota(sizes, count, sizes - leave_one)
    shuffled = random.permutation(len(targets))
    by_class = shuffled[np.argsort(places[shuffled], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    taken = [by_class[s : s + q] for s, q in zip(starts, quotas, strict=True)]
    return np.sort(np.concatenate(taken)) if taken else np.empty(0, np.int64)


def quota(sizes: np.ndarray, count: int, limit: np.ndarray) -> np.ndarray:
    """How many of each class: its share rounded down, then one more where most was cut off.

    sizes: int64 (classes,), how many there are. limit: int64 (classes,), how many there may be.

    Example:
        >>> quota(np.array([50, 30, 20]), 7, np.array([50, 30, 20])).tolist()
        [4, 2, 1]
    """
    exact = sizes * (count / max(1, sizes.sum()))
    quotas = np.minimum(np.floor(exact + 1e-9).astype(np.int64), limit)
    for label in np.argsort(quotas - exact, kind="stable"):
        if quotas.sum() >= count:
            break
        quotas[label] += quotas[label] < limit[label]
    return quotas


def _all(examples: Examples) -> Rows:
    return Rows(examples, np.arange(len(examples)))


def _carved(why: str, taken: Rows, share: float, where: str, seed: int) -> str:
    return (
        f"{why} {len(taken.rows):,} examples ({share:.0%}) are taken from {where}, "
        f"stratified, by seed {seed}."
    )
