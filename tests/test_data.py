"""Splits, augmentation, normalisation: what a person relies on whatever the source is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from attar.data import ArraySplit, DataConfig, load_data
from attar.data.affine import Affine
from attar.data.augment import Augmentation, Crop, mixed, transform
from attar.data.config import Subset, Validation
from attar.data.parts import Examples, Parts
from attar.data.splits import Rows, divided, draw, reduced
from attar.errors import DataError, RecipeError, UsageError

labels = st.lists(st.integers(0, 4), min_size=10, max_size=200).map(np.array)


def digits(**settings_: object):
    return load_data(DataConfig.model_validate({"source": "digits", **settings_}))


def images_of(count: int, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)


def split_of(count: int = 40, augment: list | None = None, **kwargs: object) -> ArraySplit:
    images = images_of(count)
    augmentation = Augmentation(augment or [], images.shape[1:])
    return ArraySplit(
        "train",
        images,
        torch.arange(count) % 4,
        mean=[0.0] * 3,
        std=[1 / 255] * 3,
        augmentation=augmentation,
        **kwargs,
    )


# --- splits


@settings(max_examples=60, deadline=None)
@given(targets=labels, fraction=st.floats(0.05, 0.6), seed=st.integers(0, 2**32 - 1))
def test_a_carved_split_is_disjoint_stratified_and_the_same_for_its_seed(targets, fraction, seed):
    whole = Rows(
        Examples(np.zeros((len(targets), 1, 1, 1), np.uint8), targets), np.arange(len(targets))
    )
    left, taken = whole.carve(fraction, seed)
    assert sorted([*left.rows, *taken.rows]) == list(range(len(targets)))
    for label in np.unique(targets):
        size, got = (targets == label).sum(), (taken.targets == label).sum()
        assert got < size, "a class was taken whole"
        assert got >= np.floor(size * len(taken.rows) / len(targets)) - 1
        assert got <= size * round(fraction * len(targets)) / len(targets) + 1
    assert np.array_equal(whole.carve(fraction, seed)[1].rows, taken.rows)


@settings(max_examples=40, deadline=None)
@given(targets=labels, data=st.data())
def test_a_drawn_subset_has_the_size_asked_for_and_the_classes_in_their_shares(targets, data):
    count = data.draw(st.integers(1, len(targets)))
    rows = draw(targets, count, seed=1)
    assert len(rows) == count == len(set(rows))
    for label in np.unique(targets):
        exact = (targets == label).sum() * count / len(targets)
        assert abs((targets[rows] == label).sum() - exact) < 1


def test_splits_never_change_for_a_seed():
    """A teacher trained last year must find its validation examples outside train today."""
    targets = np.arange(30) % 3
    fixed = [2, 13, 24, 26, 27, 28]
    assert draw(targets, 6, seed=0).tolist() == fixed
    assert draw(targets, 6, seed=1).tolist() != fixed


def parts(train=60, validation=0, test=0) -> Parts:
    def examples(count: int) -> Examples | None:
        return (
            Examples(np.zeros((count, 1, 2, 2), np.uint8), np.arange(count) % 3) if count else None
        )

    return Parts("made", ("a", "b", "c"), examples(train), examples(validation), examples(test))


def sizes(division) -> tuple[int, int, int]:
    return len(division.train.rows), len(division.validation.rows), len(division.test.rows)


def test_validation_is_the_datas_own_or_a_tenth_of_train():
    assert sizes(divided(parts(60, 12, 15), None, 0)) == (60, 12, 15)
    division = divided(parts(60, 0, 15), None, 0)
    assert sizes(division) == (54, 6, 15)
    assert division.notes == [
        "For validation, 6 examples (10%) are taken from train, stratified, by seed 0."
    ]


def test_without_a_test_split_a_fifth_of_train_is_the_test():
    division = divided(parts(60), None, 0)
    assert sizes(division) == (43, 5, 12)
    rows = [set(part.rows) for part in division[:3]]
    assert len(set.union(*rows)) == 60
    assert "no test split" in division.notes[0]


def test_a_lone_validation_split_is_the_test_because_nothing_was_fitted_to_it():
    division = divided(parts(60, 15), None, 0)
    assert sizes(division) == (54, 6, 15)
    assert division.notes[0].startswith("The data have no test split")


def test_validation_from_test_halves_it_and_leaves_train_whole():
    division = divided(parts(60, 12, 30), Validation.model_validate({"from": "test"}), 0)
    assert sizes(division) == (60, 15, 15)
    assert not set(division.validation.rows) & set(division.test.rows)
    assert division.validation.examples is division.test.examples
    assert "own validation split (12 examples) is not used" in division.notes[0]


def test_validation_from_a_test_split_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="no test split"):
        divided(parts(60), Validation.model_validate({"from": "test"}), 0)


def test_a_split_too_small_to_divide_is_refused():
    with pytest.raises(DataError, match="too few examples"):
        divided(parts(60, 0, 1), Validation.model_validate({"from": "test"}), 0)


def test_validation_is_written_with_its_key_and_the_fraction_that_counts():
    written = DataConfig.model_validate({"source": "digits", "validation": {"from": "test"}})
    assert written.model_dump(mode="json")["validation"] == {"from": "test", "fraction": 0.5}
    again = DataConfig.model_validate(written.model_dump(mode="json"))
    assert again.model_dump() == written.model_dump()


def test_a_subset_reduces_train_alone_and_is_drawn_by_the_runs_seed():
    config = DataConfig.model_validate({"source": "digits", "subset": 100})
    whole, first, second = digits(), load_data(config, seed=0), load_data(config, seed=1)
    assert (len(first.train), len(first.validation)) == (100, len(whole.validation))
    assert torch.equal(first.test.rows, second.test.rows)
    assert torch.equal(first.validation.rows, whole.validation.rows)
    assert load_data(config, seed=1).fingerprint == second.fingerprint
    assert first.train.fingerprint != second.train.fingerprint
    assert np.bincount(first.train.targets).min() >= 9


def test_a_subset_larger_than_train_or_without_a_class_is_refused():
    with pytest.raises(UsageError, match=r"2,000 can't be drawn from 1,294"):
        digits(subset=2000)
    with pytest.raises(DataError, match="the training subset has no example"):
        digits(subset=5)
    with pytest.raises(ValueError, match="either"):
        Subset(count=3, fraction=0.5)
    assert len(reduced(Rows(parts().train, np.arange(60)), Subset(fraction=0.5), 0).rows) == 30


def test_splits_of_the_same_data_share_the_memory():
    data = digits()
    assert data.train.images.data_ptr() == data.test.images.data_ptr()


# --- batches


def test_inputs_are_scaled_pixels_less_the_mean_over_the_deviation():
    images = images_of(5)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    split = ArraySplit("test", images, torch.arange(5) % 2, mean=mean, std=std)
    (batch,) = split.batches(8)
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(batch.inputs, expected)


def test_auto_normalisation_makes_train_zero_mean_and_unit_deviation():
    data = digits()
    inputs = torch.cat([b.inputs for b in data.train.batches(256)])
    assert abs(inputs.mean()) < 1e-3 and abs(inputs.std() - 1) < 1e-3


def test_shuffling_visits_every_example_once_in_an_order_of_seed_and_epoch():
    split = split_of()

    def order(**kwargs):
        return torch.cat([b.indices for b in split.batches(7, shuffle=True, **kwargs)]).tolist()

    assert sorted(order(seed=1)) == list(range(40)) != order(seed=1)
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_batches_hold_what_their_indices_say():
    split = split_of()
    for batch in split.batches(7, shuffle=True):
        assert torch.equal(batch.targets, batch.indices % 4)
        torch.testing.assert_close(batch.inputs, split.images[batch.indices].float())


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_every_batch(drop_last):
    split = split_of(30)
    kwargs = {"shuffle": True, "seed": 3, "drop_last": drop_last}
    whole = [b.indices for b in split.batches(8, **kwargs)]
    shares = [[b.indices for b in split.batches(8, rank=r, world=2, **kwargs)] for r in (0, 1)]
    assert len(whole) == (3 if drop_last else 4)
    for batch, first, second in zip(whole, *shares, strict=True):
        assert sorted(torch.cat([first, second]).tolist()) == sorted(batch.tolist())
        assert abs(len(first) - len(second)) <= 1
    with pytest.raises(UsageError, match="can't be shared by 16"):
        next(split.batches(8, rank=0, world=16))


def test_picked_examples_come_in_the_order_asked_for():
    split = split_of(augment=["random_horizontal_flip"])
    batch = split.pick([5, 2])
    assert batch.indices.tolist() == [5, 2]
    torch.testing.assert_close(batch.inputs, split.images[[5, 2]].float())


def test_fingerprints_tell_content_preparation_and_augmentation_apart():
    same = split_of().fingerprint
    changed = split_of()
    changed.images[3, 0, 0, 0] ^= 1
    relabelled = split_of()
    relabelled.targets[0] = 3
    others = [changed, relabelled, split_of(augment=["random_horizontal_flip"]), split_of(41)]
    assert split_of().fingerprint == same
    assert len({same, *(s.fingerprint for s in others)}) == 5


# --- augmentation


@settings(max_examples=30, deadline=None)
@given(
    padding=st.one_of(st.integers(0, 4), st.tuples(*[st.integers(0, 3)] * 4).map(list)),
    mode=st.sampled_from(["constant", "edge", "reflect", "symmetric"]),
    fill=st.integers(0, 255),
    seed=st.integers(0, 100),
)
def test_the_batched_crop_is_torchvisions_at_the_same_offsets(padding, mode, fill, seed):
    images = images_of(6, (3, 9, 7), seed)
    made = transform(
        {"random_crop": {"size": [8, 6], "padding": padding, "padding_mode": mode, "fill": fill}}
    )
    assert isinstance(made, Crop)
    drawn = made.draw(6, (3, 9, 7), torch.Generator().manual_seed(seed))
    cropped = made.apply(images, drawn)
    for image, (top, left), result in zip(images, drawn.tolist(), cropped, strict=True):
        padded = F.pad(image, padding, fill=fill, padding_mode=mode)
        assert torch.equal(result, F.crop(padded, top, left, 8, 6))


def test_the_batched_crop_draws_every_offset_about_equally_often():
    drawn = Crop((8, 8), (1, 1, 1, 1), 0, "constant").draw(
        9000, (1, 8, 8), torch.Generator().manual_seed(0)
    )
    counts = np.bincount((drawn[:, 0] * 3 + drawn[:, 1]).numpy(), minlength=9)
    assert counts.min() > 850 and counts.max() < 1150


@pytest.mark.parametrize(("name", "flip"), [("horizontal", F.hflip), ("vertical", F.vflip)])
def test_the_batched_flip_mirrors_just_the_drawn_ones(name, flip):
    images = images_of(200)
    made = transform({f"random_{name}_flip": {"p": 0.3}})
    drawn = made.draw(200, (3, 8, 8), torch.Generator().manual_seed(0))
    flipped = made.apply(images, drawn)
    assert 40 < drawn.sum() < 80
    assert torch.equal(flipped[drawn], flip(images[drawn]))
    assert torch.equal(flipped[~drawn], images[~drawn])


AUGMENTS = [
    [{"random_crop": {"size": 8, "padding": 2}}, "random_horizontal_flip"],
    [{"color_jitter": {"brightness": 0.5}}],
    [{"random_resized_crop": {"size": 8}}, "random_horizontal_flip"],
    [{"random_affine": {"degrees": 20, "translate": [0.2, 0.1], "interpolation": "bilinear"}}],
]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_draws_belong_to_seed_epoch_and_example_whatever_the_batches(augment):
    split = split_of(augment=augment)

    def by_example(batch_size=8, **kwargs):
        found = {}
        for batch in split.batches(batch_size, augment=True, **kwargs):
            found |= dict(zip(batch.indices.tolist(), batch.inputs, strict=True))
        return torch.stack([found[i] for i in sorted(found)])

    once = by_example(seed=1, epoch=2, shuffle=True)
    assert torch.equal(once, by_example(batch_size=5, seed=1, epoch=2))
    assert not torch.equal(once, by_example(seed=1, epoch=3))
    assert not torch.equal(once, by_example(seed=2, epoch=2))
    own = torch.cat(
        [b.inputs for b in split.batches(8, augment=True, seed=1, epoch=2, rank=1, world=2)]
    )
    places = torch.cat([b.indices for b in split.batches(8, rank=1, world=2)])
    assert torch.equal(own, once[places])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_equal_examples_are_augmented_differently(augment):
    images = images_of(1).expand(64, -1, -1, -1).contiguous()
    augmentation = Augmentation(augment, (3, 8, 8))
    changed = augmentation.start(64, seed=0, epoch=0)(images, torch.arange(64))
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 10


def test_augmentation_leaves_the_trainings_random_numbers_alone():
    split = split_of(augment=AUGMENTS[1])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in split.batches(8, augment=True):
        pass
    assert torch.equal(torch.rand(3), expected)


def test_only_passes_that_ask_for_it_are_augmented():
    split = split_of(augment=AUGMENTS[0])
    plain = torch.cat([b.inputs for b in split.batches(8)])
    torch.testing.assert_close(plain, split.images.float())


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (["random_crp"], "no transform 'random_crp'; did you mean 'random_crop'"),
        ([{"random_crop": {"sise": 8}}], "random_crop refuses its arguments"),
        ([{"random_crop": {"size": 6}}], r"into \(3, 6, 6\)"),
        ([{"random_crop": {"size": 12, "padding": 1}}], "12×12 from images of 8×8"),
        ([{"resize": {"size": 4}}], "must stay as they are"),
        (["mix_up"], "no transform"),
        ([{"random_affine": {"degrees": 5, "interpolation": "cubik"}}], "refuses its arguments"),
        (["to_pil_image", "grayscale"], "augment"),
    ],
)
def test_augmentation_that_can_not_be_done_is_refused_at_once(augment, message):
    with pytest.raises(RecipeError, match=message):
        Augmentation(augment, (3, 8, 8))


AFFINE = {"degrees": 20, "translate": [0.25, 0.15], "scale": [0.8, 1.2], "shear": [-9, 9, -5, 5]}


def turned_one_by_one(images, drawn, mode):
    """torchvision's own, image by image."""
    return torch.stack(
        [
            v2.functional.affine(
                image,
                math.degrees(angle),
                [int(x), int(y)],
                scale,
                [math.degrees(shear_x), math.degrees(shear_y)],
                interpolation=v2.InterpolationMode(mode),
                fill=None,
            )
            for image, (angle, x, y, scale, shear_x, shear_y) in zip(images, drawn, strict=True)
        ]
    )


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_affine_changes_of_whole_batches_are_torchvisions(mode):
    images = images_of(40)
    made = transform({"random_affine": {**AFFINE, "interpolation": mode}})
    assert isinstance(made, Affine)
    drawn = made.draw(len(images), tuple(images.shape[1:]), torch.Generator().manual_seed(0))
    assert drawn.abs().amax(0)[1:3].tolist() == [2, 1]
    changed = made.apply(images, drawn)
    wanted = turned_one_by_one(images, drawn.tolist(), mode)
    assert changed.dtype == torch.uint8
    assert (changed.int() - wanted.int()).abs().max() <= 1


def test_what_an_affine_change_brings_in_from_outside_is_the_fill():
    made = transform({"random_affine": {"degrees": 0, "translate": [0.5, 0.0], "fill": 9}})
    moved = made.apply(torch.full((1, 1, 4, 4), 200), torch.tensor([[0.0, 2.0, 0.0, 1.0, 0, 0]]))
    assert moved[0, 0].tolist() == [[9, 9, 200, 200]] * 4


def test_seeds_from_different_parts_differ():
    assert len({mixed(*parts_) for parts_ in [(1, 2), (2, 1), (12,), (1, 2, "x")]}) == 4


def test_every_torchvision_name_is_its_class_in_snake_case():
    assert type(transform("trivial_augment_wide").transform) is v2.TrivialAugmentWide
    assert type(transform({"rand_augment": {"num_ops": 1}}).transform) is v2.RandAugment


# --- settings


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"path": "x"}, "'digits' takes no `path`"),
        ({"download": True}, "'digits' takes no `download`"),
        ({"classes": ["a", "b"]}, "names 2 classes and digits has 10"),
        ({"normalize": {"mean": [0.1, 0.2], "std": [1]}}, "2 values and the images have 1 channel"),
        ({"source": "digts"}, "unknown data source 'digts'; did you mean 'digits'"),
    ],
)
def test_settings_that_can_not_be_followed_are_refused(settings_, message):
    with pytest.raises(UsageError, match=message):
        digits(**settings_)


@pytest.mark.parametrize(
    "settings_",
    [
        {"sise": 3},
        {"augment": [{"a": {}, "b": {}}]},
        {"size": 0},
        {"normalize": {"mean": [0.1], "std": [0]}},
        {"subset": 1.5},
        {"validation": {"from": "nowhere"}},
    ],
)
def test_settings_of_a_wrong_form_are_refused_when_read(settings_):
    with pytest.raises(ValueError):
        DataConfig.model_validate({"source": "digits", **settings_})


def test_size_color_and_names_are_the_recipes_to_choose():
    data = digits(size=[12, 10], color="rgb", classes=[f"n{i}" for i in range(10)])
    assert data.shape == (3, 12, 10) and data.classes[0] == "n0"
    assert data.preparation["color"] == "rgb"
    assert data.preparation["resize"] == {
        "height": 12,
        "width": 10,
        "fit": "stretch",
        "interpolation": "bilinear",
    }
    assert next(data.test.batches(2)).inputs.shape == (2, 3, 12, 10)
