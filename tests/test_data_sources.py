"""Every data source on small data made here, and on the real sets where they are."""

from __future__ import annotations

import io
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from attar.data import DataConfig, decoding, load_data
from attar.errors import DataError, StorageError, UsageError

RNG = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or leaves anything in the person's cache."""
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))


def load(source: str, **settings):
    return load_data(DataConfig.model_validate({"source": source, **settings}))


def pixels(count: int, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    return RNG.randint(0, 256, (count, height, width, channels), np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, kind)
    return file.getvalue()


def every_input(split) -> torch.Tensor:
    return torch.cat([b.inputs for b in split.batches(16)])


# --- folders


@pytest.fixture
def photos(tmp_path) -> Path:
    """train: 12 images in each of two classes; test: 4 in each."""
    root = tmp_path / "photos"
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i, image in enumerate(pixels(count)):
                (root / split / name / f"{i:02}.png").write_bytes(encoded(image))
    return root


def test_class_folders_under_train_and_test_are_read(photos):
    (photos / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load("folder", path=str(photos))
    assert data.classes == ("cat", "dog") and data.shape == (3, 6, 5)
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 8)
    first = np.asarray(Image.open(photos / "test" / "cat" / "00.png")).transpose(2, 0, 1)
    assert np.array_equal(data.test.images[0].numpy(), first)
    assert data.test.targets.tolist() == [0] * 4 + [1] * 4


def test_a_folder_without_splits_is_divided(photos):
    data = load("folder", path=str(photos / "train"))
    assert (len(data.train), len(data.validation), len(data.test)) == (17, 2, 5)
    assert data.name == "train"


def test_paths_may_hold_variables(photos, monkeypatch):
    monkeypatch.setenv("PHOTOS", str(photos.parent))
    assert len(load("folder", path="${PHOTOS}/photos").test) == 8
    monkeypatch.delenv("PHOTOS")
    with pytest.raises(UsageError, match="PHOTOS is not set"):
        load("folder", path="$PHOTOS/photos")


def test_images_are_decoded_once(photos, monkeypatch):
    before = load("folder", path=str(photos))
    monkeypatch.setattr(decoding, "_decode", None)  # decoding again would fail
    again = load("folder", path=str(photos))
    assert again.fingerprint == before.fingerprint


@pytest.mark.parametrize("change", ["content", "added", "size", "color"])
def test_images_are_decoded_anew_when_they_or_the_settings_change(photos, change):
    before = load("folder", path=str(photos))
    path, settings = photos / "test" / "cat" / "00.png", {}
    if change == "content":
        path.write_bytes(encoded(pixels(1)[0]))
        os.utime(path, (1, 1))
    elif change == "added":
        path.with_name("99.png").write_bytes(encoded(pixels(1)[0]))
    elif change == "size":
        settings = {"size": 4}
    else:
        settings = {"color": "gray"}
    after = load("folder", path=str(photos), **settings)
    assert after.test.fingerprint != before.test.fingerprint
    assert after.shape == {"size": (3, 4, 4), "color": (1, 6, 5)}.get(change, (3, 6, 5))


def test_a_cache_that_was_not_finished_is_not_taken(photos, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    whole = decoding._decode
    monkeypatch.setattr(decoding, "_decode", dies)
    with pytest.raises(KeyboardInterrupt):
        load("folder", path=str(photos))
    monkeypatch.setattr(decoding, "_decode", whole)
    assert len(load("folder", path=str(photos)).test) == 8
    leftover = [p for p in (photos.parent / "cache" / "images").iterdir() if len(p.name) != 32]
    assert not leftover


def test_a_full_disk_is_said_with_what_helps(photos, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding, "_reserve", full)
    with pytest.raises(StorageError, match=r"No space left on device.*ATTAR_CACHE"):
        load("folder", path=str(photos))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def wide(path: Path) -> None:
    Image.new("I;16", (5, 6)).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "can't read the image"),
        (lambda path: path.write_text("hello"), "can't read the image"),
        (lambda path: path.write_bytes(b""), "can't read the image"),
        (lambda path: path.write_bytes(encoded(pixels(1, 9)[0])), "is 5×9 where 5×6 was expected"),
        (wide, "more than 8 bits"),
    ],
)
def test_an_image_that_can_not_be_used_is_named(photos, damage, message):
    path = photos / "train" / "dog" / "03.png"
    damage(path)
    with pytest.raises(DataError, match=message) as failure:
        load("folder", path=str(photos))
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_color_among_gray_images_needs_a_choice(photos):
    for path in sorted((photos / "train").rglob("*.png"))[:-1]:
        path.write_bytes(encoded(pixels(1, channels=1)[0]))
    with pytest.raises(DataError, match=r"11\.png is in color where the first one is gray"):
        load("folder", path=str(photos))
    assert load("folder", path=str(photos), color="gray").shape == (1, 6, 5)
    assert load("folder", path=str(photos), color="rgb").shape == (3, 6, 5)


def test_an_empty_class_is_named(photos):
    (photos / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="the class 'bird' is empty"):
        load("folder", path=str(photos))


def test_a_class_that_only_the_test_has_is_named(photos):
    (photos / "test" / "dog").rename(photos / "test" / "wolf")
    with pytest.raises(DataError, match="class 'wolf' that the training images lack"):
        load("folder", path=str(photos))


def test_a_folder_that_holds_no_classes_is_refused(photos, tmp_path):
    with pytest.raises(DataError, match="at least two were expected"):
        load("folder", path=str(photos / "train" / "cat"))
    with pytest.raises(DataError, match="no data at"):
        load("folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="needs `path`"):
        load("folder")


def test_an_int_size_crops_the_centre_square_and_a_pair_stretches(tmp_path):
    """A white band at the far left falls to the crop and survives the stretch."""
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :2] = 255
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(encoded(image))
    cropped = load("folder", path=str(tmp_path / "set"), size=8)
    stretched = load("folder", path=str(tmp_path / "set"), size=[8, 8])
    assert cropped.train.images.max() == 0 and stretched.train.images.max() > 200
    assert cropped.preparation["resize"]["fit"] == "crop"
    assert stretched.preparation["resize"]["fit"] == "stretch"


# --- npz


def medmnist(**changes) -> dict[str, np.ndarray]:
    arrays = {}
    for split, count in (("train", 40), ("val", 10), ("test", 12)):
        arrays[f"{split}_images"] = pixels(count, 6, 6, 1).squeeze(-1)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
    return {**arrays, **changes}


def keras(scale: float = 1.0) -> dict[str, np.ndarray]:
    return {
        "x_train": pixels(40) * scale if scale != 1 else pixels(40),
        "y_train": np.arange(40) % 4,
        "x_test": pixels(8) * scale if scale != 1 else pixels(8),
        "y_test": np.arange(8) % 4,
    }


def load_npz(path: Path, arrays: dict[str, np.ndarray], **settings):
    np.savez(path, **arrays)
    return load("npz", path=str(path), **settings)


def test_medmnist_archives_are_read_with_their_own_splits(tmp_path):
    arrays = medmnist()
    data = load_npz(tmp_path / "x.npz", arrays, classes=["normal", "ill"])
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 10, 12)
    assert data.classes == ("normal", "ill") and data.shape == (1, 6, 6)
    assert np.array_equal(data.validation.images[:, 0].numpy(), arrays["val_images"])


def test_keras_archives_are_read_channels_last(tmp_path):
    arrays = keras()
    data = load_npz(tmp_path / "x.npz", arrays)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 8)
    assert np.array_equal(data.test.images.numpy(), arrays["x_test"].transpose(0, 3, 1, 2))


def test_pixels_divided_by_255_are_the_same_pixels(tmp_path):
    arrays = keras()
    floats = {k: v / np.float32(255) if k[0] == "x" else v for k, v in arrays.items()}
    whole = load_npz(tmp_path / "a.npz", arrays)
    assert load_npz(tmp_path / "b.npz", floats).fingerprint == whole.fingerprint


def test_pixels_finer_than_8_bits_stay_floats(tmp_path):
    data = load_npz(tmp_path / "x.npz", keras(scale=0.37 / 255))
    assert data.train.images.dtype == torch.float32
    assert abs(every_input(data.train).std() - 1) < 1e-2
    assert data.preparation["scale"] == 1 / 255
    with pytest.raises(DataError, match="float pixels"):
        load_npz(tmp_path / "x.npz", keras(scale=0.37 / 255), size=4)


def test_one_hot_and_named_labels_are_classes(tmp_path):
    arrays = keras()
    hot = {k: np.eye(4)[v] if k[0] == "y" else v for k, v in arrays.items()}
    assert load_npz(tmp_path / "x.npz", hot).test.targets.tolist() == [0, 1, 2, 3] * 2
    named = {k: np.array(["d", "a", "c", "b"])[v] if k[0] == "y" else v for k, v in arrays.items()}
    data = load_npz(tmp_path / "x.npz", named)
    assert data.classes == ("a", "b", "c", "d")
    assert data.test.targets.tolist() == [3, 0, 2, 1] * 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros(3)}, "has the arrays images; expected are train_images"),
        (medmnist(train_labels=np.arange(40) % 2 * 2), "the class '1' is empty"),
        (medmnist(test_labels=np.full(12, -3)), "so it is not used"),
        (medmnist(test_labels=np.r_[np.zeros(11), [-3]]), "has the label -3"),
        (medmnist(test_labels=np.full((12, 1), 5)), "the class '2' is empty"),
        (medmnist(train_labels=np.ones((39, 1), int)), "has 40 train_images and 39 train_labels"),
        (medmnist(train_images=pixels(40, 6, 6, 3)), "give the data a `size` and a `color`"),
        (medmnist(train_images=RNG.randn(40, 6, 6)), "pixels of 0 to 255 or 0 to 1"),
        (medmnist(train_images=np.full((40, 6, 6), np.nan)), "pixels of 0 to 255 or 0 to 1"),
        (medmnist(train_images=np.zeros((40, 6))), "1 or 3 channels"),
        (
            medmnist(
                train_labels=np.ones((40, 3)),
                val_labels=np.ones((10, 3)),
                test_labels=np.ones((12, 3)),
            ),
            "3 labels an example",
        ),
        (medmnist(train_labels=np.arange(40) % 2 + 0.5), "not whole numbers"),
    ],
)
def test_archives_that_do_not_fit_are_refused_or_noted(tmp_path, arrays, message):
    try:
        data = load_npz(tmp_path / "x.npz", arrays)
    except DataError as error:
        assert message in str(error) and "\n" not in str(error)
    else:
        assert any(message in note for note in data.notes)


def test_pickled_objects_are_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    np.savez(tmp_path / "x.npz", x_train=np.array([Trap()], object), y_train=np.zeros(1))
    with pytest.raises(DataError, match="can't read"):
        load("npz", path=str(tmp_path / "x.npz"))
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_archives_are_refused(tmp_path):
    for content in (b"", b"PK\x03\x04 but no more", b"\x80\x04."):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(DataError, match="can't read"):
            load("npz", path=str(tmp_path / "x.npz"))
    np.save(tmp_path / "y.npy", np.zeros(3))
    with pytest.raises(DataError, match="can't read"):
        load("npz", path=str(tmp_path / "y.npy"))


# --- Hugging Face


def table(images: list, labels: list, names: list[str] | None = None, **rename: str) -> pa.Table:
    image, label = rename.get("image", "image"), rename.get("label", "label")
    features = {image: {"_type": "Image"}, label: {"_type": "Value"}}
    if names:
        features[label] = {"_type": "ClassLabel", "names": names}
    structs = [{"bytes": i, "path": None} for i in images]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({image: structs, label: labels}).replace_schema_metadata(metadata)


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    folder = tmp_path / "birds"
    folder.mkdir()
    for name, count in (("train-00000-of-00002", 14), ("train-00001-of-00002", 16), ("test-0", 6)):
        images = [encoded(i) for i in pixels(count)]
        pq.write_table(
            table(images, [i % 3 for i in range(count)], ["owl", "jay", "tit"]),
            folder / f"{name}.parquet",
            row_group_size=5,
        )
    return folder


def test_parquet_shards_are_read_with_the_names_in_their_schema(hub_folder):
    data = load("huggingface", path=str(hub_folder))
    assert data.classes == ("owl", "jay", "tit")
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 6)
    last = pq.read_table(hub_folder / "train-00001-of-00002.parquet")["image"][15]["bytes"].as_py()
    expected = np.asarray(Image.open(io.BytesIO(last))).transpose(2, 0, 1)
    assert np.array_equal(data.train.images[29].numpy(), expected)


def test_parquet_images_are_decoded_once(hub_folder, monkeypatch):
    before = load("huggingface", path=str(hub_folder))
    monkeypatch.setattr(decoding, "_decode", None)
    assert load("huggingface", path=str(hub_folder)).fingerprint == before.fingerprint


def test_plain_columns_and_string_labels_work_when_named(tmp_path):
    images = [encoded(i) for i in pixels(40)]
    plain = pa.table({"photo": images, "kind": ["b", "a"] * 20, "kind2": ["x"] * 40})
    pq.write_table(plain, tmp_path / "one.parquet")
    with pytest.raises(UsageError, match=r"photo, kind, kind2.*columns: \{image: …\}"):
        load("huggingface", path=str(tmp_path / "one.parquet"))
    columns = {"image": "photo", "label": "kind"}
    data = load("huggingface", path=str(tmp_path / "one.parquet"), columns=columns)
    assert data.classes == ("a", "b") and len(data.train) == 29
    with pytest.raises(DataError, match="no column 'knd'; did you mean 'kind'"):
        load("huggingface", path=str(tmp_path / "one.parquet"), columns={**columns, "label": "knd"})


def test_a_bad_image_in_a_table_is_named_by_its_row(hub_folder):
    images = [encoded(i) for i in pixels(6)]
    images[4] = images[4][:50]
    pq.write_table(table(images, [0, 1, 2] * 2, ["a", "b", "c"]), hub_folder / "test-0.parquet")
    with pytest.raises(DataError, match=r"the image in row 4 of test-0\.parquet"):
        load("huggingface", path=str(hub_folder))


def test_an_unlabelled_test_split_is_left_out_aloud(hub_folder):
    images = [encoded(i) for i in pixels(6)]
    pq.write_table(table(images, [-1] * 6, ["a", "b", "c"]), hub_folder / "test-0.parquet")
    data = load("huggingface", path=str(hub_folder))
    assert data.notes[0] == "The test split has no labels, so it is not used."
    assert len(data.test) == 6  # a fifth of train's 30


def test_tables_that_can_not_be_used_are_refused(hub_folder, tmp_path):
    (hub_folder / "extra.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match="belongs to no split"):
        load("huggingface", path=str(hub_folder))
    with pytest.raises(DataError, match="as Parquet"):
        load("huggingface", path=str(hub_folder / "extra.parquet"))
    with pytest.raises(DataError, match=r"no \.parquet files"):
        (tmp_path / "empty").mkdir()
        load("huggingface", path=str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"either `path`.*or `name`"):
        load("huggingface")


def test_a_hub_name_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install attar\[datasets\]"):
        load("huggingface", name="someone/birds")


def test_a_hub_name_is_loaded_by_datasets(monkeypatch):
    def load_dataset(name, **arguments):
        assert (name, arguments) == ("someone/birds", {"revision": "1"})
        images = [encoded(i) for i in pixels(30)]
        found = table(images, [0, 1] * 15, ["owl", "jay"])
        data = types.SimpleNamespace(table=found)
        return {"train": types.SimpleNamespace(data=data, _fingerprint="f")}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load("huggingface", name="someone/birds", arguments={"revision": "1"})
    assert data.classes == ("owl", "jay") and data.name == "someone/birds"


# --- torchvision


def write_mnist(root: Path) -> np.ndarray:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = pixels(count, 28, 28, 1).squeeze(-1)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (raw / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())
    return images


def test_torchvision_sets_held_in_memory_are_read_by_name(tmp_path):
    images = write_mnist(tmp_path)
    data = load("torchvision", name="MNIST", root=str(tmp_path))
    assert data.classes == tuple("0123456789") and data.shape == (1, 28, 28)
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 20)
    assert np.array_equal(data.test.images[:, 0].numpy(), images)


def test_torchvision_sets_of_image_files_are_decoded_once(tmp_path, monkeypatch):
    """EuroSAT: class folders, one split, images opened one by one."""
    for name in ("Forest", "River"):
        folder = tmp_path / "sets" / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i, image in enumerate(pixels(12)):
            (folder / f"{i:02}.png").write_bytes(encoded(image))
    before = load("torchvision", name="EuroSAT", root=str(tmp_path / "sets"))
    assert before.classes == ("Forest", "River")
    assert sum(map(len, (before.train, before.validation, before.test))) == 24
    monkeypatch.setattr(decoding, "_decode", None)
    assert (
        load("torchvision", name="EuroSAT", root=str(tmp_path / "sets")).fingerprint
        == before.fingerprint
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"name": "MNST"}, UsageError, "no data set 'MNST'; did you mean"),
        ({}, UsageError, "needs `name`"),
        ({"name": "MNIST"}, DataError, "is not in .*`download: true`"),
        ({"name": "SVHN"}, DataError, "is not in .*`download: true`"),
        ({"name": "MNIST", "arguments": {"tran": 1}}, UsageError, "refuses its arguments"),
        ({"name": "SVHN", "arguments": {"split": "x"}}, UsageError, "refuses its arguments"),
    ],
)
def test_torchvision_sets_that_can_not_be_had_say_why(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        load("torchvision", root=str(tmp_path), **settings)


# --- a person's own


def test_a_source_from_a_persons_file_runs_once_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CONFIG", str(tmp_path / "config"))
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "from attar.data import Examples, Parts, Source\n"
        "class Noise(Source):\n"
        "    takes = frozenset({'arguments'})\n"
        "    def load(self, config):\n"
        "        n = config.arguments['n']\n"
        "        images = np.random.RandomState(0).randint(0, 256, (n, 1, 4, 4), np.uint8)\n"
        "        return Parts('noise', ('a', 'b'), Examples(images, np.arange(n) % 2))\n"
        "class Nothing: pass\n"
    )
    config = DataConfig(source=f"{file}:Noise", arguments={"n": 50})
    with pytest.raises(UsageError, match="not been allowed"):
        load_data(config)
    assert len(load_data(config, trusted=True).test) == 10
    with pytest.raises(UsageError, match="is no data source"):
        load_data(DataConfig(source=f"{file}:Nothing"), trusted=True)


# --- real data


real = pytest.mark.usefixtures("attar_data")


@real
def test_real_mnist():
    data = load("torchvision", name="MNIST", root="$ATTAR_DATA")
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.preparation["mean"] == pytest.approx([0.1307], abs=3e-4)


@real
def test_real_pneumonia():
    data = load("npz", path="$ATTAR_DATA/pneumoniamnist/pneumoniamnist.npz")
    assert (len(data.train), len(data.validation), len(data.test)) == (4708, 524, 624)
    assert data.shape == (1, 28, 28) and len(data.classes) == 2


@real
@pytest.mark.long
def test_real_cifar10():
    data = load("huggingface", path="$ATTAR_DATA/cifar10", validation={"from": "test"})
    assert (len(data.train), len(data.validation), len(data.test)) == (50_000, 5_000, 5_000)
    assert np.bincount(data.test.targets).tolist() == [500] * 10
    assert data.classes[0] == "airplane"
    assert data.preparation["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
