"""Loaders of a person's own as splits."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from attar.data import LoaderSplit, from_loaders
from attar.data.loaders import StreamSplit, as_split
from attar.errors import DataError, UsageError

INPUTS = torch.arange(22.0)[:, None, None, None].expand(22, 1, 2, 2).contiguous()
TARGETS = torch.arange(22) % 3
PAIRS = TensorDataset(INPUTS, TARGETS)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(INPUTS, TARGETS, strict=True)


def batches() -> list:
    return list(zip(INPUTS.split(5), TARGETS.split(5), strict=True))


KINDS = {
    "loader": lambda: DataLoader(PAIRS, batch_size=4),
    "shuffling loader": lambda: DataLoader(PAIRS, batch_size=4, shuffle=True),
    "data set": lambda: PAIRS,
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "list": batches,
    "function": lambda: lambda: iter(batches()),
    "dicts": lambda: [{"pixel_values": x, "labels": y} for x, y in batches()],
    "arrays": lambda: [(x.numpy().astype(np.float64), y.numpy()[:, None]) for x, y in batches()],
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_gives_pairs_is_read_in_order_in_the_batches_asked_for(kind):
    split = as_split("test", KINDS[kind]())
    found = list(split.batches(8))
    assert len(split) == 22 and [len(b.indices) for b in found] == [8, 8, 6]
    assert torch.equal(torch.cat([b.inputs for b in found]), INPUTS)
    assert torch.equal(torch.cat([b.targets for b in found]), TARGETS)
    assert torch.cat([b.indices for b in found]).tolist() == list(range(22))
    assert found[0].inputs.dtype == torch.float32 and found[0].targets.dtype == torch.int64
    assert [len(b.indices) for b in split.batches(8, drop_last=True)] == [8, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_each_batch(kind):
    split = as_split("train", KINDS[kind]())
    shares = [list(split.batches(8, rank=rank, world=2)) for rank in (0, 1)]
    for batch, *own in zip(split.batches(8), *shares, strict=True):
        assert sorted(torch.cat([b.inputs for b in own]).flatten().tolist()) == sorted(
            batch.inputs.flatten().tolist()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_examples_can_be_picked(kind):
    batch = as_split("test", KINDS[kind]()).pick([7, 2, 21])
    assert batch.inputs[:, 0, 0, 0].tolist() == [7, 2, 21]
    assert batch.targets.tolist() == [1, 2, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_repeat_and_tell_labels_apart(kind):
    made = as_split("test", KINDS[kind]()).fingerprint
    assert made == as_split("test", KINDS[kind]()).fingerprint
    other = TensorDataset(INPUTS, (TARGETS + 1) % 3)
    assert made != as_split("test", DataLoader(other)).fingerprint


def test_a_loaders_data_set_is_shuffled_by_seed_and_epoch():
    split = LoaderSplit("train", DataLoader(PAIRS))

    def order(**kwargs) -> list[int]:
        return torch.cat([b.indices for b in split.batches(5, shuffle=True, **kwargs)]).tolist()

    assert order(seed=1) == order(seed=1) != order(seed=1, epoch=1)
    for batch in split.batches(5, shuffle=True):
        assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.indices)


def test_a_sampler_of_ones_own_chooses_the_examples():
    sampler = WeightedRandomSampler([1.0] + [0.0] * 21, 10)
    split = LoaderSplit("train", DataLoader(PAIRS, sampler=sampler))
    (batch,) = split.batches(16, shuffle=True)
    assert batch.indices.tolist() == [0] * 10
    assert len(next(split.batches(32)).indices) == 22


class Noisy(Dataset):
    """Draws from all three random generators that a person's transforms may use."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int):
        noise = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor(noise), i % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_sets_own_randomness_repeats_and_leaves_the_trainings_alone(workers):
    split = as_split("train", DataLoader(Noisy(), num_workers=workers))

    def drawn(**kwargs):
        return torch.cat([b.inputs for b in split.batches(4, **kwargs)])

    torch.manual_seed(0)
    first = drawn(seed=1)
    after = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(2))
    assert torch.equal(first, drawn(seed=1))
    for generator in range(3):
        assert not torch.equal(first[:, generator], drawn(seed=1, epoch=1)[:, generator])
        assert len(first[:, generator].unique()) == 12


def test_what_can_be_read_only_once_is_refused():
    with pytest.raises(DataError, match="train is an iterator, which can be read only once"):
        from_loaders(iter(batches()), batches(), batches())
    used = iter(batches())
    with pytest.raises(DataError, match="can be read only once"):
        StreamSplit("train", lambda: used)


def test_a_test_stream_that_changes_its_order_is_refused_and_a_training_one_is_not():
    def shuffled():
        order = torch.from_numpy(np.random.default_rng().permutation(22))
        return zip(INPUTS[order].split(11), TARGETS[order].split(11), strict=True)

    assert len(as_split("train", shuffled)) == 22
    with pytest.raises(DataError, match="turn its shuffling off"):
        as_split("test", shuffled)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "gives no examples"),
        (3, "which holds no batches"),
        ([INPUTS], "gives Tensors where"),
        ([(INPUTS, TARGETS, TARGETS)], "tuples of 3 where"),
        ([(INPUTS, TARGETS[:5])], "one label an input"),
        ([{"images": INPUTS, "wrong": TARGETS}], "gives dicts with images, wrong"),
    ],
)
def test_what_gives_no_pairs_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        from_loaders(given if given != 3 else (lambda: 3), batches(), batches())


def test_classes_come_from_the_caller_the_data_set_or_the_labels():
    assert from_loaders(batches(), batches(), batches()).classes == ("0", "1", "2")
    assert from_loaders(batches(), batches(), batches(), classes=4).classes == tuple("0123")
    named = TensorDataset(INPUTS, TARGETS)
    named.classes = ["owl", "jay", "tit"]
    data = from_loaders(named, batches(), batches())
    assert data.classes == ("owl", "jay", "tit")
    with pytest.raises(UsageError, match="label 2, but there are 2 classes"):
        from_loaders(batches(), batches(), batches(), classes=["a", "b"])


def test_splits_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"\(1, 2, 2\) in train and \(1, 2\) in test"):
        from_loaders(batches(), batches(), [(INPUTS[..., 0], TARGETS)])
