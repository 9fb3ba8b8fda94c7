"""Image classification: figures, files and what people are shown."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from attar.data import Batch, DataConfig, from_loaders, load_data
from attar.errors import DataError
from attar.runtimes import _predict
from attar.tasks.base import tasks
from attar.tasks.image_classification import ImageClassification

TASK = ImageClassification()


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(source="digits"))


def batch_of(targets: np.ndarray) -> Batch:
    count = len(targets)
    return Batch(torch.zeros(count, 1, 2, 2), torch.from_numpy(targets), torch.arange(count))


def answered(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels in which every class occurs, and their statistics."""
    random = np.random.RandomState(seed)
    labels = np.r_[np.arange(classes), random.randint(0, classes, count)].astype(np.int64)
    logits = random.randn(len(labels), classes) + 1.5 * np.eye(classes)[labels]
    return logits, labels, TASK.statistics(logits, batch_of(labels))


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


# --- figures


@settings(max_examples=20, deadline=None)
@given(classes=st.integers(2, 6), count=st.integers(1, 60), seed=st.integers(0, 1000))
def test_figures_are_scikit_learns(classes, count, seed):
    logits, labels, statistics = answered(count, classes, seed)
    further = TASK.further_values(statistics)
    answers = logits.argmax(1)
    assert TASK.value(statistics) == pytest.approx(accuracy_score(labels, answers))
    assert further["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, answers))
    scores = softmax(logits)
    if classes == 2:
        expected = roc_auc_score(labels, scores[:, 1])
    else:
        expected = roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    assert further["auc"] == pytest.approx(expected)


def test_statistics_of_batches_join_to_those_of_all():
    logits, labels, whole = answered(50, 3, 0)
    halves = [TASK.statistics(logits[s], batch_of(labels[s])) for s in (slice(20), slice(20, None))]
    assert np.array_equal(np.concatenate(halves), whole)


def test_tensors_arrays_and_wrapped_outputs_say_the_same():
    logits, labels, expected = answered(8, 3, 0)
    tensor = torch.from_numpy(logits)
    for output in (tensor, (tensor, None), {"logits": tensor}, SimpleNamespace(logits=tensor)):
        np.testing.assert_allclose(TASK.statistics(output, batch_of(labels)), expected, rtol=1e-5)
    assert TASK.agreement(tensor, logits).all()
    assert TASK.agreement(tensor, -logits).mean() < 0.5


def test_classes_that_do_not_occur_are_left_out_of_further_figures():
    _, labels, statistics = answered(40, 4, 0)
    kept = statistics[(labels != 2)]
    assert set(TASK.further_values(kept)) == {"balanced_accuracy", "auc"}
    assert set(TASK.further_values(statistics[labels == 1])) == {"balanced_accuracy"}


def test_with_very_many_classes_statistics_stay_small():
    logits, labels, statistics = answered(5, 150, 0)
    assert statistics.shape == (155, 4)
    assert "auc" not in TASK.further_values(statistics)
    assert TASK.value(statistics) == accuracy_score(labels, logits.argmax(1))


def test_hits_are_what_the_metric_is_the_mean_of():
    _, _, statistics = answered(30, 3, 0)
    assert TASK.hits(statistics).mean() == TASK.value(statistics)
    assert set(TASK.hits(statistics)) <= {0.0, 1.0}


def test_verdicts_and_classes_tell_where_the_answers_are_wrong():
    logits, labels, statistics = answered(30, 3, 0)
    data = SimpleNamespace(classes=("a", "b", "c", "never seen"))
    found = TASK.verdicts(statistics)
    assert np.array_equal(found.label, labels) and np.array_equal(found.answer, logits.argmax(1))
    assert np.array_equal(found.right, found.label == found.answer)
    np.testing.assert_allclose(found.confidence, softmax(logits).max(1))
    shares, counts = TASK.per_class(statistics, data)
    assert np.isnan(shares[3]) and counts.tolist() == [*np.bincount(labels), 0]
    assert np.nansum(shares * counts) / counts.sum() == pytest.approx(TASK.value(statistics))


def test_loss_is_cross_entropy_and_reaches_the_network():
    output = torch.zeros(2, 4, requires_grad=True)
    loss = TASK.loss({"logits": output}, batch_of(np.array([0, 3])), label_smoothing=0.1)
    assert loss.item() == pytest.approx(np.log(4))
    loss.backward()
    assert output.grad is not None


def test_unlabelled_examples_have_no_loss():
    with pytest.raises(DataError, match="no labels"):
        TASK.loss(torch.zeros(1, 2), Batch(torch.zeros(1, 1, 2, 2), None, torch.arange(1)))


def test_a_model_with_other_classes_than_the_data_is_refused(digits):
    TASK.check_output(torch.zeros(2, 10), digits)
    with pytest.raises(DataError, match="answers with 7 classes and the data have 10"):
        TASK.check_output(torch.zeros(2, 7), digits)
    with pytest.raises(DataError, match=r"shape \(2, 10, 4\)"):
        TASK.check_output(torch.zeros(2, 10, 4), digits)


# --- for people


def test_it_is_found_by_its_name_and_describes_itself():
    assert tasks.get("image-classification") is ImageClassification
    assert tasks.describe()["image-classification"].startswith("One class of several")


def test_the_description_is_what_a_manifest_needs(digits):
    described = TASK.describe(digits)
    (image,), (output,) = described["inputs"], described["outputs"]
    assert image["shape"] == ["batch", 1, 8, 8] and image["dtype"] == "float32"
    assert image["color"] == "gray" and image["scale"] == pytest.approx(0.00392157)
    assert output["classes"] == [str(i) for i in range(10)] and output["meaning"] == "logits"


def test_examples_to_export_with_are_validation_images(digits):
    (inputs,) = TASK.example(digits, 3)
    assert torch.equal(inputs, next(digits.validation.batches(3)).inputs)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    random = np.random.RandomState(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.randint(0, 256, (12 + i, 20 - i, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("size", [8, [6, 9]])
@pytest.mark.parametrize("color", ["gray", "rgb"])
def test_a_file_is_read_just_as_in_training_and_by_the_bundle(photos, size, color):
    config = {"source": "folder", "path": str(photos), "size": size, "color": color}
    data = load_data(DataConfig.model_validate(config))
    inputs = TASK.describe(data)["inputs"]
    files = sorted(photos.rglob("*.png"))
    place = int(data.test.rows[0])
    (read,) = TASK.read(files[place], inputs)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, data.test.pick([0]).inputs.numpy(), atol=1e-5)
    np.testing.assert_allclose(read, _predict.read_image(files[place], inputs[0]), atol=1e-6)


def test_files_that_can_not_be_read_are_named(photos, digits, tmp_path):
    inputs = TASK.describe(digits)["inputs"]
    (tmp_path / "bad.png").write_text("no image")
    for name in ("bad.png", "missing.png"):
        with pytest.raises(DataError, match=f"can't read the image .*{name}"):
            TASK.read(tmp_path / name, inputs)


def test_a_model_of_unknown_preparation_reads_no_files(photos):
    pairs = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    data = from_loaders(pairs, pairs, pairs)
    with pytest.raises(DataError, match="don't say how they prepare images"):
        TASK.read(photos / "cat" / "00.png", TASK.describe(data)["inputs"])


def test_answers_are_named_best_first():
    ranked = TASK.answer(np.array([[0.0, 2.0, 1.0]]), [{"classes": ["a", "b", "c"]}])
    assert [name for name, _ in ranked] == ["b", "c", "a"]
    assert sum(p for _, p in ranked) == pytest.approx(1)
    assert ranked[0][1] == pytest.approx(np.exp(2) / (1 + np.exp(2) + np.exp(1)))


def picture(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def test_shown_examples_are_the_images_themselves(digits):
    first, second = TASK.show(digits.test, [4, 1], digits)
    images = digits.test.images[digits.test.rows]
    assert np.array_equal(picture(first), images[4, 0])
    assert np.array_equal(picture(second), images[1, 0])
    assert TASK.show(digits.test, [], digits) == []


def test_examples_of_unknown_preparation_are_shown_in_full_contrast():
    inputs = torch.linspace(-3, 5, 12).reshape(1, 3, 2, 2)
    pairs = [(inputs.repeat(2, 1, 1, 1), torch.tensor([0, 1]))]
    (uri, _) = TASK.show((data := from_loaders(pairs, pairs, pairs)).test, [0, 1], data)
    assert picture(uri).shape == (2, 2, 3)
    assert (picture(uri).min(), picture(uri).max()) == (0, 255)
