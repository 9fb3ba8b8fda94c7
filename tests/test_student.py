"""A student that was saved comes back: the same answers, the same record, no code run."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import attar
from attar.distill.head import reuse_head
from attar.errors import CheckpointError, ConstraintBroken, StorageError
from attar.models import build
from attar.models.base import ModelSpec
from attar.models.cifar_resnet import CifarResNet
from attar.prune import (
    ChannelsRemoved,
    Masked,
    criteria,
    prune_channels,
    prune_weights,
    without_blocks,
)
from attar.quantize import Quantized, quantize_dynamically, quantize_weights
from attar.quantize.edit import Scheme
from attar.share import Shared, fold_norms, hash_student, share_weights
from attar.student import Edit, Student, load_student, save_student
from attar.student.fingerprint import weights_sha256

SPEC = ModelSpec(model="cifar-resnet8", channels=1, classes=10)
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SHAPES = ({0: torch.export.Dim("batch", min=1)},)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def make_attending() -> nn.Module:
    """Rows of an image that attend to one another."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(1, 2),
        nn.Linear(8, 16),
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def make_residual() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet((2, 1, 1), 1, 10)


def make_normed() -> nn.Module:
    """Convolutions that compute their weight."""
    torch.manual_seed(0)
    return nn.Sequential(
        weight_norm(nn.Conv2d(1, 16, 3, padding=1)),
        nn.ReLU(),
        weight_norm(nn.Conv2d(16, 16, 3, padding=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def no_spec(spec: ModelSpec) -> nn.Module:
    raise AssertionError("a handed-in module needs no spec")


def load(folder: Path, way: str = "") -> Student:
    return load_student(folder, build=no_spec, module=NETS.get(way, make_net)())


def magnitude():
    return criteria.get("magnitude")()


def masked(student: Student) -> Student:
    return prune_weights(student, criterion=magnitude(), ratio=0.6)


def removed(student: Student) -> Student:
    narrow, _ = prune_channels(student, (IMAGES,), criterion=magnitude(), ratio=0.5)
    assert narrow.module[0].out_channels == 8
    return narrow


def freed(student: Student) -> Student:
    narrow, _ = prune_channels(student, (IMAGES,), criterion=magnitude(), ratio=0.5)
    assert narrow.module[2].self_attn.in_proj_weight.shape == (24, 8)  # two heads of four units
    return narrow


def shallower(student: Student) -> Student:
    return without_blocks(student, {"layer1.1": False})


def folded(student: Student) -> Student:
    narrow, _ = prune_channels(student, (IMAGES,), criterion=magnitude(), ratio=0.5)
    assert type(narrow.module[0]) is nn.Conv2d and narrow.module[0].out_channels == 8
    return narrow


def shared(student: Student) -> Student:
    student = student.copy()
    edit, _ = share_weights(student.module, bits=3)
    return student.edited(edit)


def quantized(student: Student) -> Student:
    shift = torch.zeros(16, dtype=torch.int64)  # one for all that are symmetric
    grids = {name: (torch.rand(16), shift) for name in ("0.weight", "3.weight")}
    return student.edited(
        Quantized(Scheme(float_layers=("6",)), grids, weights_sha256(student.module))
    )


def stored(student: Student) -> Student:
    return quantize_weights(student, "int4", example=(IMAGES,), dynamic_shapes=SHAPES)


def quantized_in_calls(student: Student) -> Student:
    return quantize_dynamically(student, example=(IMAGES,), dynamic_shapes=SHAPES)


def headed(student: Student) -> Student:
    student = student.copy()
    torch.manual_seed(1)
    wide = nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )
    reuse_head(student, wide.eval(), (IMAGES,))
    return student


def hashed(student: Student) -> Student:
    return hash_student(student.copy(), 0.25)[0]


def without_norms(student: Student) -> Student:
    student = student.copy()
    return student.edited(fold_norms(student.module))


WAYS = {
    "none": [],
    "teacher-head": [headed],
    "masked": [masked],
    "channels-removed": [removed],
    "heads-freed": [freed],
    "blocks-removed": [shallower],
    "weights-folded": [folded],
    "shared": [shared],
    "hashed": [hashed],
    "norms-folded": [without_norms],
    "quantized": [quantized],
    "weights-quantized": [stored],
    "quantized-dynamically": [quantized_in_calls],
    "all": [removed, masked, shared, quantized],
    "masked first": [masked, removed],
    "teacher-head first": [headed, masked, shared],
    "heads-freed, masked, shared": [freed, masked, shared],
    "masked, heads-freed": [masked, freed],
    "masked, blocks-removed, shared": [masked, shallower, shared],
    "weights-folded, masked, shared": [folded, masked, shared],
    "norms-folded, masked, shared": [without_norms, masked, shared],
}
MADE_FOR = {
    freed: make_attending,
    shallower: make_residual,
    folded: make_normed,
    without_norms: make_residual,
}
NETS = {way: MADE_FOR[step] for way, steps in WAYS.items() for step in steps if step in MADE_FOR}


def made(*steps, net=make_net) -> Student:
    student = Student(net().eval())
    for step in steps:
        student = step(student)
    student.check()
    return student


def made_by(way: str) -> Student:
    return made(*WAYS[way], net=NETS.get(way, make_net))


@pytest.fixture
def saved(tmp_path):
    """A student whose weights are masked and shared, in a folder."""
    save_student(made(masked, shared), tmp_path / "student")
    return tmp_path / "student"


# --- there and back


@pytest.mark.parametrize("way", WAYS)
def test_a_student_comes_back(tmp_path, way):
    student = made_by(way)
    save_student(student, tmp_path)
    back = load(tmp_path, way)

    assert [e.kind for e in back.edits] == [e.kind for e in student.edits]
    for edit, again in zip(student.edits, back.edits, strict=True):
        assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(edit.to_json()))
        assert again.tensors().keys() == edit.tensors().keys()
        for name, tensor in edit.tensors().items():
            assert torch.equal(again.tensors()[name], tensor)
    weights, again = student.module.state_dict(), back.module.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(m.training for m in back.module.modules())
    with torch.no_grad():
        assert torch.equal(back.module(IMAGES), student.module(IMAGES))


def test_every_kind_of_edit_is_tried_here():
    kinds = {e.kind for way in WAYS for e in made_by(way).edits}
    own = {name for name, kind in Edit.kinds.items() if kind.__module__.startswith("attar.")}
    assert kinds == own


@pytest.mark.parametrize("way", WAYS)
def test_only_json_and_safetensors_are_written(tmp_path, way):
    save_student(made_by(way), tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors" and load_file(path)


def test_a_named_network_is_built_again(tmp_path):
    student = Student(build(SPEC).eval(), SPEC)
    save_student(student, tmp_path)
    back = load_student(tmp_path, build=build)
    assert back.spec == SPEC
    with torch.no_grad():
        assert torch.equal(back.module(IMAGES), student.module(IMAGES))


@pytest.mark.parametrize(
    ("way", "net"),
    [
        (
            "all",
            "nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),"
            "nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
            "nn.Linear(16, 10)",
        ),
        (
            "heads-freed",
            "nn.Flatten(1, 2), nn.Linear(8, 16),"
            "nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),"
            "nn.Flatten(), nn.Linear(128, 10)",
        ),
    ],
)
def test_a_fresh_process_knows_every_edit(tmp_path, way, net):
    student = made_by(way)
    save_student(student, tmp_path / "student")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import attar\nfrom torch import nn\n"
        f"net = nn.Sequential({net})\n"
        "print([e.kind for e in attar.load_student(sys.argv[2], model=net).edits])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str([e.kind for e in student.edits]), done.stderr


def test_tied_weights_come_back_tied(tmp_path):
    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        return net

    student = Student(tied())
    save_student(student, tmp_path)
    back = load_student(tmp_path, build=no_spec, module=tied()).module
    assert back[0].weight is back[1].weight
    assert torch.equal(back[0].weight, student.module[0].weight)


def test_channels_last_weights_come_back(tmp_path):
    student = made()
    student.module.to(memory_format=torch.channels_last)
    save_student(student, tmp_path)
    back = load(tmp_path).module
    assert all(
        torch.equal(a, b)
        for a, b in zip(back.parameters(), student.module.parameters(), strict=True)
    )


def test_saving_over_another_student_leaves_nothing_of_it(tmp_path):
    save_student(made(*WAYS["all"]), tmp_path)
    save_student(made(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.json", "weights.safetensors"]
    assert load(tmp_path).edits == []


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*arguments):
        said = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(said)

    monkeypatch.setattr("attar.student.saving.save_file", full)
    with pytest.raises(StorageError, match=r"no room left to write"):
        save_student(made(), tmp_path)


# --- the network that flows


def test_a_copy_has_weights_of_its_own():
    student = made(masked)
    copied = student.copy()
    with torch.no_grad():
        copied.module[0].weight.zero_()
    assert student.module[0].weight.any()
    assert copied.edits == student.edits and copied.edits is not student.edits


def test_edits_are_found_by_kind_in_order():
    student = made(masked, shared)
    assert student.find(Masked) == student.find("masked") == [student.edits[0]]
    assert student.find(Shared) == [student.edits[1]]
    assert student.find(ChannelsRemoved) == []
    more = student.edited(student.edits[0])
    assert len(more.edits) == 3 and len(student.edits) == 2 and more.module is student.module


def test_hooks_keep_every_promise_in_a_loop_of_ones_own():
    student = made(removed, masked, shared)
    before, after = student.hooks()
    module = student.module.train()
    start = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        module(IMAGES).logsumexp(1).sum().backward()
        before(module)
        optimizer.step()
        optimizer.zero_grad()
        after(module)
        student.check()
    assert any(not torch.equal(start[n], p) for n, p in module.named_parameters())
    assert (module[0].weight == 0).float().mean() >= 0.5


# --- what is refused


def test_a_module_from_python_must_be_handed_in_again(saved):
    with pytest.raises(CheckpointError, match=r"attar\.load\(run, model=MyNetwork\(\)\)"):
        load_student(saved, build=no_spec)
    with pytest.raises(CheckpointError, match=r"attar\.load\(run, model="):
        attar.load(saved)


def test_another_network_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"don't fit the network"):
        load_student(saved, build=no_spec, module=nn.Linear(3, 3))


@pytest.mark.parametrize("step", [masked, shared, quantized])
def test_a_broken_promise_is_found_on_loading(tmp_path, step):
    save_student(made(step), tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    weights["0.weight"] = torch.randn_like(weights["0.weight"])
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ConstraintBroken, match=r"a constraint of the student is broken: .+"):
        load(tmp_path)


def test_many_broken_promises_are_said_in_one_sentence():
    student = made(masked, masked, shared)
    with torch.no_grad():
        for p in student.module.parameters():
            p.normal_()
    with pytest.raises(ConstraintBroken) as caught:
        student.check()
    assert "\n" not in str(caught.value) and "more" in str(caught.value)


def edit_record(folder: Path, **changes) -> None:
    record = json.loads((folder / "student.json").read_text())
    (folder / "student.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 99}, r"schema 99; this Attar reads up to 1: upgrade attar"),
        ({"schema": "1"}, r"no schema number"),
        ({"edits": [{"kind": "maskd"}]}, r"unknown kind 'maskd'; did you mean 'masked'.*newer"),
        ({"edits": [{"kind": ["masked"]}]}, r"unknown kind"),
        ({"edits": ["masked"]}, r"unknown kind"),
        ({"edits": {}}, r"damaged"),
        ({"edits": None}, r"damaged"),
        ({"spec": {"model": "x", "colour": 3}}, r"spec is damaged: colour"),
        ({"spec": "x"}, r"spec is damaged"),
    ],
)
def test_a_wrong_record_is_refused(saved, changes, said):
    edit_record(saved, **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


KINDS = [
    "masked", "shared", "channels-removed", "heads-freed", "blocks-removed", "weights-folded",
    "quantized", "weights-quantized", "quantized-dynamically", "teacher-head",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["without fields", "with other types"])
def test_a_damaged_edit_is_refused(tmp_path, kind, change):
    save_student(made_by(kind), tmp_path)
    records = json.loads((tmp_path / "student.json").read_text())["edits"]
    (record,) = [r for r in records if r["kind"] == kind]
    fields = {} if change == "without fields" else dict.fromkeys(record, 7)
    edit_record(tmp_path, edits=[fields | {"kind": kind}])
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        load(tmp_path, kind)


@pytest.mark.parametrize("kind", ["masked", "shared", "quantized", "weights-quantized"])
def test_an_edit_without_its_tensors_is_refused(tmp_path, kind):
    save_student(made(*WAYS[kind]), tmp_path)
    (tmp_path / "edits.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
        load(tmp_path)


def test_a_missing_student_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"no student in .*student\.json is missing"):
        load(tmp_path / "nowhere")
    (saved / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing"):
        load(saved)


@pytest.mark.parametrize("name", ["student.json", "weights.safetensors", "edits.safetensors"])
@given(data=st.data())
@settings(max_examples=12)
def test_a_damaged_file_never_ends_in_a_traceback(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("damaged")
    save_student(made(masked), folder)
    content = (folder / name).read_bytes()
    if data.draw(st.booleans(), "cut"):
        damaged = content[: data.draw(st.integers(0, len(content) - 2))]
    else:
        damaged = data.draw(st.binary(max_size=60))
    (folder / name).write_bytes(damaged)
    with pytest.raises((CheckpointError, ConstraintBroken)):
        load(folder)


def test_a_pickle_in_the_place_of_weights_is_not_run(saved, tmp_path):
    victim = tmp_path / "precious"
    victim.touch()

    class Hostile:
        def __reduce__(self):
            return (Path.unlink, (victim,))

    torch.save({"0.weight": Hostile()}, saved / "weights.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load(saved)
    assert victim.exists()


def test_a_network_that_asks_for_its_version_comes_back(tmp_path):
    """As torchvision's MNASNet does, which refuses weights that carry none."""

    def build(spec):
        return torchvision.models.MNASNet(0.35, num_classes=4)

    x = torch.randn(1, 3, 64, 64)
    module = build(None).eval()
    save_student(Student(module, ModelSpec(model="mnasnet")), tmp_path)
    back = load_student(tmp_path, build=build)
    with torch.no_grad():
        assert torch.equal(back.module(x), module(x))
