"""ExecuTorch answers as PyTorch does, about any number of examples, and computes in int8 what
XNNPACK has kernels for."""

from __future__ import annotations

import json
import logging
import os
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
from torch.nn import functional as F

from attar.errors import BundleError, ExportError, UsageError
from attar.models import base
from attar.quantize import Scheme, quantize, quantized_reference
from attar.runtimes import executorch_export, executorch_library, runtimes
from attar.runtimes.bench import bench
from attar.runtimes.bundle import read_bundle
from attar.runtimes.executorch_threads import pool_threads
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

RUNTIME = runtimes.get("executorch")()
pytest.importorskip("executorch", reason="the extra `executorch` is not installed")

ABSENT = {"attar", "onnx", "onnxruntime"}


class ConvNet(nn.Module):
    """Convolutions with two shortcuts, one of them strided and padded, a pooling and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.conv(x)))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(torch.relu(self.last(x) + shortcut).mean((2, 3)))


def in_int8(student: Student, float_layers: tuple[str, ...] = ()) -> Student:
    scheme = Scheme(runtime="executorch", float_layers=float_layers)
    return quantize(student, scheme, [(images(256),)], example=(images(2),), dynamic_shapes=SHAPES)


def export(student: Student, folder: Path, **changes: Any) -> list[Path]:
    options: dict[str, Any] = {"example": (images(2),), "dynamic_shapes": SHAPES, **changes}
    return RUNTIME.export(student, folder, names=(["image"], ["logits"]), **options)


def expected(student: Student, x: torch.Tensor) -> np.ndarray:
    graph = quantized_reference(student.edits, student.module, (images(2),), SHAPES)
    with torch.no_grad():
        return (graph or student.module)(x).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of one network: `float`, `int8`."""
    place = tmp_path_factory.mktemp("executorch")
    student = Student(net(ConvNet))
    students = {"float": student, "int8": in_int8(student)}
    return write_bundles(place, RUNTIME, students, export)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "float", tmp_path / "bundle"))


def operators(folder: Path) -> list[str]:
    """What of the file ExecuTorch runs in XNNPACK, by XNNPACK's names, and itself."""
    library = executorch_library.import_executorch()
    program = library._load_program(str(folder / "model.pte"), enable_etdump=True)
    program.load_method("forward").call([images(1)])
    program.write_etdump_result_to_file(str(folder / "trace"), str(folder / "values"))
    content = (folder / "trace").read_bytes()
    kinds = ("Convolution", "Fully Connected", "Add", "Mean", "native_call")
    texts = [part.decode("latin-1") for part in content.split(b"\0")]
    return sorted(text for text in texts if text.startswith(kinds))


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ConvNet, Encoder])
def test_float_and_int8_answer_as_pytorch_does(kind: type[nn.Module], tmp_path: Path) -> None:
    student, x = Student(net(kind)), images(200)
    for name, one, bound in (("float", student, FLOAT), ("int8", in_int8(student), QUANTIZED)):
        export(one, tmp_path / name)
        (found,) = RUNTIME.session(tmp_path / name)(x.numpy())
        check_parity(expected(one, x), found, same_class, bound)


def test_a_session_answers_about_any_number_of_examples(made: Path) -> None:
    """Also about more than there is room for, in parts."""
    session: Any = RUNTIME.session(made / "float")
    assert session.largest_batch == executorch_export.LARGEST_BATCH
    x, answers = images(40).numpy(), expected(Student(net(ConvNet)), images(40))
    for rows in (slice(1), slice(16), slice(17), slice(40), slice(6, 7)):
        (found,) = session(x[rows])
        np.testing.assert_allclose(found, answers[rows], atol=1e-5)


def test_answers_are_the_callers_own_and_inputs_are_left_alone(made: Path) -> None:
    session, x = RUNTIME.session(made / "float"), images(20).numpy()
    x.flags.writeable = False
    (first,) = session(x)
    kept = first.copy()
    session(x[::2] + 1)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(session(np.asfortranarray(x))[0], kept)


# -- what is computed in what -------------------------------------------------------------------


def test_all_that_has_an_int8_kernel_is_computed_in_int8(made: Path, tmp_path: Path) -> None:
    found = operators(Path(shutil.copytree(made / "int8", tmp_path / "int8")))
    layers = [x for x in found if x.startswith(("Convolution", "Fully Connected"))]
    assert len(layers) == 4 and all("Q" in x for x in layers)
    # The strided slices and the padding, which XNNPACK has no kernels for, are moves of integers.
    own = {x.partition(".")[0] for x in found if x.startswith("native_call")}
    assert own == {"native_call_slice_copy", "native_call_constant_pad_nd"}
    assert sum(x.startswith(("Add", "Mean")) for x in found) == 3


def test_layers_that_stay_float_are_computed_in_float(tmp_path: Path) -> None:
    student = in_int8(Student(net(ConvNet)), float_layers=("conv",))
    export(student, tmp_path)
    found = [x for x in operators(tmp_path) if x.startswith("Convolution")]
    assert sum("F32" in x for x in found) == 1 and sum("QC8" in x for x in found) == 2
    (answers,) = RUNTIME.session(tmp_path)(images(64).numpy())
    check_parity(expected(student, images(64)), answers, same_class, QUANTIZED)


def test_a_network_all_in_float_answers_as_the_reference_does(tmp_path: Path) -> None:
    student = in_int8(Student(net(ConvNet)), float_layers=("*",))
    export(student, tmp_path)
    (answers,) = RUNTIME.session(tmp_path)(images(8).numpy())
    np.testing.assert_allclose(answers, expected(student, images(8)), atol=1e-5)


def test_int8_is_smaller(tmp_path: Path) -> None:
    """The float weights that the integers were made of are not in the file."""
    torch.manual_seed(0)
    big = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.Flatten())
    sizes = [
        export(one, tmp_path / name)[0].stat().st_size
        for name, one in (("float", Student(big)), ("int8", in_int8(Student(big))))
    ]
    assert sizes[1] < 0.4 * sizes[0]


# -- exporting ----------------------------------------------------------------------------------


def test_an_operation_without_a_kernel_is_named_with_its_line(tmp_path: Path) -> None:
    class Spectral(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    with pytest.raises(ExportError, match=r"executorch.py line \d+ \(return torch") as e:
        export(Student(Spectral()), tmp_path)
    assert "no kernel in ExecuTorch" in str(e.value) and "\n" not in str(e.value)


def test_other_dimensions_that_vary_need_a_largest_size(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp().mean(1)

    example, batch = (torch.randn(3, 4, 5),), torch.export.Dim("batch", min=1)
    shapes = ({0: batch, 1: torch.export.Dim("length")},)
    with pytest.raises(ExportError, match=r"give dimension 1 \(length\) a max"):
        export(Student(Mean()), tmp_path, example=example, dynamic_shapes=shapes)
    shapes = ({0: batch, 1: torch.export.Dim("length", min=2, max=6)},)
    export(Student(Mean()), tmp_path, example=example, dynamic_shapes=shapes)
    session, x = RUNTIME.session(tmp_path), torch.randn(20, 6, 5)
    np.testing.assert_allclose(session(x.numpy())[0], x.exp().mean(1).numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"shape \[20, 7, 5\], not \[\?,\?,5\]"):
        session(torch.randn(20, 7, 5).numpy())


def test_exporting_leaves_no_handler_in_the_root_of_logging() -> None:
    """ExecuTorch's partitioner adds one when it is imported."""
    before = logging.root.handlers[:]
    with executorch_export.own_handlers():
        logging.root.addHandler(logging.StreamHandler())
    assert logging.root.handlers == before


# -- sessions -----------------------------------------------------------------------------------


def test_each_session_has_its_own_number_of_threads(made: Path) -> None:
    """The pool is the process's: where the number changes, loaded models would hold the old one."""
    one, two = (RUNTIME.session(made / "int8", threads=n) for n in (1, 2))
    x = images(20).numpy()
    first = one(x)
    for _ in range(5):
        for session, threads in ((one, 1), (two, 2)):
            np.testing.assert_array_equal(session(x)[0], first[0])
            assert pool_threads() == threads


def test_graph_passes_can_not_be_left_out(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't leave out its graph passes"):
        RUNTIME.session(made / "float", passes="none")
    recipe = write_recipe(tmp_path)
    with pytest.raises(UsageError, match="graph: none is nothing the runtime executorch can do"):
        run_recipe(recipe, tmp_path / "run", "deploy.runtime=executorch", "deploy.graph=none")


@pytest.mark.parametrize("left", [0.0, 0.0005, 0.05, 0.5, 0.99])
def test_a_cut_file_is_refused_in_a_sentence(
    copy: Path, left: float, capfd: pytest.CaptureFixture[str]
) -> None:
    path = copy / "model.pte"
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(BundleError, match="ExecuTorch can't load") as caught:
        RUNTIME.session(copy)
    assert "\n" not in str(caught.value)
    assert not capfd.readouterr().err
    with pytest.raises(BundleError, match="damaged or was changed"):
        read_bundle(copy)


def test_other_files_are_refused_in_a_sentence(copy: Path) -> None:
    (copy / "model.pte").write_bytes(b"not a model")
    with pytest.raises(BundleError, match="ExecuTorch can't load"):
        RUNTIME.session(copy)
    (copy / "model.pte").unlink()
    with pytest.raises(BundleError, match="is missing"):
        RUNTIME.session(copy)


def test_other_inputs_are_refused_in_a_sentence(made: Path) -> None:
    session = RUNTIME.session(made / "float")
    with pytest.raises(ValueError, match=r"shape \[2, 1, 7, 8\], not \[\?,1,8,8\]"):
        session(np.zeros((2, 1, 7, 8), np.float32))
    with pytest.raises(ValueError, match=r"shape \[0, 1, 8, 8\]"):
        session(np.zeros((0, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match="of float64, not float32"):
        session(np.zeros((2, 1, 8, 8)))
    with pytest.raises(ValueError, match="takes 1 inputs, not 2"):
        session(images(1).numpy(), images(1).numpy())


def test_the_runtimes_own_quantization_is_declined_in_a_sentence(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="before it is exported"):
        RUNTIME.plain_int8(made / "float", tmp_path, [])


def test_a_session_imports_no_exporter_and_is_silent(made: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from attar.runtimes.bundle import read_bundle\n"
        "from attar.runtimes.bench import replay\n"
        f"b = read_bundle(Path({str(made / 'int8')!r}))\n"
        "assert replay(b, b.session())['agrees']\n"
        "print([m for m in sys.modules if m.startswith(('executorch.exir', 'onnx'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)


def test_silence_ends_with_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), executorch_library.silenced():
        os.write(2, b"dropped")
        raise RuntimeError
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


# -- a missing package --------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("No module named 'executorch'")

    monkeypatch.setattr(executorch_library, "import_executorch", absent)
    ready, how = RUNTIME.available()
    assert not ready and "pip install 'attar[executorch]'" in how


def test_a_missing_package_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(RUNTIME), "available", classmethod(lambda cls: (False, "pip install executorch"))
    )
    with pytest.raises(UsageError, match="executorch is missing: pip install executorch"):
        run_recipe(write_recipe(tmp_path), tmp_path / "run", "deploy.runtime=executorch")
    assert not (tmp_path / "run").exists()


# -- bundles ------------------------------------------------------------------------------------


def predict(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return predict_without(ABSENT, bundle, *arguments)


def test_a_bundle_says_what_it_needs(made: Path) -> None:
    manifest = read_bundle(made / "int8").manifest
    assert manifest["runtime"] == {
        "name": "executorch",
        "version": RUNTIME.available()[1],
        "backend": "xnnpack",
        "largest_batch": executorch_export.LARGEST_BATCH,
    }
    assert [f["path"] for f in manifest["files"]] == ["model.pte"]


def test_predict_answers_without_attar(made: Path, tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    prepared = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)[None, None]
    (logits,) = RUNTIME.session(made / "float")(prepared)
    odds = np.exp(logits[0] - logits[0].max())
    done = predict(made / "float", str(tmp_path / "picture.png"), "--json", "--top", "10")
    assert (done.returncode, done.stderr) == (0, "")
    found = {a["class"]: a["probability"] for a in json.loads(done.stdout)["answers"]}
    assert found == pytest.approx(dict(zip(CLASSES, odds / odds.sum(), strict=True)), abs=1e-4)


def test_predict_refuses_an_input_of_another_shape(made: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.zeros((1, 1, 7, 8), np.float32))
    done = predict(made / "float", str(tmp_path / "other.npy"))
    assert done.returncode == 1
    assert "does not take" in done.stderr and "[1, 1, 7, 8]" in done.stderr
    assert "Traceback" not in done.stderr


def test_both_benches_replay_the_stored_answers(made: Path) -> None:
    done = predict(made / "int8", "--bench", "--seconds", "0.1", "--batch", "40")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["golden"]["agrees"] and report["golden"]["n"] == 8
    assert report["environment"]["packages"]["executorch"] == RUNTIME.available()[1]
    found = bench(made / "int8", batch=2, seconds=0.1)
    assert found["golden"]["agrees"]
    assert found["latency"]["runtime"] == "executorch"


# -- a whole run, a whole network ---------------------------------------------------------------


def test_a_whole_recipe_runs_on_it(tmp_path: Path) -> None:
    text = TINY.partition("  - prune")[0] + "  - quantize: {calibration: 64}\n"
    text = text.replace("subset: 300", "subset: 297")  # leaves nothing in the store for others
    recipe, folder = write_recipe(tmp_path, text), tmp_path / "run"
    settings = ["deploy.runtime=executorch", "deploy.batch=1", "deploy.threads=1"]
    run = run_recipe(recipe, folder, *settings)
    rows = {row["stage"]: row for row in run.ledger["rows"]}
    assert list(rows) == ["teacher", "exported", "distill", "quantize", "deploy"]
    assert {r["latency"][0]["runtime"] for r in list(rows.values())[1:]} == {"executorch"}
    assert "graph" not in rows["deploy"]  # passes can't be off
    assert run.ledger["environment"]["packages"]["executorch"]
    notes = [event["text"] for event in logged(folder, "note")]
    assert any("no row plain-int8" in note and "before it is exported" in note for note in notes)
    assert any("int8 takes" in note for note in notes)
    assert predict(folder / "bundle", "--bench", "--seconds", "0.1").returncode == 0


@pytest.mark.long
def test_a_resnet_of_cifars_is_all_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = base.models.get("cifar-resnet20")(3, 10).eval(), torch.randn(64, 3, 32, 32)
    options: dict[str, Any] = {"example": (x[:2],), "dynamic_shapes": SHAPES}
    student = quantize(Student(network), Scheme(runtime="executorch"), [(x,)], **options)
    export(student, tmp_path, **options)
    reference = quantized_reference(student.edits, network, (x[:2],), SHAPES)
    assert reference is not None
    with torch.no_grad():
        answers = reference(x).numpy()
    check_parity(answers, RUNTIME.session(tmp_path)(x.numpy())[0], same_class, QUANTIZED)
