"""A teacher's stored answers: the same training as with the teacher present."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attar.data import DataConfig, load_data
from attar.distill.criteria.kd import KD
from attar.distill.objective import DistillObjective
from attar.distill.signal import Signal
from attar.distill.stored import StoredTeacher, store_answers, stored
from attar.distill.teacher import Teacher
from attar.errors import UsageError
from attar.stages.base import Context
from attar.stages.distill import Distill
from attar.store import Store
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training

TASK = ImageClassification()
VIEWS, SEED = 3, 11


@pytest.fixture(scope="module")
def augmented():
    """Digits that are shifted about at random."""
    written = {
        "source": "digits",
        "subset": 96,
        "augment": [{"random_crop": {"size": 8, "padding": 1}}],
    }
    return load_data(DataConfig.model_validate(written))


def test_stored_gradients_equal_live_ones(augmented, tiny_net, tmp_path: Path) -> None:
    teacher, student = tiny_net(8), tiny_net(2)
    split = augmented.train.with_views(VIEWS)
    live = Teacher(teacher, TASK)
    store_answers(live, split, views=VIEWS, seed=SEED, folder=tmp_path)
    for epoch in (0, 2, 4, 7):
        gradients = []
        for source in (live, StoredTeacher(tmp_path)):
            objective = DistillObjective(TASK, source, {"kd": KD()})
            objective.start_epoch(epoch, 8)
            batches = split.batches(32, shuffle=True, augment=True, seed=SEED, epoch=epoch)
            student.zero_grad()
            sum(objective(student.eval(), next(batches)).values()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_views_repeat_and_differ(augmented) -> None:
    split = augmented.train.with_views(VIEWS)

    def pictures(epoch: int) -> torch.Tensor:
        batches = split.batches(96, augment=True, seed=SEED, epoch=epoch)
        return next(batches).inputs

    torch.testing.assert_close(pictures(1), pictures(1 + VIEWS))
    assert not torch.equal(pictures(0), pictures(1))


class Counting(Teacher):
    """Counts what it is asked, and is killed at the call number `dies_at`."""

    def __init__(self, module, task, *, dies_at: int | None = None) -> None:
        super().__init__(module, task)
        self.asked, self.dies_at = 0, dies_at

    def signal(self, batch) -> Signal:
        self.asked += 1
        if self.asked == self.dies_at:
            raise KeyboardInterrupt
        return super().signal(batch)


def test_building_goes_on_after_a_kill(augmented, tiny_net, tmp_path: Path) -> None:
    split = augmented.train.with_views(VIEWS)
    net = tiny_net(8)

    def answers(root: Path, dies_at: int | None = None) -> StoredTeacher:
        teacher = Counting(net, TASK, dies_at=dies_at)
        return stored(teacher, split, views=VIEWS, seed=SEED, store=Store(root))

    whole = answers(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        answers(tmp_path / "cut", dies_at=2)
    again = answers(tmp_path / "cut")
    batch = next(split.batches(32))
    for epoch in range(VIEWS):
        whole.start_epoch(epoch)
        again.start_epoch(epoch)
        torch.testing.assert_close(whole.signal(batch).logits, again.signal(batch).logits)


def test_answers_serve_whoever_asks_next(augmented, digits, tiny_net, tmp_path: Path) -> None:
    store, net = Store(tmp_path), tiny_net(8)

    def asked(module, split, seed: int = SEED) -> int:
        teacher = Counting(module, TASK)
        stored(teacher, split, views=1, seed=seed, store=store)
        return teacher.asked

    split = augmented.train.with_views(1)
    assert asked(net, split) > 0
    assert asked(net, split) == 0
    assert asked(tiny_net(4), split) > 0, "another teacher's answers were taken"
    assert asked(net, split, seed=SEED + 1) > 0, "answers to other pictures were taken"
    assert asked(net, digits.train) > 0
    assert asked(net, digits.train, seed=SEED + 1) == 0, "nothing is drawn for these"


def test_the_stage_learns_from_stored_answers(augmented, tiny_net, tmp_path: Path) -> None:
    run = Context(TASK, augmented, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    stage = Distill(views=2, epochs=3, batch_size=32)
    trained = stage.apply(Student(tiny_net(2)), run)
    assert not torch.equal(next(trained.module.parameters()), next(tiny_net(2).parameters()))
    assert list(tmp_path.glob("store/entries/*/answers.npy"))


def test_what_is_not_augmented_is_asked_once(digits, tiny_net, tmp_path: Path) -> None:
    plain = tiny_net(2)
    run = Context(TASK, digits, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    once, _ = run.taught(run.teacher, Training(epochs=2), "distill")
    assert isinstance(once, StoredTeacher)
    run.train(Student(plain), Training(epochs=1), label="recover")
    assert len(list(tmp_path.glob("store/entries/*/answers.npy"))) == 1, "asked twice"
    live, _ = run.taught(run.teacher, Training(epochs=2), "other", layers=["0"])
    assert isinstance(live, Teacher)


def test_what_cannot_be_stored_is_refused(augmented, tiny_net, tmp_path: Path) -> None:
    run = Context(TASK, augmented, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    layers = {"student": "0", "teacher": "0"}
    inner = Distill(views=2, criteria=[{"feature": {"layers": [layers]}}])
    with pytest.raises(UsageError, match="inner layer"):
        inner.apply(Student(tiny_net(2)), run)
    streamed = replace(run, data=replace(augmented, train=[1, 2]))
    with pytest.raises(UsageError, match="in memory"):
        Distill(views=2).apply(Student(tiny_net(2)), streamed)
