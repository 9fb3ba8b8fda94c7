"""A person's own code drawing random numbers: repeatably, and apart from the training's draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def reproducibly(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """The same batches, made with random states of their own, apart from the training's."""
    states = fresh_states(seed)
    end = object()
    with randomness(states):
        iterator = iter(batches)
    while True:
        with randomness(states):
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch


@contextmanager
def randomness(states: dict[str, Any]) -> Iterator[None]:
    """Inside, torch, NumPy and `random` draw from `states`, which move on."""
    before = _random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        states.update(_random_states())
        _set_random_states(before)


def fresh_states(seed: int) -> dict[str, Any]:
    """The three generators' states when each is seeded with `seed`."""
    return {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "numpy": np.random.RandomState(seed % 2**32).get_state(),
        "python": random.Random(seed).getstate(),
    }


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
