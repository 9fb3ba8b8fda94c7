"""Soft labels that others made, in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from attar.data import DataConfig, load_data
from attar.data.arrays import ArraySplit
from attar.data.base import UNLABELLED
from attar.distill.table import Table
from attar.distill.transfer import with_unlabelled
from attar.errors import DataError, RecipeError
from attar.recipe import load_recipe
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.student import Student
from attar.tasks.image_classification import ImageClassification

TASK = ImageClassification()
CLASSES = 10


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(source="digits", subset={"count": 60}))


@pytest.fixture
def soft(data) -> np.ndarray:
    """A distribution for each of the training part's examples."""
    logits = np.random.default_rng(0).normal(size=(len(data.train.images), CLASSES)) * 2
    odds = np.exp(logits)
    return odds / odds.sum(1, keepdims=True)


def write(path: Path, soft: np.ndarray, data, examples: np.ndarray | None = None) -> Path:
    """The table in the form that the file's name ends with."""
    if path.suffix == ".npz":
        named = {} if examples is None else {"example": examples}
        np.savez(path, probabilities=soft, **named)
        return path
    columns = {name: soft[:, i] for i, name in enumerate(data.classes)}
    if examples is not None:
        columns = {"example": examples, **columns}
    save = pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table
    save(pa.table(columns), path)
    return path


@pytest.mark.parametrize("ending", ["npz", "parquet", "csv"])
@pytest.mark.parametrize("named", [False, True], ids=["in order", "by example"])
def test_the_signal_is_the_file_s(data, soft, tmp_path: Path, ending: str, named: bool) -> None:
    order = np.random.default_rng(1).permutation(len(soft))
    given = (soft[order], order) if named else (soft, None)
    table = Table(write(tmp_path / f"soft.{ending}", given[0], data, given[1]), data)
    for batch in data.train.batches(16, shuffle=True):
        wanted = soft[data.train.rows[batch.indices].numpy()]
        found = table.signal(batch).logits.softmax(-1).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_logits_and_another_order_of_classes(data, soft, tmp_path: Path) -> None:
    names = list(reversed(data.classes))
    logits = np.log(soft)[:, ::-1] + 3
    np.savez(tmp_path / "soft.npz", logits=logits, classes=np.array(names))
    batch = data.train.pick([5, 7])
    found = Table(tmp_path / "soft.npz", data).signal(batch).logits.numpy()
    np.testing.assert_allclose(found, np.log(soft)[data.train.rows[[5, 7]]] + 3, rtol=1e-5)


def test_only_what_is_trained_on_must_be_there(data, soft, tmp_path: Path) -> None:
    rows = data.train.rows.numpy()
    Table(write(tmp_path / "some.npz", soft[rows], data, rows), data)
    with pytest.raises(DataError, match=rf"no soft labels for 1 of the 60 .*first is {rows[4]}\b"):
        kept = np.delete(rows, 4)
        Table(write(tmp_path / "fewer.npz", soft[kept], data, kept), data)


def test_unlabelled_images_have_the_numbers_after_the_training_part_s(data, soft, tmp_path) -> None:
    unlabelled = ArraySplit(
        "unlabelled",
        data.train.images[:3],
        torch.full((3,), UNLABELLED),
        mean=data.preparation["mean"],
        std=data.preparation["std"],
    )
    joined = with_unlabelled(replace(data, unlabelled=unlabelled))
    more = np.concatenate([soft, soft[:3][::-1]])
    table = Table(write(tmp_path / "soft.npz", more, data), joined)
    batch = joined.train.pick([len(data.train), len(data.train) + 2])
    found = table.signal(batch).logits.softmax(-1).numpy()
    np.testing.assert_allclose(found, soft[[2, 0]], rtol=1e-4, atol=1e-6)
    with pytest.raises(DataError, match="no soft labels for 3 of the 63"):
        Table(write(tmp_path / "fewer.npz", soft, data), joined)


def test_a_certain_table_has_finite_logits(data, tmp_path: Path) -> None:
    soft = np.eye(CLASSES)[np.arange(len(data.train.images)) % CLASSES]
    table = Table(write(tmp_path / "hard.npz", soft, data), data)
    assert table.signal(data.train.pick(range(60))).logits.isfinite().all()


def broken(soft: np.ndarray, row: int, value: float) -> np.ndarray:
    soft = soft.copy()
    soft[row, 3] = value
    return soft


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s, n: {"probabilities": broken(s, 7, s[7, 3] + 0.1)}, r"row 7 sums to 1\.1"),
        (lambda s, n: {"probabilities": broken(s, 7, -0.2)}, r"row 7 has the probability -0\.2"),
        (lambda s, n: {"probabilities": broken(s, 9, np.nan)}, "NaN, first in row 9"),
        (lambda s, n: {"probabilities": s[:, :9]}, r"have 10 classes: \(examples, 10\)"),
        (lambda s, n: {"answers": s}, "either `probabilities` or `logits`"),
        (lambda s, n: {"probabilities": s, "logits": s}, "either `probabilities` or `logits`"),
        (lambda s, n: {"probabilities": s, "example": n + 1}, r"names the example \d+, and"),
        (lambda s, n: {"probabilities": s, "example": n // 2}, "names the example 0 more than"),
        (lambda s, n: {"probabilities": s, "example": n[:5]}, "names 5 examples"),
        (lambda s, n: {"probabilities": s, "example": n + 0.5}, "whole numbers"),
        (lambda s, n: {"probabilities": s, "classes": np.array([*"abcdefghij"])}, "classes a"),
        (lambda s, n: {"probabilities": np.array([{}], object)}, "can't be read"),
    ],
    ids=["sum", "negative", "nan", "classes", "name", "both", "unknown", "twice", "count", "half",
         "others", "pickled"],
)  # fmt: skip
def test_what_is_wrong_is_named(data, soft, tmp_path: Path, spoil, said: str) -> None:
    path = tmp_path / "soft.npz"
    np.savez(path, **spoil(soft, np.arange(len(soft))))
    with pytest.raises(DataError, match=said) as refused:
        Table(path, data)
    assert str(path) in str(refused.value)


def test_tables_that_cannot_be_read(data, soft, tmp_path: Path) -> None:
    lacking = write(tmp_path / "soft.csv", soft, data)
    lacking.write_text(lacking.read_text().replace('"3"', '"three"'))
    for name, content, said in (
        ("none.npz", None, "there is no table"),
        ("cut.npz", b"PK\x03\x04junk", "can't be read"),
        ("cut.parquet", b"PAR1", "can't be read"),
        ("soft.pt", b"", "none of them"),
        ("soft.csv", lacking.read_bytes(), "no column '3'"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            Table(tmp_path / name, data)


def test_a_student_learns_from_a_table_alone(data, tmp_path: Path) -> None:
    targets = np.full(len(data.train.images), 0)
    targets[data.train.rows.numpy()] = data.train.targets.numpy()
    soft = np.eye(CLASSES)[targets] * 0.9 + 0.01
    path = write(tmp_path / "soft.parquet", soft, data)
    stage = Distill(
        teacher={"answers": str(path)},
        criteria=["kd", "logits-mse"],
        task_weight=0,
        epochs=40,
        batch_size=12,
        optimizer={"lr": 0.02},
    )
    run = Context(TASK, data, teacher=None, seed=0, work=tmp_path)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, CLASSES))
    trained = stage.apply(Student(net), run)
    batch = data.train.pick(range(len(data.train)))
    with torch.no_grad():
        right = trained.module(batch.inputs).argmax(1) == batch.targets
    assert right.float().mean() > 0.9
    assert run.found["teacher"] == {"form": "table"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("criteria: [{feature: {layers: [net]}}]", "feature compares inner layers"),
        ("views: 3", "`views` and `store` keep a network's answers"),
        ("store: {format: int8}", "`views` and `store` keep a network's answers"),
    ],
    ids=["inner layers", "views", "store"],
)
def test_what_a_table_has_not_is_refused_when_the_recipe_is_read(
    tmp_path: Path, settings: str, said: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: r\ntask: image-classification\ndata: {source: digits}\n"
        "teacher: {model: digits, train: {}}\nstudent: {model: digits}\n"
        f"stages:\n- distill:\n    teacher: {{answers: soft.npz}}\n    {settings}\n"
    )
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(recipe))


def test_a_teacher_is_a_network_or_a_table() -> None:
    for wrong in (
        {},
        {"model": "digits", "answers": "a.npz"},
        {"answers": "a", "arguments": {"w": 1}},
    ):
        with pytest.raises(ValueError, match="model"):
            Distill(teacher=wrong)
