"""What was computed once is kept whole, whoever asks, and whatever ends a process."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import StorageError
from attar.store import Store, cache_folder, full_disk_as_error, key_of, sole_writer, view
from attar.store import write_whole as write

KEY = "0123"
BUSY = r"another run is writing .*run: wait for it, or choose another --out"


class Interrupted(Exception):
    """What stands for Ctrl-C."""


def write_text(text: str):
    """A `make` that writes one file."""

    def make(folder: Path, work: Path) -> None:
        (folder / "text").write_text(text)

    return make


def must_not_run(folder: Path, work: Path) -> None:
    raise AssertionError("computed twice")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def files(root: Path) -> list[str]:
    """What a store holds, its locks apart."""
    found = (p for p in root.rglob("*") if p.is_file())
    return sorted(p.relative_to(root).as_posix() for p in found if p.parent.name != "locks")


def python(program: str, *arguments: object) -> subprocess.Popen:
    """A process that runs `program`, its output read as text."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- entries


def test_an_entry_is_computed_once(store):
    assert store.get(KEY) is None
    folder, was_there = store.compute(KEY, write_text("first"))
    assert not was_there and store.get(KEY) == folder
    again, was_there = store.compute(KEY, must_not_run)
    assert was_there and again == folder
    assert (folder / "text").read_text() == "first"
    other, was_there = Store(store.root).compute("another", write_text("second"))
    assert not was_there and (other / "text").read_text() == "second"


def test_work_survives_an_interruption_and_ends_with_the_entry(store):
    def begin(folder, work):
        (folder / "half").touch()
        (work / "checkpoint").write_text("epoch 3")
        raise Interrupted

    with pytest.raises(Interrupted):
        store.compute(KEY, begin)
    assert store.get(KEY) is None
    assert files(store.root) == [f"work/{KEY}/checkpoint"]

    def go_on(folder, work):
        (folder / "text").write_text((work / "checkpoint").read_text())

    folder, was_there = store.compute(KEY, go_on)
    assert not was_there and (folder / "text").read_text() == "epoch 3"
    assert files(store.root) == [f"entries/{KEY}/text"]


COMPUTE = """
import os, signal, sys, time
from pathlib import Path
from attar.store import Store
root, trace, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def make(folder, work):
    with trace.open("a") as file:
        file.write("made\\n")
    (folder / "half").touch()
    (work / "checkpoint").touch()
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while not (root / "both-ask").exists():
        time.sleep(0.01)
    (folder / "text").write_text("whole")
print("asks", flush=True)
folder, was_there = Store(root).compute("0123", make)
print(was_there, (folder / "text").read_text())
"""


def test_two_processes_compute_an_entry_once(store, tmp_path):
    trace = tmp_path / "trace"
    both = [python(COMPUTE, store.root, trace, "make") for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "asks\n", process.stderr.read()
    time.sleep(0.2)  # the one that came second is at the lock
    (store.root / "both-ask").touch()
    answers = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(answers) == ["False whole\n", "True whole\n"]
    assert trace.read_text() == "made\n"


def test_a_process_killed_while_making_leaves_no_entry_and_its_work(store, tmp_path):
    trace = tmp_path / "trace"
    killed = python(COMPUTE, store.root, trace, "die")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL and trace.exists()
    assert store.get(KEY) is None
    assert (store.work(KEY) / "checkpoint").exists()
    _, was_there = store.compute(KEY, write_text("whole"))
    assert not was_there
    assert files(store.root) == [f"entries/{KEY}/text"]


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")


@full
def test_a_full_disk_is_said_and_leaves_no_entry(store):
    def make(folder, work):
        (work / "checkpoint").touch()
        (folder / "large").touch()
        Path("/dev/full").write_text("no room for this")

    with pytest.raises(StorageError, match=r"no room left to write .*free some space"):
        store.compute(KEY, make)
    assert store.get(KEY) is None
    assert files(store.root) == [f"work/{KEY}/checkpoint"]
    store.compute(KEY, write_text("now there is room"))


def test_other_failures_of_the_disk_stay_what_they_are():
    with pytest.raises(PermissionError), full_disk_as_error(Path("x")):
        raise PermissionError(errno.EACCES, "not yours")


def test_the_environment_moves_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    folder, _ = Store().compute(KEY, write_text("x"))
    assert tmp_path in folder.parents


# --- keys

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
inputs = st.dictionaries(st.text(), values, max_size=4)


@settings(max_examples=30)
@given(inputs, st.randoms())
def test_the_order_of_inputs_does_not_matter(given, random):
    shuffled = list(given.items())
    random.shuffle(shuffled)
    inner = {"deep": dict(shuffled)}
    assert key_of(**dict(shuffled)) == key_of(**given)
    assert key_of(**inner) == key_of(deep=given)


@settings(max_examples=30)
@given(inputs, inputs)
def test_different_inputs_have_different_keys(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (key_of(**one) == key_of(**other)) == same


def test_keys_are_the_same_on_any_machine():
    assert key_of(student="x", ratio=0.5) == "c657413fbaa596ca01b140999ac674cb"


@pytest.mark.parametrize("value", [{"a", "b"}, object(), Path("x")], ids=["set", "object", "path"])
def test_what_has_no_stable_text_is_refused(value):
    with pytest.raises(TypeError):
        key_of(value=value)


# --- a run's folder

HOLD = """
import sys
from pathlib import Path
from attar.store import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_run_folder_has_one_writer_and_is_free_when_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(StorageError, match=BUSY), sole_writer(folder):
            pass
        holder.kill()
        holder.wait(timeout=60)
        with sole_writer(folder):
            pass


def test_a_run_folder_has_one_writer_within_a_process(tmp_path):
    folder = tmp_path / "run"
    with sole_writer(folder):
        with pytest.raises(StorageError, match=BUSY), sole_writer(folder):
            pass
        with sole_writer(tmp_path / "other"):
            pass
    with pytest.raises(Interrupted), sole_writer(folder):
        raise Interrupted
    with sole_writer(folder):
        pass


# --- files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "ledger.json"
    write(path, "old")
    write(path, "neü")
    assert path.read_text(encoding="utf-8") == "neü"
    assert list(tmp_path.iterdir()) == [path]


@full
def test_a_full_disk_leaves_the_old_text(tmp_path):
    path = tmp_path / "ledger.json"
    write(path, "old")
    (tmp_path / "ledger.json.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"no room left to write .*ledger\.json"):
        write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    write(path, "old")

    def interrupted(*arguments):
        raise Interrupted

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(Interrupted):
        write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_view_is_a_copy_that_replaces_what_was_there(store, tmp_path):
    folder, _ = store.compute(KEY, write_text("stored"))
    place = tmp_path / "stages" / "01-prune"
    place.mkdir(parents=True)
    (place / "stale").touch()
    view(folder, place)
    assert files(place) == ["text"]
    (place / "text").write_text("edited by hand")
    assert (folder / "text").read_text() == "stored"
