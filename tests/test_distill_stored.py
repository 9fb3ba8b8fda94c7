"""A teacher's stored answers: the same training as with the teacher present."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attar.data import DataConfig, load_data
from attar.distill import asking
from attar.distill.answers import Storing
from attar.distill.criteria.feature import Feature
from attar.distill.criteria.kd import KD
from attar.distill.objective import DistillObjective
from attar.distill.signal import Signal
from attar.distill.stored import StoredTeacher, stored
from attar.distill.teacher import Teacher
from attar.errors import StorageError, TrainingError, UsageError
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


def answers(net, split, root: Path, layers=(), tell=None, **storing) -> StoredTeacher:
    teacher = Teacher(net, TASK, layers=layers, calls=1)  # in its own form, whatever is faster
    return stored(
        teacher, split, views=VIEWS, seed=SEED, store=Store(root), storing=Storing(**storing),
        tell=tell or (lambda event: None),
    )  # fmt: skip


@pytest.mark.parametrize("layers", [[], ["0"]], ids=["logits", "inner layers"])
def test_stored_gradients_equal_live_ones(augmented, tiny_net, tmp_path: Path, layers) -> None:
    teacher, student = tiny_net(8), tiny_net(2)
    split = augmented.train.with_views(VIEWS)
    live = Teacher(teacher, TASK, layers=layers, calls=1)
    hint = {"hint": Feature(layers=layers)} if layers else {}
    gradients = []
    for source in (live, answers(teacher, split, tmp_path, layers)):
        torch.manual_seed(0)  # the hint's adapter
        objective = DistillObjective(TASK, source, {"kd": KD(), **hint})
        objective.prepare(student, split.pick([0, 1]))
        for epoch in (0, 2, 4, 7):
            objective.start_epoch(epoch, 8)
            batches = split.batches(32, shuffle=True, augment=True, seed=SEED, epoch=epoch)
            student.zero_grad()
            sum(objective(student.eval(), next(batches)).values()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert len({float(g.norm()) for g in gradients[:4]}) == 4, "the epochs don't differ"
    for wanted, found in zip(gradients[:4], gradients[4:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("storing", "bound"),
    [({"format": "float16"}, 0.002), ({"format": "int8"}, 0.01), ({"top_k": 4}, 0.05)],
    ids=str,
)
def test_smaller_forms_keep_the_distribution(augmented, tiny_net, tmp_path, storing, bound) -> None:
    net, split = tiny_net(8), augmented.train.with_views(VIEWS)
    batch = next(split.batches(96, augment=True, seed=SEED, epoch=0))
    exact = answers(net, split, tmp_path).signal(batch).logits
    found = answers(net, split, tmp_path, **storing).signal(batch).logits
    assert not torch.equal(found, exact)
    assert (found.softmax(-1) - exact.softmax(-1)).abs().max() < bound
    sizes = [
        sum(f.stat().st_size for f in entry.glob("*.npy"))
        for entry in sorted(tmp_path.glob("entries/*"), key=lambda e: e.stat().st_mtime_ns)
    ]
    assert sizes[1] < sizes[0]


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


def test_building_goes_on_after_a_kill(augmented, tiny_net, tmp_path: Path, monkeypatch) -> None:
    split = augmented.train.with_views(VIEWS)
    net = tiny_net(8)

    monkeypatch.setattr(asking, "BATCH", 32)
    monkeypatch.setattr(asking, "SAVED_EVERY", 0)
    teacher = Counting(net, TASK)

    def ask(root: Path, dies_at: int | None = None) -> StoredTeacher:
        teacher.asked, teacher.dies_at = 0, dies_at
        return stored(teacher, split, views=VIEWS, seed=SEED, store=Store(root))

    whole = ask(tmp_path / "whole")
    everything = teacher.asked
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "cut", dies_at=6)  # in the middle of the second view
    again = ask(tmp_path / "cut")
    assert teacher.asked == everything - 5, "what was answered was asked again"
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
    assert list(tmp_path.glob("store/entries/*/answers.json"))


def test_what_is_not_augmented_is_asked_once(digits, tiny_net, tmp_path: Path) -> None:
    plain = tiny_net(2)
    run = Context(TASK, digits, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    once, _ = run.taught(run.teacher, Training(epochs=2), "distill")
    assert isinstance(once, StoredTeacher)
    run.train(Student(plain), Training(epochs=1), label="recover")
    assert len(list(tmp_path.glob("store/entries/*/answers.json"))) == 1, "asked twice"
    live, _ = run.taught(run.teacher, Training(epochs=2), "other", layers=["0"])
    assert isinstance(live, Teacher)


def test_what_cannot_be_stored_is_refused(augmented, tiny_net, tmp_path: Path) -> None:
    run = Context(TASK, augmented, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    streamed = replace(run, data=replace(augmented, train=[1, 2]))
    with pytest.raises(UsageError, match="in memory"):
        Distill(views=2).apply(Student(tiny_net(2)), streamed)
    with pytest.raises(UsageError, match="give `views` as well"):
        Distill(store={"format": "float16"}).apply(Student(tiny_net(2)), run)
    with pytest.raises(UsageError, match="top_k is 10 and the teacher answers with 10 classes"):
        Distill(views=2, store={"top_k": 10}).apply(Student(tiny_net(2)), run)


def test_the_stage_learns_from_stored_inner_layers(augmented, tiny_net, tmp_path: Path) -> None:
    run = Context(TASK, augmented, teacher=tiny_net(8).eval(), seed=0, work=tmp_path)
    kept = {"folder": str(tmp_path / "kept"), "format": "float16"}
    stage = Distill(views=2, epochs=2, criteria=[{"feature": {"layers": ["0"]}}], store=kept)
    stage.apply(Student(tiny_net(2)), run)
    made = json.loads((tmp_path / "kept" / "answers.json").read_text())
    assert made["layers"] == ["0"] and made["views"] == 2
    with pytest.raises(UsageError, match="no inner layer '2'"):
        stage = stage.model_copy(update={"criteria": [{"similarity": {"layers": ["2"]}}]})
        stage.apply(Student(tiny_net(2)), run)


def test_a_persons_folder_is_held_to_what_it_was_made_of(augmented, tiny_net, tmp_path) -> None:
    split, folder = augmented.train.with_views(VIEWS), tmp_path / "kept"
    net = tiny_net(8)
    answers(net, split, tmp_path, ["0"], folder=str(folder))
    fewer = answers(net, split, tmp_path, folder=str(folder))  # more layers are there
    assert not fewer.signal(split.pick([0])).features
    for change, said in (
        ({"net": tiny_net(4)}, "another teacher"),
        ({"split": augmented.train.only(range(50)).with_views(VIEWS)}, "other examples"),
        ({"layers": ["2"]}, "no inner layer '2'"),
        ({"format": "float16"}, "another `format`"),
        ({"top_k": 3}, "another `top_k`"),
    ):
        asked = {"net": net, "split": split, "root": tmp_path, "folder": str(folder), **change}
        with pytest.raises(UsageError, match=said) as refused:
            answers(**asked)
        assert "rebuild=true" in str(refused.value)
    found = answers(tiny_net(4), split, tmp_path, folder=str(folder), rebuild=True)
    assert found.made["layers"] == []


def test_a_folder_that_was_begun_for_more_is_finished_as_begun(
    augmented, tiny_net, tmp_path, monkeypatch
) -> None:
    split, folder = augmented.train.with_views(VIEWS), str(tmp_path / "kept")
    monkeypatch.setattr(asking, "BATCH", 32)
    monkeypatch.setattr(asking, "SAVED_EVERY", 0)
    net = tiny_net(8)

    def ask(views: int, dies_at: int | None = None) -> StoredTeacher:
        teacher = Counting(net, TASK, dies_at=dies_at)
        kept = Storing(folder=folder)
        return stored(teacher, split, views=views, seed=SEED, store=Store(), storing=kept)

    with pytest.raises(KeyboardInterrupt):
        ask(VIEWS, dies_at=3)
    with pytest.raises(UsageError, match=f"begun for {VIEWS} views"):
        ask(1)
    ask(VIEWS)
    assert ask(1).choice["views"] == 1


def test_who_goes_on_asks_in_the_same_form(augmented, tiny_net, tmp_path, monkeypatch) -> None:
    split, settled = augmented.train.with_views(VIEWS), []
    monkeypatch.setattr(asking, "BATCH", 32)
    net = tiny_net(8)

    class Settling(Counting):
        def settle(self, batch) -> None:
            settled.append(self)

    for dies_at in (5, None):
        teacher = Settling(net, TASK, dies_at=dies_at)
        with pytest.raises(KeyboardInterrupt) if dies_at else nullcontext():
            stored(teacher, split, views=VIEWS, seed=SEED, store=Store(tmp_path))
    assert len(settled) == 2 and settled[0] is not settled[1]


def test_rebuilding_is_no_part_of_what_a_result_depends_on() -> None:
    plain, again = Distill(store={}), Distill(store={"rebuild": True})
    assert plain.model_dump() == again.model_dump()


def test_pictures_that_are_drawn_otherwise_are_noticed(augmented, tiny_net, tmp_path) -> None:
    split, net, folder = augmented.train.with_views(VIEWS), tiny_net(8), str(tmp_path / "kept")
    answers(net, split, tmp_path, folder=folder)
    index = tmp_path / "kept" / "answers.json"
    made = json.loads(index.read_text())
    made["sketch"][3] += 0.5
    made["torch"] = "1.0"
    index.write_text(json.dumps(made))
    with pytest.raises(UsageError, match=r"other pictures.*PyTorch 1\.0"):
        answers(net, split, tmp_path, folder=folder)


def test_answers_by_another_version_are_named_and_used(augmented, tiny_net, tmp_path) -> None:
    split, net, folder = augmented.train.with_views(VIEWS), tiny_net(8), str(tmp_path / "kept")
    answers(net, split, tmp_path, folder=folder)
    index = tmp_path / "kept" / "answers.json"
    index.write_text(index.read_text().replace(str(torch.__version__), "1.0"))
    told: list[dict] = []
    answers(net, split, tmp_path, folder=folder, tell=told.append)
    assert any("made by" in event["text"] and "PyTorch 1.0" in event["text"] for event in told)


def test_size_and_time_are_told_before(augmented, tiny_net, tmp_path: Path) -> None:
    told: list[dict] = []
    split = augmented.train.with_views(VIEWS)
    answers(tiny_net(8), split, tmp_path, tell=told.append)
    said = next(event["text"] for event in told if event["event"] == "note")
    assert "96 examples in 3 views each" in said and "11.5 KB" in said  # 96 · 3 · 10 · 4


def test_what_has_no_room_is_not_begun(augmented, tiny_net, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(asking.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"would take 11\.5 KB and .* has 1 KB left"):
        answers(tiny_net(8), augmented.train.with_views(VIEWS), tmp_path)
    assert not list(tmp_path.glob("**/*.npy"))


def test_answers_that_are_no_numbers_are_refused(augmented, tiny_net, tmp_path: Path) -> None:
    net = tiny_net(8)
    torch.nn.init.constant_(net[-1].bias, float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        answers(net, augmented.train.with_views(VIEWS), tmp_path)


@pytest.mark.parametrize("damage", ["a bit", "the end", "all of it", "the index", "a part of it"])
def test_damage_is_found_and_named(augmented, tiny_net, tmp_path: Path, damage: str) -> None:
    split, folder = augmented.train.with_views(VIEWS), tmp_path / "kept"
    answers(tiny_net(8), split, tmp_path, folder=str(folder))
    path = folder / "logits.values.answers.npy"
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "the end":
        path.write_bytes(content[:-100])
    elif damage == "all of it":
        path.unlink()
    elif damage == "the index":
        (folder / "answers.json").write_text("{")
    else:
        made = json.loads((folder / "answers.json").read_text())
        del made["count"]
        (folder / "answers.json").write_text(json.dumps(made))
    batch = next(split.batches(32))
    with pytest.raises(StorageError, match=r"kept.* damaged"):
        found = StoredTeacher(folder)
        for epoch in range(VIEWS):
            found.start_epoch(epoch)
            found.signal(batch)


def _ask(net, split, folder: str, slowly: float) -> None:
    teacher = Counting(net, TASK)
    stored(teacher, split, views=VIEWS, seed=SEED, store=Store(), storing=Storing(folder=folder))
    Path(f"{folder}-{slowly}").write_text(str(teacher.asked))


def test_several_processes_ask_once(augmented, tiny_net, tmp_path: Path) -> None:
    split, folder = augmented.train.with_views(VIEWS), str(tmp_path / "kept")
    net, context = tiny_net(8), multiprocessing.get_context("fork")
    writers = [context.Process(target=_ask, args=(net, split, folder, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    asked = sorted(int(Path(f"{folder}-{n}").read_text()) for n in range(3))
    assert asked[:2] == [0, 0] and asked[2] > 0
    StoredTeacher(tmp_path / "kept").signal(next(split.batches(32)))
