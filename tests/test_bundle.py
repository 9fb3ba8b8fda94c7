"""A bundle is whole or refused, and answers where there is no PyTorch."""

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from attar.errors import BundleError, StorageError
from attar.runtimes import runtimes
from attar.runtimes.bench import bench
from attar.runtimes.bundle import read_bundle, write_bundle

CLASSES = ["dark", "bright", "medium"]
DESCRIPTION = {
    "inputs": [
        {
            "name": "input",
            "layout": "NCHW",
            "dtype": "float32",
            "shape": ["batch", 1, 4, 4],
            "color": "gray",
            "resize": {"height": 4, "width": 4, "fit": "crop", "interpolation": "bilinear"},
            "scale": 1 / 255,
            "mean": [0.5],
            "std": [0.25],
        }
    ],
    "outputs": [{"name": "logits", "meaning": "logits", "classes": CLASSES}],
}
WITHOUT_TORCH = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "attar", "onnx"}:
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_model(folder: Path) -> list[Path]:
    """Logits -s, s, 0 of the sum s of the prepared pixels: answers that can be said by hand."""
    weight = np.stack([-np.ones(16), np.ones(16), np.zeros(16)]).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["logits"], transB=1),
        ],
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return [path]


def make(folder: Path, **changes):
    arguments = {
        "runtime": runtimes.get("onnxruntime")(),
        "export": write_model,
        "task": "image-classification",
        "description": DESCRIPTION,
        "golden": (np.random.default_rng(0).normal(size=(8, 1, 4, 4)).astype(np.float32),),
        "recipe_sha256": "0" * 64,
    }
    return write_bundle(folder, **(arguments | changes))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "bundle")


@pytest.fixture
def copy(tmp_path):
    return make(tmp_path / "bundle").folder


def predict(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a bundle's predict.py, isolated, on a machine without PyTorch, onnx and Attar."""
    command = [sys.executable, "-I", "-c", WITHOUT_TORCH, str(folder / "predict.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_bundle_says_what_it_is_and_reads_back(bundle):
    again = read_bundle(bundle.folder)
    manifest = again.manifest
    assert manifest == bundle.manifest
    assert {k: manifest[k] for k in ("schema", "task", "recipe_sha256")} == {
        "schema": 1,
        "task": "image-classification",
        "recipe_sha256": "0" * 64,
    }
    assert manifest["inputs"] == DESCRIPTION["inputs"]
    assert manifest["outputs"] == DESCRIPTION["outputs"]
    assert manifest["runtime"]["name"] == "onnxruntime" and manifest["runtime"]["opset"] == 20
    assert again.bytes == (bundle.folder / "model.onnx").stat().st_size
    assert sorted(p.name for p in bundle.folder.iterdir()) == [
        "golden.npz",
        "manifest.json",
        "model.onnx",
        "predict.py",
    ]
    inputs, outputs = again.golden()
    np.testing.assert_allclose(again.session()(*inputs)[0], outputs[0], rtol=1e-6)


def test_the_model_file_alone_says_what_its_input_wants(bundle):
    model = onnx.load(str(bundle.folder / "model.onnx"))
    core = json.loads({e.key: e.value for e in model.metadata_props}["attar"])
    assert core == {"schema": 1, "task": "image-classification", **DESCRIPTION}


def test_the_same_model_gives_the_same_bytes(bundle, copy):
    for name in ("model.onnx", "golden.npz", "manifest.json", "predict.py"):
        assert (copy / name).read_bytes() == (bundle.folder / name).read_bytes()


def test_a_changed_file_is_refused(copy):
    path = copy / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is damaged or was changed"):
        read_bundle(copy)


def test_a_missing_file_is_named(copy):
    (copy / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"golden\.npz is missing"):
        read_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this Attar reads up to 1"),
        ({"schema": "new"}, "no schema number"),
        ({"files": [{"path": "../m.onnx", "bytes": 1, "sha256": ""}]}, "outside the bundle"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        read_bundle(copy)


def test_a_manifest_cut_short_is_refused(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(BundleError, match="is damaged"):
        read_bundle(copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        read_bundle(tmp_path)


def test_a_file_that_is_no_model_is_refused_by_the_session(copy):
    (copy / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError, match="ONNX Runtime can't load"):
        runtimes.get("onnxruntime")().session(copy)


def test_a_full_disk_leaves_the_old_bundle_and_no_half_one(copy, monkeypatch):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(StorageError, match="the disk is full"):
        make(copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert [p.name for p in copy.parent.iterdir()] == ["bundle"]


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def export(_):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        make(tmp_path / "bundle", export=export)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_replaces_the_one_before(copy):
    make(copy, task="another")
    assert read_bundle(copy).manifest["task"] == "another"
    assert [p.name for p in copy.parent.iterdir()] == ["bundle"]


def test_a_session_needs_no_pytorch(bundle):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from attar.runtimes.bundle import read_bundle\n"
        "from attar.runtimes.bench import replay\n"
        f"b = read_bundle(Path({str(bundle.folder)!r}))\n"
        "s = b.session()\n"
        "assert replay(b, s)['agrees']\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'torchvision'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_predict_answers_about_a_picture_without_pytorch(bundle, tmp_path):
    picture = tmp_path / "white.png"
    Image.new("RGB", (9, 6), "white").save(picture)  # color and another size: prepared as needed
    done = predict(bundle.folder, str(picture), "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    # 16 pixels of (1 - 0.5) / 0.25 = 2 sum to 32
    assert [a["class"] for a in answers] == ["bright", "medium", "dark"]
    assert answers[0]["probability"] == pytest.approx(1.0)
    shown = predict(bundle.folder, str(picture), "--top", "1")
    assert shown.stdout.split() == ["bright", "100.00%"]


def test_predict_prepares_pixels_as_the_manifest_says(bundle, tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) + 120
    Image.fromarray(pixels).save(tmp_path / "gradient.png")
    total = ((pixels / 255 - 0.5) / 0.25).sum()
    odds = np.exp([-total, total, 0])
    done = predict(bundle.folder, str(tmp_path / "gradient.png"), "--json")
    found = {a["class"]: a["probability"] for a in json.loads(done.stdout)["answers"]}
    expected = dict(zip(CLASSES, odds / odds.sum(), strict=True))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.png"], 1, "can't read the image nowhere.png: no such file"),
        (["{folder}/manifest.json"], 1, "can't read the image"),
        ([], 2, "give inputs to answer, or --bench"),
        (["--bench", "--threads", "0"], 2, "must be positive"),
    ],
)
def test_predict_says_what_is_wrong_in_a_sentence(bundle, arguments, code, message):
    done = predict(bundle.folder, *(a.format(folder=bundle.folder) for a in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_predict_refuses_a_changed_model(copy):
    (copy / "model.onnx").write_bytes(b"another")
    done = predict(copy, "--bench")
    assert done.returncode == 1
    assert "is damaged or was changed" in done.stderr


def test_predict_bench_replays_the_stored_answers(bundle):
    done = predict(bundle.folder, "--bench", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["golden"]["agrees"] and report["golden"]["n"] == 8
    assert report["bytes"] == bundle.bytes
    assert 0 < report["latency"]["p50_ms"] <= report["latency"]["p90_ms"]


def test_both_benches_write_the_same_form(bundle, tmp_path):
    done = predict(bundle.folder, "--bench", "--seconds", "0.1", "--out", str(tmp_path / "b.json"))
    alone, ours = json.loads(done.stdout), bench(bundle.folder, seconds=0.1)
    assert json.loads((tmp_path / "b.json").read_text()) == alone
    assert alone.keys() == ours.keys()
    assert alone["model_sha256"] == ours["model_sha256"] == bundle.manifest["files"][0]["sha256"]
    for part in ("golden", "latency"):
        assert alone[part].keys() == ours[part].keys()
    assert alone["environment"].keys() <= ours["environment"].keys()
    assert isinstance(alone["memory_mb"], float)


def test_predict_bench_fails_where_answers_differ(copy):
    with np.load(copy / "golden.npz") as arrays:
        changed = dict(arrays)
    changed["output_00"] = changed["output_00"] + 1
    np.savez_compressed(copy / "golden.npz", **changed)
    digest = hashlib.sha256((copy / "golden.npz").read_bytes()).hexdigest()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["golden"]["sha256"] = digest
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = predict(copy, "--bench", "--seconds", "0.1")
    assert (done.returncode, json.loads(done.stdout)["golden"]["agrees"]) == (1, False)


def test_bench_measures_a_bundle(bundle):
    report = bench(bundle.folder, batch=3, seconds=0.1)
    assert report["golden"] == {"agrees": True, "max_abs_diff": 0.0, "n": 8}
    assert report["latency"]["batch"] == 3
    assert 0 < report["latency"]["p50_ms"] <= report["latency"]["p90_ms"]
    assert report["bytes"] == bundle.bytes
    assert report["memory_mb"] >= 0
    assert report["environment"]["cpu"]
