"""Images without labels: read like those with, and learnt from without being judged by."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from attar.data import ArraySplit, DataConfig, load_data
from attar.data.arrays import Chained
from attar.data.base import UNLABELLED, Batch, mean_of_labelled
from attar.distill import DistillObjective, Signal, Teacher
from attar.distill.criteria.crd import CRD
from attar.distill.criteria.dkd import DKD
from attar.distill.criteria.kd import KD
from attar.distill.criteria.teacher_free import TeacherFree
from attar.distill.transfer import with_unlabelled
from attar.errors import DataError, RecipeError, UsageError
from attar.recipe import load_recipe
from attar.recipe.reading import recipe_from_text
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training
from attar.training.loop import train
from attar.training.objective import TaskObjective
from criteria_fixture import flat_cnn

TASK = ImageClassification()
FAST = {"batch_size": 50, "optimizer": {"lr": 0.01}}
PIXELS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)


def digits(**written: object):
    return load_data(DataConfig.model_validate({"source": "digits", **written}))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder_of(place, images) -> str:
    """A folder of pictures, some deeper than others, with a file that is none."""
    for i, image in enumerate(images):
        deep = place / "cam" / str(i % 2) if i % 3 else place
        deep.mkdir(parents=True, exist_ok=True)
        (deep / f"{i:04}.png").write_bytes(png(image))
    (place / "notes.txt").write_text("not a picture")
    return str(place)


def array_of(name: str):
    def write(place, images) -> str:
        place.mkdir()
        if name.endswith(".npy"):
            np.save(place / name, images)
        else:
            np.savez(place / name, pictures=images, taken=np.arange(len(images)))
        return str(place / name)

    return write


def table_of(place, images) -> str:
    """Two Parquet files whose names say nothing of splits."""
    place.mkdir()
    half = len(images) // 2
    for name, part in (("a", images[:half]), ("b", images[half:])):
        cells = pa.array([{"bytes": png(i), "path": None} for i in part])
        pq.write_table(pa.table({"image": cells}), place / f"{name}.parquet")
    return str(place)


KINDS = {
    "folder": folder_of,
    "npz": array_of("some.npz"),
    "npy": array_of("some.npy"),
    "parquet": table_of,
}


# --- reading


@pytest.mark.parametrize("kind", KINDS)
def test_unlabelled_images_are_prepared_as_training_images_are(kind, tmp_path):
    images = PIXELS[:20]
    data = digits(
        unlabelled=KINDS[kind](tmp_path / "x", images), augment=["random_horizontal_flip"]
    )
    extra = data.unlabelled
    assert len(extra) == 20 and extra.augmentation is data.train.augmentation
    (batch,) = extra.batches(50)
    assert batch.targets.tolist() == [UNLABELLED] * 20
    mean, std = data.preparation["mean"][0], data.preparation["std"][0]
    expected = (torch.from_numpy(images)[:, None].double() / 255 - mean) / std
    found = sorted(batch.inputs.flatten(1).tolist())  # a folder's order is its names'
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(sorted(expected.flatten(1).tolist())), atol=1e-5, rtol=0
    )
    assert "20 images without labels are there for `distill` to use." in data.notes


def test_they_are_brought_to_the_recipes_size_and_color(tmp_path):
    large = np.repeat(np.repeat(PIXELS[:6], 3, 1), 2, 2)  # 24 × 16, where the data are 8 × 8
    for written in ({"size": 12, "color": "rgb"}, {"size": [10, 6]}):
        data = digits(unlabelled=folder_of(tmp_path / str(len(written)), large), **written)
        assert data.unlabelled.pick([0]).inputs.shape[1:] == data.shape


def test_data_without_them_are_what_they_were(tmp_path):
    path = array_of("a.npy")(tmp_path / "x", PIXELS[:20])
    plain, more = digits(), digits(unlabelled=path)
    assert plain.unlabelled is None
    assert plain.fingerprint == "-".join(
        s.fingerprint[:16] for s in (plain.train, plain.validation, plain.test)
    )
    assert more.fingerprint.startswith(plain.fingerprint) and more.fingerprint != plain.fingerprint
    other = digits(unlabelled=array_of("b.npy")(tmp_path / "y", PIXELS[1:21]))
    assert other.fingerprint != more.fingerprint
    assert more.train.fingerprint == plain.train.fingerprint


def wrong_folder(place) -> str:
    place.mkdir()
    (place / "a.txt").write_text("nothing")
    return str(place)


def written_as(name: str, write):
    def make(place) -> str:
        place.mkdir()
        write(place / name)
        return str(place / name)

    return make


WRONG = {
    "missing": (lambda place: str(place), "no data at .*: there is no such file"),
    "no pictures": (wrong_folder, "has no images .*and no .parquet"),
    "other kind": (
        written_as("a.txt", lambda p: p.write_text("x")),
        "can't read unlabelled images from .*a folder of images",
    ),
    "damaged array": (
        written_as("a.npy", lambda p: p.write_bytes(b"x")),
        "can't read .* as an array of numbers",
    ),
    "damaged picture": (
        lambda place: written_as("a.png", lambda p: p.write_bytes(b"x"))(place)[: -len("/a.png")],
        "can't read the image .*a.png",
    ),
    "several arrays": (
        written_as("a.npz", lambda p: np.savez(p, x_train=PIXELS[:2], x_test=PIXELS[:2])),
        r"2 arrays of images \(x_test, x_train\): one was expected",
    ),
    "no array": (
        written_as("a.npz", lambda p: np.savez(p, y=np.arange(3))),
        r"0 arrays of images \(none\)",
    ),
    "nothing in it": (written_as("a.npy", lambda p: np.save(p, PIXELS[:0])), "has no images"),
    "other size": (
        written_as("a.npy", lambda p: np.save(p, PIXELS[:2, :6])),
        r"are \(1, 6, 8\) and those of digits \(1, 8, 8\).*give the data a `size`",
    ),
    "floats": (
        written_as("a.npy", lambda p: np.save(p, PIXELS[:2] / 300.0)),
        "are float32 and those of digits uint8: save both as uint8",
    ),
    "pickles": (
        written_as("a.npy", lambda p: np.save(p, np.array([{}], object), allow_pickle=True)),
        "can't read .* as an array of numbers",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_can_not_be_read_is_said_in_a_sentence(kind, tmp_path):
    make, said = WRONG[kind]
    path = make(tmp_path / "x")
    with pytest.raises(DataError, match=said):
        digits(unlabelled=path)


RECIPE = """\
data: {source: digits, subset: 60, unlabelled: more/images.npy}
teacher: {model: digits-small, train: {epochs: 1}}
student: {model: digits-small}
stages:
  - distill: {criteria: [CRITERION], epochs: 1}
"""


def test_a_recipes_path_is_seen_from_its_file(tmp_path):
    array_of("images.npy")(tmp_path / "more", PIXELS[:10])
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("CRITERION", "kd"))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.data.unlabelled == str(tmp_path / "more" / "images.npy")
    assert len(load_data(recipe.data).unlabelled) == 10


# --- splits in part and together


def split_of(count: int, seed: int = 0, **how) -> ArraySplit:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ArraySplit("train", images, torch.arange(count) % 4, mean=[0.4], std=[0.2], **how)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(sum), data=st.data())
def test_chained_arrays_are_one(sizes, data):
    parts = [split_of(n, seed=i).images for i, n in enumerate(sizes)]
    whole, chained = torch.cat(parts), Chained(*parts)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12)))
    rows = rows.to(torch.int64)
    assert (len(chained), chained.shape, chained.dtype) == (len(whole), whole.shape, whole.dtype)
    assert torch.equal(chained.index_select(0, rows), whole.index_select(0, rows))


def test_chained_arrays_of_two_forms_are_refused():
    with pytest.raises(DataError, match="both must have one form"):
        Chained(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))


def test_a_part_of_a_split_holds_what_its_places_say():
    whole = split_of(30, rows=torch.arange(5, 25))
    whole.fingerprint  # noqa: B018 - the part must not take it over
    part = whole.only(np.array([3, 0, 19]))
    assert torch.equal(part.pick([0, 1, 2]).inputs, whole.pick([3, 0, 19]).inputs)
    assert part.targets.tolist() == whole.targets[[3, 0, 19]].tolist()
    again = part.only([2])
    assert torch.equal(again.pick([0]).inputs, whole.pick([19]).inputs)
    assert len({whole.fingerprint, part.fingerprint, again.fingerprint}) == 3
    assert len(whole) == 20


def test_splits_together_are_one_after_the_other():
    one, other = split_of(9, rows=torch.arange(2, 9)), split_of(5, seed=1)
    both = one.joined(other)
    (batch,) = both.batches(50)
    assert torch.equal(
        batch.inputs, torch.cat([one.pick(range(7)).inputs, other.pick(range(5)).inputs])
    )
    assert batch.targets.tolist() == [*one.targets.tolist(), *other.targets.tolist()]
    copied = ArraySplit(
        "train", torch.cat([one.images[2:], other.images]), batch.targets, mean=[0.4], std=[0.2]
    )
    assert both.fingerprint == copied.fingerprint != one.fingerprint
    assert torch.equal(both.only([8, 1]).pick([0, 1]).inputs, both.pick([8, 1]).inputs)
    thrice = both.joined(other)
    assert torch.equal(thrice.pick([12]).inputs, other.pick([0]).inputs)


def test_what_is_not_in_memory_can_not_be_joined(digits):
    class Other:
        name = "train"

    with pytest.raises(UsageError, match=r"both must be an attar.data.ArraySplit"):
        with_unlabelled(replace(digits, train=Other(), unlabelled=digits.train))


# --- the loss


def batch_of(targets: list[int]) -> Batch:
    places = torch.arange(len(targets))
    return Batch(torch.zeros(len(targets), 1, 2, 2), torch.tensor(targets), places)


@settings(max_examples=60, deadline=None)
@given(
    targets=st.lists(st.integers(-1, 3), min_size=1, max_size=9),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_the_tasks_loss_is_that_of_the_labelled_examples(targets, smoothing):
    torch.manual_seed(len(targets))
    logits = torch.randn(len(targets), 4, requires_grad=True)
    loss = TASK.loss(logits, batch_of(targets), label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    own = torch.tensor(targets) >= 0
    if not own.any():
        assert loss.item() == 0 and not gradient.any()
        return
    alone = logits[own].detach().requires_grad_()
    expected = F.cross_entropy(alone, torch.tensor(targets)[own], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert not gradient[~own].any()
    torch.testing.assert_close(gradient[own], torch.autograd.grad(expected, alone)[0])


def test_the_mean_of_the_labelled_is_that_of_no_other():
    losses = torch.tensor([1.0, torch.inf, 4.0], requires_grad=True)
    mean = mean_of_labelled(losses, torch.tensor([0, UNLABELLED, 2]))
    assert mean.item() == 2.5
    assert torch.autograd.grad(mean, losses)[0].tolist() == [0.5, 0, 0.5]


def test_distillation_terms_are_over_all_and_the_tasks_over_the_labelled():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    x = torch.randn(6, 1, 2, 2)
    targets = torch.tensor([0, -1, 2, -1, -1, 1])
    objective = DistillObjective(
        TASK, Teacher(teacher, TASK, calls=1), {"kd": KD()}, task_weight=0.5
    )
    terms = objective(student, Batch(x, targets, torch.arange(6)))
    own = targets >= 0
    torch.testing.assert_close(terms["task"], 0.5 * F.cross_entropy(student(x)[own], targets[own]))
    kd = KD()
    torch.testing.assert_close(terms["kd"], kd.weight * kd(Signal(student(x)), Signal(teacher(x))))


# --- criteria that need labels

NEEDY = {"dkd": DKD, "teacher-free": TeacherFree}


@pytest.mark.parametrize("name", NEEDY)
def test_criteria_on_labels_refuse_examples_without(name):
    criterion, signal = NEEDY[name](), Signal(torch.zeros(3, 4))
    assert NEEDY[name].needs_labels
    criterion(signal, signal, batch_of([0, 1, 2]))
    with pytest.raises(UsageError, match=f"{name} needs .* labels, and some of these have none"):
        criterion(signal, signal, batch_of([0, -1, 2]))


@pytest.mark.parametrize("name", NEEDY)
def test_a_recipe_that_needs_labels_it_has_not_is_refused_when_read(name, tmp_path):
    text = RECIPE.replace("CRITERION", name)
    with pytest.raises(RecipeError, match=rf"distill: {name} needs every .*kd and dist do without"):
        recipe_from_text(text, "mine.yaml", tmp_path)
    recipe_from_text(text.replace(", unlabelled: more/images.npy", ""), "mine.yaml", tmp_path)


def test_criteria_that_ask_for_labels_say_that_they_need_them():
    """Whatever calls `labels` without saying `needs_labels` would fail in the midst of a run."""
    from attar.distill.criterion import criteria

    for name in criteria.names():
        kind = criteria.get(name)
        code = kind.forward.__code__
        assert kind.needs_labels == ("labels" in code.co_names), name


# --- in a stage


@pytest.fixture(scope="module")
def some():
    """40 digits with labels, and 1,000 others without."""
    data = digits(subset=40)
    rest = digits().train.only(range(1000))
    bare = ArraySplit(
        "unlabelled",
        rest.images[rest.rows],
        torch.full((1000,), UNLABELLED),
        mean=data.preparation["mean"],
        std=data.preparation["std"],
    )
    return replace(data, unlabelled=bare)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    net, training = flat_cnn(12, None), Training(epochs=6, **FAST)
    train(net, data=digits(), task=TASK, training=training, objective=TaskObjective(TASK))
    return net


@pytest.fixture
def run(some, teacher, tmp_path) -> Context:
    return Context(task=TASK, data=some, teacher=teacher, seed=1, work=tmp_path)


def test_a_student_learns_more_with_images_that_nobody_labelled(run):
    """As many steps on 40 labelled digits alone don't reach it."""
    without = replace(run.at("without"), data=replace(run.data, unlabelled=None))
    few = Distill(epochs=63, **FAST).apply(Student(flat_cnn(4, None)), without)
    many = Distill(epochs=3, **FAST).apply(Student(flat_cnn(4, None)), run.at("with"))
    assert run.evaluate(many.module, "test") > run.evaluate(few.module, "test") + 0.01
    assert run.found["unlabelled"] == 1000


def test_every_image_is_taught_and_only_the_labelled_are_judged(run, monkeypatch):
    seen: list[Batch] = []
    loss = ImageClassification.loss

    def watched(self, output, batch, **how):
        seen.append(batch)
        return loss(self, output, batch, **how)

    monkeypatch.setattr(ImageClassification, "loss", watched)
    heard: list[dict] = []
    stage = Distill(transfer=20, epochs=3, **FAST)
    stage.apply(Student(flat_cnn(4, None)), replace(run, tell=heard.append))
    indices = torch.cat([b.indices for b in seen])
    targets = torch.cat([b.targets for b in seen])
    assert indices.max() == 1019 and run.found["transfer"]["chosen"] == 20
    assert torch.equal(targets == UNLABELLED, indices >= 20)
    epochs = [e for e in heard if e["event"] == "epoch"]
    assert all(np.isfinite(e["loss"]) and e["terms"]["task"] > 0 for e in epochs)
    assert len(run.data.train) == 40 and len(run.data.unlabelled) == 1000


def test_a_student_that_nobody_teaches_has_no_use_for_them(run):
    Distill(criteria=[], epochs=1, **FAST).apply(Student(flat_cnn(4, None)), run)
    assert "unlabelled" not in run.found


def test_a_stage_from_python_refuses_criteria_that_need_labels(run):
    with pytest.raises(UsageError, match=r"dkd needs every example's label.*do without"):
        Distill(criteria=["kd", "dkd"], epochs=1, **FAST).apply(Student(flat_cnn(4, None)), run)


def test_crd_tells_an_unlabelled_example_from_all_others_and_a_labelled_one_from_its_class():
    crd = CRD(layers=["x"], negatives=400, width=4)
    crd.expect(12)
    signal = Signal(torch.randn(12, 3), {"x": torch.randn(12, 5)})
    crd.prepare(signal, signal)
    targets = torch.tensor([0, 0, 0, 1, 1, 1, *[UNLABELLED] * 6])
    places = torch.arange(12)
    drawn = crd._others(Batch(torch.zeros(12, 1), targets, places))
    for place, row in zip(places.tolist(), drawn, strict=True):
        own = {place} if place >= 6 else set(places[targets == targets[place]].tolist())
        assert set(row.tolist()) == set(range(12)) - own


def test_criteria_that_remember_examples_count_the_unlabelled(run):
    crd = {"crd": {"layers": ["4"], "negatives": 64}}
    taught = Distill(criteria=["kd", crd], epochs=2, **FAST).apply(Student(flat_cnn(4, None)), run)
    assert run.evaluate(taught.module) > 0.5
