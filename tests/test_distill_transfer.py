"""Transfer sets: that what is chosen is what the method promises, by independent references."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import entropy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from attar.data import ArraySplit, DataConfig, LoaderSplit, load_data
from attar.data.loaders import StreamSplit
from attar.distill import transfer as module
from attar.distill.transfer import (
    Transfer,
    choose,
    confidence,
    disagreement,
    herded,
    k_centres,
    uncertainty,
    unlike,
)
from attar.errors import UsageError
from attar.report.found import shown
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.evaluation import outputs_of
from attar.training.loop import train
from attar.training.objective import TaskObjective
from criteria_fixture import flat_cnn

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
AUGMENT = [{"random_crop": {"size": 8, "padding": 1}}]
KEEP_SHARES = ["stratified", "confident", "uncertain", "disagreement", "herding"]
METHODS = ["random", "k-centre", *KEEP_SHARES]
ALONE = ["random", "stratified"]


@pytest.fixture(scope="module")
def augmented():
    """Digits, 300 to learn from, cropped at random."""
    config = {"source": "digits", "subset": 300, "augment": AUGMENT}
    return load_data(DataConfig.model_validate(config))


@pytest.fixture(scope="module")
def teacher(augmented) -> nn.Module:
    net, training = flat_cnn(8), Training(epochs=12, **FAST)
    train(net, data=augmented, task=TASK, training=training, objective=TaskObjective(TASK))
    return net


def chosen(split, teacher, seed=0, **written):
    return choose(Transfer(**written), split, teacher, TASK, seed)


def inputs_of(split) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in split.batches(128)])


def logits_of(teacher, split) -> np.ndarray:
    return torch.cat([logits for logits, _ in outputs_of(teacher, split, TASK)]).double().numpy()


def penultimate(teacher, split) -> torch.Tensor:
    with torch.no_grad():
        return teacher.eval()[:7](inputs_of(split))


def require_best_of_each_class(score: np.ndarray, split, places) -> None:
    for label in range(10):
        own = np.flatnonzero(split.targets.numpy() == label)
        inside = np.isin(own, places)
        assert score[own[inside]].min() >= score[own[~inside]].max() - 1e-6
        assert score[own[inside]].mean() > score[own[~inside]].mean()


# --- what a recipe says


def test_a_bare_number_is_a_count_or_a_fraction_of_a_stratified_set():
    assert Transfer.model_validate(500) == Transfer(count=500)
    assert Transfer.model_validate(0.1) == Transfer(fraction=0.1)
    assert Transfer(count=5).method == "stratified" and not Transfer(count=5).asks_teacher


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({}, "needs a `count` or a `fraction`, or `deduplicate`"),
        ({"count": 5, "fraction": 0.5}, "either a `count` or a `fraction`"),
        ({"method": "herding", "deduplicate": True}, "method herding needs a `count`"),
        ({"count": 5, "layer": "fc"}, "`layer` is for k-centre, herding"),
        ({"count": 5, "method": "confident", "layer": "fc"}, "`layer` is for"),
        ({"count": 0}, "greater than or equal to 1"),
        ({"fraction": 1.5}, "less than 1"),
        ({"count": 5, "deduplicate": 1.5}, "less than or equal to 1"),
        ({"count": 5, "method": "k-center"}, "k-centre"),
        ({"size": 5}, "Extra inputs"),
        (True, "valid dictionary"),
    ],
)
def test_settings_that_say_nothing_or_two_things_are_refused(written, said):
    with pytest.raises(ValidationError, match=said):
        Transfer.model_validate(written)


def test_settings_are_written_out_and_read_back():
    for written in (300, 0.5, {"deduplicate": True}, {"deduplicate": 1}, {"deduplicate": 0.9}):
        stage = Distill.model_validate({"transfer": written})
        assert Distill.model_validate(stage.model_dump(mode="json")) == stage
    assert Transfer(deduplicate=1).by_similarity and not Transfer(deduplicate=True).by_similarity


# --- the choosing itself, against slow and plain references

points = st.lists(
    st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=12, unique=True
).map(lambda rows: torch.tensor(rows, dtype=torch.float32))


def distances(x: torch.Tensor) -> np.ndarray:
    x = x.double().numpy()
    return np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))


@settings(max_examples=80, deadline=None)
@given(x=points, data=st.data())
def test_every_centre_is_the_farthest_from_those_before_it(x, data):
    count, seed = data.draw(st.integers(1, len(x))), data.draw(st.integers(0, 2**40))
    places, apart = k_centres(x, count, seed).tolist(), distances(x)
    assert len(set(places)) == count
    for step in range(1, count):
        to_nearest = apart[:, places[:step]].min(1)
        assert to_nearest[places[step]] == pytest.approx(to_nearest.max(), abs=1e-2)


@settings(max_examples=40, deadline=None)
@given(x=points.filter(lambda x: len(x) >= 3), seed=st.integers(0, 99))
def test_the_centres_radius_is_within_twice_the_best_there_is(x, seed):
    apart = distances(x)
    radius = apart[:, k_centres(x, 3, seed)].min(1).max()
    best = min(apart[:, list(p)].min(1).max() for p in itertools.combinations(range(len(x)), 3))
    assert radius <= 2 * best + 1e-3


def test_equal_points_are_still_chosen_once_each():
    assert sorted(k_centres(torch.zeros(5, 3), 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(herded(torch.zeros(5, 3), 5).tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=80, deadline=None)
@given(x=points, data=st.data())
def test_every_herded_point_brings_the_mean_as_near_as_any_could(x, data):
    count = data.draw(st.integers(1, len(x)))
    places, rows = herded(x, count).tolist(), x.double().numpy()
    assert len(set(places)) == count
    for step in range(count):
        before, left = places[:step], sorted(set(range(len(x))) - set(places[:step]))
        miss = {i: np.linalg.norm(rows.mean(0) - rows[[*before, i]].mean(0)) for i in left}
        assert miss[places[step]] == pytest.approx(min(miss.values()), abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(x=points, least=st.floats(0.05, 1))
def test_an_example_stays_that_is_unlike_all_that_stayed_before_it(x, least):
    with pytest.MonkeyPatch.context() as patch:  # small blocks, so that there are several
        patch.setattr(module, "BLOCK", 3)
        patch.setattr(module, "COLUMNS", 2)
        places = unlike(x, least).tolist()
    unit = x.double().numpy()
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    kept: list[int] = []
    for i in range(len(x)):
        if not any(unit[i] @ unit[j] >= least - module.ROUNDING for j in kept):
            kept.append(i)
    close = np.abs(unit @ unit.T - least) < 3e-6  # where float32 may tell otherwise
    assert places == kept or close.any()


answers = st.lists(
    st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=2, max_size=6
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(one=answers)
def test_scores_are_what_their_names_say(one):
    p = np.exp(one.numpy()) / np.exp(one.numpy()).sum(1, keepdims=True)
    ranked = np.sort(p, axis=1)
    np.testing.assert_allclose(confidence(one), np.log(ranked[:, -1]), atol=1e-9)
    np.testing.assert_allclose(uncertainty(one), ranked[:, -2] - ranked[:, -1], atol=1e-9)
    draws = one[:, None]  # one example, answered to several times
    expected = entropy(p.mean(0)) - np.mean([entropy(row) for row in p])
    assert disagreement(draws).item() == pytest.approx(expected, abs=1e-9)
    assert -1e-9 <= disagreement(draws).item() <= np.log(len(one)) + 1e-9
    assert disagreement(draws[:1].expand(3, -1, -1)).item() == pytest.approx(0, abs=1e-9)


def test_confidence_tells_apart_what_rounds_to_certainty():
    sure, surer = confidence(torch.tensor([[30.0, 0], [33.0, 0]], dtype=torch.float64)).tolist()
    assert sure < surer


# --- with a teacher, on digits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_so_many_places_the_same_for_its_seed(augmented, teacher, method):
    split = augmented.train
    teacher.train()
    places, found = chosen(split, teacher, count=60, method=method)
    assert teacher.training and not any(
        m._forward_hooks or m._forward_pre_hooks for m in teacher.modules()
    )
    assert places.tolist() == sorted(set(places.tolist())) and len(places) == 60
    assert places.min() >= 0 and places.max() < len(split)
    assert found["method"] == method and (found["chosen"], found["of"]) == (60, 300)
    assert sum(found["classes"].values()) == 60
    teacher.eval()
    assert np.array_equal(places, chosen(split, teacher, count=60, method=method).places)
    if method in KEEP_SHARES:
        for label in range(10):
            exact = (split.targets == label).sum().item() * 60 / 300
            assert abs(found["classes"][str(label)] - exact) < 1


@pytest.mark.parametrize("method", ["random", "stratified", "k-centre"])
def test_another_seed_draws_others(augmented, teacher, method):
    one, other = (
        chosen(augmented.train, teacher, seed=s, count=60, method=method).places for s in (0, 1)
    )
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(("method", "sign"), [("confident", 1), ("uncertain", -1)])
def test_the_teachers_surest_or_closest_calls_of_each_class_are_chosen(
    augmented, teacher, method, sign
):
    split = augmented.train
    logits = logits_of(teacher, split)
    p = np.sort(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), axis=1)
    score = p[:, -1] if method == "confident" else p[:, -1] - p[:, -2]
    places = chosen(split, teacher, fraction=0.2, method=method).places
    require_best_of_each_class(sign * score, split, places)


def test_disagreement_chooses_where_augmentation_changes_the_answer(augmented, teacher):
    split = augmented.train
    places = chosen(split, teacher, count=50, method="disagreement").places
    drawn_by = module.mixed(0, "transfer")
    draws = []
    for epoch in range(4):
        batches = split.batches(100, augment=True, seed=drawn_by, epoch=epoch)
        with torch.no_grad():
            draws.append(torch.cat([teacher.eval()(b.inputs).softmax(1) for b in batches]))
    p = torch.stack(draws).double().numpy()
    score = entropy(p.mean(0), axis=1) - entropy(p, axis=2).mean(0)
    require_best_of_each_class(score, split, places)


def test_disagreement_without_augmentation_is_refused(digits, teacher):
    with pytest.raises(UsageError, match="aren't augmented: give the data `augment`"):
        chosen(digits.train, teacher, count=50, method="disagreement")


def test_features_are_what_goes_into_the_last_linear_layer(augmented, teacher):
    split = augmented.train
    features = penultimate(teacher, split)
    places, found = chosen(split, teacher, count=40, method="k-centre")
    assert found["layer"] == "input of 7"
    named, by_name = chosen(split, teacher, count=40, method="k-centre", layer="6")
    assert by_name["layer"] == "6" and np.array_equal(places, named)

    def radius(of):
        return torch.cdist(features, features[of]).amin(1).max().item()

    others = [chosen(split, None, seed=s, count=40, method="random").places for s in range(5)]
    assert radius(places) < min(radius(other) for other in others)


def test_maps_are_averaged_over_their_positions(augmented, teacher):
    maps = torch.cat([teacher[:3].eval()(b.inputs).detach() for b in augmented.train.batches(300)])
    centres = k_centres(maps.mean((2, 3)), 30, module.mixed(0, "transfer"))
    by_layer = chosen(augmented.train, teacher, count=30, method="k-centre", layer="2").places
    assert np.array_equal(by_layer, np.sort(centres))


def test_without_a_linear_layer_the_logits_are_the_features(augmented):
    net = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = chosen(augmented.train, net, count=20, method="herding").found
    assert found["layer"] == "logits"


def test_the_layer_that_runs_last_counts_not_the_one_that_is_made_last(augmented):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 10)
            self.body = nn.Linear(64, 5)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)))

    found = chosen(augmented.train, Backwards(), count=20, method="herding").found
    assert found["layer"] == "input of head"


def test_a_feature_that_is_none_of_an_example_is_refused(augmented):
    with pytest.raises(UsageError, match=r"'input of head' has shape \(2048, 8\) for 256 examples"):
        chosen(augmented.train, Folded(), count=5, method="herding")


class Folded(nn.Module):
    """Its last linear layer sees every position of every image as a row."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(x.reshape(-1, 8)).reshape(len(x), -1, 10).mean(1)


def test_herding_keeps_each_classs_mean(augmented, teacher):
    split = augmented.train
    features = penultimate(teacher, split)

    def off(places):
        errors = []
        for label in range(10):
            own = split.targets == label
            part = torch.zeros(len(split), dtype=torch.bool)
            part[torch.from_numpy(places)] = True
            errors.append((features[own & part].mean(0) - features[own].mean(0)).norm().item())
        return np.mean(errors)

    herd = chosen(split, teacher, count=60, method="herding").places
    drawn = [chosen(split, None, seed=s, count=60, method="stratified").places for s in range(5)]
    assert off(herd) < 0.5 * min(off(places) for places in drawn)


@pytest.mark.parametrize(
    ("layer", "said"), [("8", "has no layer '8'"), ("fc", "has no layer 'fc'")]
)
def test_a_layer_that_is_not_there_is_named(augmented, teacher, layer, said):
    with pytest.raises(UsageError, match=said):
        chosen(augmented.train, teacher, count=5, method="k-centre", layer=layer)


# --- duplicates


def repeated() -> ArraySplit:
    """40 images, of which the last ten have come before."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[30:] = images[5:15]
    return ArraySplit("train", images, torch.arange(40) % 4, mean=[0.5], std=[0.3])


def test_same_pixels_are_left_out_without_a_teacher():
    places, found = chosen(repeated(), None, deduplicate=True)
    assert places.tolist() == list(range(30))
    assert found == {"of": 40, "duplicates": 10, "chosen": 30, "classes": {
        "0": 8, "1": 8, "2": 7, "3": 7}}  # fmt: skip
    some = chosen(repeated(), None, count=30, method="random", deduplicate=True)
    assert np.array_equal(some.places, places)
    with pytest.raises(UsageError, match="transfer set of 31 can't be drawn from 30 training"):
        chosen(repeated(), None, count=31, deduplicate=True)


def test_duplicates_by_similarity_are_more_the_lower_it_is():
    teacher, split = flat_cnn(4).eval(), repeated()
    same, found = chosen(split, teacher, deduplicate=1)
    assert same.tolist() == list(range(30)) and found["layer"] == "input of 7"
    counts = [chosen(split, teacher, deduplicate=s).found["duplicates"] for s in (0.99, 0.9, 0.5)]
    assert 10 <= counts[0] <= counts[1] <= counts[2] and counts[2] > 10
    some = chosen(split, teacher, count=10, method="k-centre", deduplicate=0.999)
    assert len(some.places) == 10 and set(some.places) <= set(same.tolist())


# --- what can't be done


@pytest.mark.parametrize(
    "written",
    [*({"count": 5, "method": m} for m in METHODS if m not in ALONE), {"deduplicate": 0.9}],
)
def test_what_asks_the_teacher_says_so_where_there_is_none(augmented, written):
    with pytest.raises(UsageError, match=r"asks the teacher's network.*random, stratified and"):
        chosen(augmented.train, None, **written)


def test_more_than_there_are_is_refused(augmented):
    with pytest.raises(UsageError, match="transfer set of 301 can't be drawn from 300 training"):
        chosen(augmented.train, None, count=301)


def test_a_stream_is_refused_with_what_would_work(augmented):
    pairs = [(b.inputs, b.targets) for b in augmented.train.batches(100)]
    with pytest.raises(UsageError, match=r"StreamSplit, which can't be taken in part.*DataLoader"):
        chosen(StreamSplit("train", pairs), None, count=5)


# --- loaders of a person's own


def as_loader(split, **how) -> LoaderSplit:
    pairs = TensorDataset(inputs_of(split), split.targets)
    return LoaderSplit("train", DataLoader(pairs, **how))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "disagreement"])
def test_a_loaders_examples_are_chosen_as_arrays_are(augmented, teacher, method):
    split = augmented.train
    expected = chosen(split, teacher, count=50, method=method).places
    found = chosen(as_loader(split), teacher, count=50, method=method)
    assert np.array_equal(found.places, expected)
    part, own = as_loader(split).only(found.places), split.only(found.places)
    assert len(part) == 50 and part.fingerprint != as_loader(split).fingerprint
    assert torch.equal(inputs_of(part), inputs_of(own))
    assert torch.equal(part.pick([3, 1]).targets, own.pick([3, 1]).targets)


class Jittered(TensorDataset):
    """Examples that a person's own code changes at random."""

    def __getitem__(self, place):
        inputs, target = super().__getitem__(place)
        return inputs + 0.5 * torch.randn_like(inputs), target


def test_disagreement_takes_what_a_loader_draws_for_itself(augmented, teacher):
    split = augmented.train
    jittered = DataLoader(Jittered(inputs_of(split), split.targets))
    places, found = chosen(LoaderSplit("train", jittered), teacher, count=50, method="disagreement")
    assert len(places) == found["chosen"] == 50
    again = chosen(LoaderSplit("train", jittered), teacher, count=50, method="disagreement")
    assert np.array_equal(places, again.places)
    with pytest.raises(UsageError, match="these aren't augmented"):
        chosen(as_loader(split), teacher, count=50, method="disagreement")


def test_a_part_of_a_loader_keeps_its_collation_and_its_sampler(augmented):
    def doubled(pairs):
        inputs, targets = zip(*pairs, strict=True)
        return torch.stack(inputs) * 2, torch.stack(targets)

    never = torch.ones(300)
    never[::2] = 0
    split = as_loader(
        augmented.train, collate_fn=doubled, sampler=WeightedRandomSampler(never, 600)
    )
    part = split.only(range(100, 200)).only(range(10, 60))  # 110 to 159
    visited = torch.cat([b.indices for b in part.batches(16, shuffle=True)])
    assert set(visited.tolist()) == set(range(1, 50, 2))  # the even ones are never drawn
    for batch in part.batches(16, shuffle=True, seed=3):
        original = augmented.train.pick((batch.indices + 110).tolist())
        assert torch.equal(batch.inputs, original.inputs * 2)
        assert torch.equal(batch.targets, original.targets)


# --- in a stage


@pytest.fixture
def run(augmented, teacher, tmp_path) -> Context:
    return Context(task=TASK, data=augmented, teacher=teacher, seed=1, work=tmp_path)


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in student.module.state_dict().items()}


def test_a_stage_learns_from_the_chosen_examples_alone(run, monkeypatch):
    seen: list[set[tuple]] = []
    loss = ImageClassification.loss

    def watched(self, output, batch, **how):
        seen.append({tuple(row) for row in batch.indices[:, None].tolist()})
        return loss(self, output, batch, **how)

    monkeypatch.setattr(ImageClassification, "loss", watched)
    heard: list[dict] = []
    stage = Distill(transfer={"count": 100, "method": "herding"}, epochs=20, **FAST)
    taught = stage.apply(Student(flat_cnn(4)), replace(run, tell=heard.append))
    assert set().union(*seen) == {(i,) for i in range(100)}
    assert run.evaluate(taught.module) > 0.4
    found = run.found["transfer"]
    assert (found["of"], found["chosen"], found["layer"]) == (300, 100, "input of 7")
    assert set(found["classes"]) == set(run.data.classes)
    notes = [e["text"] for e in heard if e["event"] == "note"]
    assert "100 of 300 training examples are learnt from, chosen by herding." in notes
    assert len(run.data.train) == 300  # the next stage learns from all again


def test_a_stage_repeats_its_choice(run):
    stage = Distill(transfer={"fraction": 0.3, "method": "k-centre"}, epochs=1, **FAST)
    one = weights(stage.apply(Student(flat_cnn(4)), run.at("one")))
    other = weights(stage.apply(Student(flat_cnn(4)), run.at("other")))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_without_a_teacher_a_stage_can_choose_at_random_and_no_otherwise(run):
    alone = replace(run, teacher=None)
    stage = Distill(criteria=[], transfer=100, epochs=1, **FAST)
    stage.apply(Student(flat_cnn(4)), alone)
    assert alone.found["transfer"]["chosen"] == 100
    stage = Distill(criteria=[], transfer={"count": 100, "method": "confident"}, **FAST)
    with pytest.raises(UsageError, match="confident asks the teacher's network"):
        stage.apply(Student(flat_cnn(4)), alone)


def test_the_report_shows_what_was_chosen(augmented, teacher):
    written = Transfer(count=100, method="uncertain", deduplicate=True)
    found = choose(written, augmented.train, teacher, TASK, classes=augmented.classes).found
    (group,) = shown({"transfer": found})
    facts, classes = group["blocks"]
    assert dict(facts["pairs"])["method"] == "uncertain"
    assert dict(facts["pairs"])["chosen"] == "100"
    assert [name for name, _ in classes["pairs"]] == list(augmented.classes)
