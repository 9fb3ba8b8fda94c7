"""OpenVINO answers as PyTorch does, computes in int8 what it is told to, and needs no PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attar.errors import BundleError, ExportError, UsageError
from attar.quantize import Scheme, quantize, quantized_reference
from attar.runtimes import runtimes
from attar.runtimes.bench import bench
from attar.runtimes.bundle import read_bundle
from attar.runtimes.openvino_profile import operators
from attar.runtimes.parity import FLOAT, QUANTIZED, check_parity
from attar.student import Student
from run_fixture import TINY, logged, run_recipe, write_recipe
from runtime_fixture import (
    CLASSES,
    SHAPES,
    Encoder,
    images,
    net,
    predict_without,
    same_class,
    write_bundles,
)

RUNTIME = runtimes.get("openvino")()
if not RUNTIME.available()[0]:  # asked so, for a plain import would report itself to Intel
    pytest.skip("the extra `openvino` is not installed", allow_module_level=True)

ABSENT = {"torch", "attar", "onnx", "onnxruntime"}


class ConvNet(nn.Module):
    """Convolutions with a shortcut, a pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.conv(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def in_int8(student: Student, float_layers: tuple[str, ...] = ()) -> Student:
    scheme = Scheme(runtime="openvino", float_layers=float_layers)
    return quantize(student, scheme, [(images(256),)], example=(images(2),), dynamic_shapes=SHAPES)


def export(student: Student, folder: Path, **options: Any) -> list[Path]:
    return RUNTIME.export(
        student,
        folder,
        example=(images(2),),
        dynamic_shapes=SHAPES,
        names=(["image"], ["logits"]),
        **options,
    )


def precisions(folder: Path) -> dict[str, str]:
    """By the file's name of a node: in what OpenVINO computes it here."""
    rows = operators(folder / "model.onnx", (images(1).numpy(),))
    computing = {"Convolution", "FullyConnected"}
    return {r["node"]: r["precision"] for r in rows if r["op"] in computing}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of one network: `float`, `int8`."""
    place = tmp_path_factory.mktemp("openvino")
    student = Student(net(ConvNet))
    students = {"float": student, "int8": in_int8(student)}
    return write_bundles(place, RUNTIME, students, export)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "float", tmp_path / "bundle"))


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ConvNet, Encoder])
def test_float_and_int8_answer_as_pytorch_does(kind: type[nn.Module], tmp_path: Path) -> None:
    student, x = Student(net(kind)), images(200)
    for name, one, bound in (("float", student, FLOAT), ("int8", in_int8(student), QUANTIZED)):
        export(one, tmp_path / name)
        graph = quantized_reference(one.edits, one.module, (images(2),), SHAPES)
        with torch.no_grad():
            expected = (graph or one.module)(x).numpy()
        (found,) = RUNTIME.session(tmp_path / name)(x.numpy())
        check_parity(expected, found, same_class, bound)


def test_a_session_answers_about_any_number_of_examples(made: Path) -> None:
    session, x = RUNTIME.session(made / "float"), images(7).numpy()
    with torch.no_grad():
        expected = net(ConvNet)(images(7)).numpy()
    # Compiled for the first, for any by the second; then one of each again.
    for rows in (slice(1), slice(7), slice(2, 5), slice(6, 7)):
        (found,) = session(x[rows])
        np.testing.assert_allclose(found, expected[rows], atol=1e-5)


def test_answers_are_the_callers_own(made: Path) -> None:
    session = RUNTIME.session(made / "float")
    (first,) = session(images(1).numpy())
    kept = first.copy()
    session(images(1).numpy() + 1)
    np.testing.assert_array_equal(first, kept)


# -- what is computed in what -------------------------------------------------------------------


def test_float_networks_are_computed_in_float32(made: Path) -> None:
    """Not in bfloat16, which OpenVINO would choose where the processor has it."""
    assert set(precisions(made / "float").values()) == {"f32"}


def test_int8_layers_are_computed_in_int8(made: Path) -> None:
    found = precisions(made / "int8")
    assert len(found) == 4
    assert set(found.values()) <= {"u8", "i8"}


def test_layers_that_stay_float_are_computed_in_float(tmp_path: Path) -> None:
    """Between int8 layers and with weights in bytes, OpenVINO would take them for int8 ones."""
    export(in_int8(Student(net(ConvNet)), float_layers=("conv",)), tmp_path)
    found = precisions(tmp_path)
    assert found["conv/Conv"] == "f32"
    assert {found["stem/Conv"], found["last/Conv"]} <= {"u8", "i8"}
    weights = sum(p.numel() for p in net(ConvNet).parameters())
    assert (tmp_path / "model.onnx").stat().st_size < 2 * weights + 8000


def test_a_network_all_in_float_keeps_its_weights_in_bytes(tmp_path: Path) -> None:
    (path,) = export(in_int8(Student(net(ConvNet)), float_layers=("*",)), tmp_path)
    assert set(precisions(tmp_path).values()) == {"f32"}
    weights = sum(p.numel() for p in net(ConvNet).parameters())
    assert path.stat().st_size < 2 * weights + 8000


def test_each_layers_time_is_told_by_its_path(made: Path) -> None:
    for name in ("float", "int8"):
        times = RUNTIME.layer_times(made / name, (images(1).numpy(),), runs=5)
        assert set(times) == {"stem", "conv", "last", "head"}


# -- sessions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_many_as_asked_for(made: Path, threads: int) -> None:
    session: Any = RUNTIME.session(made / "float", threads=threads)
    assert session.compiled().get_property("INFERENCE_NUM_THREADS") == threads


def test_graph_passes_can_not_be_left_out(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't leave out its graph passes"):
        RUNTIME.session(made / "float", passes="none")
    recipe = write_recipe(tmp_path)
    with pytest.raises(UsageError, match="graph: none is nothing the runtime openvino can do"):
        run_recipe(recipe, tmp_path / "run", "deploy.runtime=openvino", "deploy.graph=none")


@pytest.mark.parametrize("content", [b"not a model", None], ids=["other", "cut"])
def test_a_damaged_file_is_refused_in_a_sentence(copy: Path, content: bytes | None) -> None:
    path = copy / "model.onnx"
    path.write_bytes(content or path.read_bytes()[:2000])
    with pytest.raises(BundleError, match="OpenVINO can't load") as caught:
        RUNTIME.session(copy)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="damaged or was changed"):
        read_bundle(copy)


def test_other_shapes_are_refused_in_a_sentence(made: Path) -> None:
    session = RUNTIME.session(made / "float")
    with pytest.raises(ValueError, match=r"shape \[2, 3, 8, 8\], not \[\?,1,8,8\]"):
        session(np.zeros((2, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="takes 1 inputs, not 2"):
        session(images(1).numpy(), images(1).numpy())


def test_the_runtimes_own_quantization_is_declined_in_a_sentence(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="NNCF"):
        RUNTIME.plain_int8(made / "float", tmp_path, [])


def test_a_session_needs_no_pytorch_and_tells_nobody(made: Path) -> None:
    """OpenVINO's package reports over the network that it was imported, if it is let."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from attar.runtimes.bundle import read_bundle\n"
        "from attar.runtimes.bench import replay\n"
        f"b = read_bundle(Path({str(made / 'int8')!r}))\n"
        "assert replay(b, b.session())['agrees']\n"
        "absent = {'torch', 'onnx', 'onnxruntime', 'openvino_telemetry'}\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & absent))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_missing_package_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(RUNTIME), "available", classmethod(lambda cls: (False, "pip install openvino"))
    )
    with pytest.raises(UsageError, match="the runtime openvino is missing: pip install openvino"):
        run_recipe(write_recipe(tmp_path), tmp_path / "run", "deploy.runtime=openvino")
    assert not (tmp_path / "run").exists()


# -- bundles ------------------------------------------------------------------------------------


def predict(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return predict_without(ABSENT, bundle, *arguments)


def test_a_bundle_says_what_it_needs(made: Path) -> None:
    manifest = read_bundle(made / "int8").manifest
    assert manifest["runtime"]["name"] == "openvino"
    assert manifest["runtime"]["config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert [f["path"] for f in manifest["files"]] == ["model.onnx"]


def test_predict_answers_without_attar_or_pytorch(made: Path, tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    prepared = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)[None, None]
    (logits,) = RUNTIME.session(made / "float")(prepared)
    odds = np.exp(logits[0] - logits[0].max())
    done = predict(made / "float", str(tmp_path / "picture.png"), "--json", "--top", "10")
    assert done.returncode == 0, done.stderr
    found = {a["class"]: a["probability"] for a in json.loads(done.stdout)["answers"]}
    expected = dict(zip(CLASSES, odds / odds.sum(), strict=True))
    assert found == pytest.approx(expected, abs=1e-4)


def test_predict_refuses_an_input_of_another_shape(made: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros((1, 3, 8, 8), np.float32))
    done = predict(made / "float", str(tmp_path / "other.npy"))
    assert done.returncode == 1
    assert "does not take" in done.stderr and "[1, 3, 8, 8]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["float", "int8"])
def test_both_benches_replay_the_stored_answers(made: Path, name: str) -> None:
    done = predict(made / name, "--bench", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["golden"]["agrees"] and report["golden"]["n"] == 8
    assert (
        report["environment"]["packages"]["openvino"]
        == read_bundle(made / name).manifest["runtime"]["version"]
    )
    found = bench(made / name, batch=2, seconds=0.1)
    assert found["golden"]["agrees"]
    assert found["latency"]["runtime"] == "openvino"


# -- a whole run --------------------------------------------------------------------------------


def test_a_whole_recipe_runs_on_it(tmp_path: Path) -> None:
    text = TINY.partition("  - share")[0] + "  - quantize: {calibration: 64}\n"
    text = text.replace("subset: 300", "subset: 298")  # leaves nothing in the store for others
    recipe, folder = write_recipe(tmp_path, text), tmp_path / "run"
    settings = ["deploy.runtime=openvino", "deploy.batch=1", "deploy.threads=1"]
    run = run_recipe(recipe, folder, *settings)
    rows = {row["stage"]: row for row in run.ledger["rows"]}
    assert list(rows) == ["teacher", "exported", "distill", "prune", "quantize", "deploy"]
    assert {r["latency"][0]["runtime"] for r in list(rows.values())[1:]} == {"openvino"}
    assert "graph" not in rows["deploy"]  # passes can't be off
    assert run.ledger["environment"]["packages"]["openvino"]
    notes = [event["text"] for event in logged(folder, "note")]
    assert any("no row plain-int8" in note and "NNCF" in note for note in notes)
    assert any("int8 takes" in note for note in notes)
    assert (folder / "report.html").is_file()
    assert predict(folder / "bundle", "--bench", "--seconds", "0.1").returncode == 0
