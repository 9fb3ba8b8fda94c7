"""Students whose block is used many times: stored once, called often, exported and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from attar.distill.capture import Capture
from attar.errors import UsageError
from attar.measure.cost import macs, parameters
from attar.models import ModelSpec, build, resolve
from attar.prune import criteria, prune_weights
from attar.quantize import Scheme, quantize, quantized_reference
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.share import share_weights
from attar.stages.base import Context
from attar.student import Student, load_student, save_student
from attar.tasks.image_classification import ImageClassification
from attar.training.config import Training

TASK = ImageClassification()
SHAPES = ({0: torch.export.Dim("batch", min=1)},)
NAMES = (["input"], ["logits"])
SIZES: dict[str, dict[str, Any]] = {
    "cifar-resnet-reused": {"blocks": [3, 3, 3], "width": 8},
    "vit-small": {"patch": 2, "width": 24, "heads": 2, "blocks": 4, "reuse": True},
}


def spec_of(model: str, **given: Any) -> ModelSpec:
    arguments = {**SIZES[model], **given}
    return resolve(model, arguments, channels=1, classes=10, shape=(1, 8, 8))


def made(model: str, **given: Any) -> Student:
    torch.manual_seed(0)
    spec = spec_of(model, **given)
    network = build(spec).train()
    for _ in range(3):  # so that batch norms have statistics
        network(torch.randn(64, 1, 8, 8))
    return Student(network.eval(), spec)


@pytest.fixture(params=list(SIZES))
def student(request) -> Student:
    return made(request.param)


@pytest.fixture(scope="module")
def images(digits) -> Tensor:
    return next(digits.train.batches(64)).inputs


def own(model: str) -> nn.Module:
    """The same network with a block for each application."""
    if model == "vit-small":
        return build(spec_of(model, reuse=False))
    return build(ModelSpec(model="cifar-resnet", arguments=SIZES[model], channels=1, classes=10))


@pytest.mark.parametrize("model", list(SIZES))
def test_it_has_fewer_weights_for_as_much_work(model):
    reused, dense = build(spec_of(model)), own(model)
    example = (torch.randn(2, 1, 8, 8),)
    assert macs(reused, example) == macs(dense, example)
    assert parameters(reused) < 0.65 * parameters(dense)
    names = list(reused.state_dict())
    assert len(names) == len(set(names))
    stored = sum(t.numel() for n, t in reused.named_parameters(remove_duplicate=False))
    assert stored == parameters(reused)


def test_the_default_sizes_are_the_documented_ones():
    assert parameters(build(ModelSpec(model="vit-small", channels=3, classes=10))) == 460_714
    reused = ModelSpec(model="vit-small", arguments={"reuse": True}, channels=3, classes=10)
    assert parameters(build(reused)) == 86_794


def test_a_reused_transformer_is_one_whose_blocks_are_alike(images):
    reused, dense = made("vit-small").module, own("vit-small").eval()
    weights = reused.state_dict()
    for name in dense.state_dict():
        inside = name.replace("encoder.", "encoder.block.", 1).split(".")
        if name.startswith("encoder."):
            del inside[2]
            weights[name] = weights[".".join(inside)]
    dense.load_state_dict({k: v for k, v in weights.items() if not k.startswith("encoder.block.")})
    with torch.no_grad():
        torch.testing.assert_close(dense(images), reused(images))


def test_a_reused_resnet_is_one_whose_blocks_are_alike(images):
    reused, dense = made("cifar-resnet-reused").module, own("cifar-resnet-reused").eval()
    weights = {k: v for k, v in reused.state_dict().items() if k in dense.state_dict()}
    for group, layer in ((1, reused.layer1), (2, reused.layer2), (3, reused.layer3)):
        start = 0
        if hasattr(layer, "first"):
            start = 1
            for name, value in layer.first.state_dict().items():
                weights[f"layer{group}.0.{name}"] = value
        for i in range(layer.again.times):
            for part in ("conv1", "conv2"):
                weights[f"layer{group}.{start + i}.{part}.weight"] = getattr(
                    layer.again, part
                ).weight
            for part in ("bn1", "bn2"):
                for name, value in getattr(layer.again, part)[i].state_dict().items():
                    weights[f"layer{group}.{start + i}.{part}.{name}"] = value
    dense.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(dense(images), reused(images))


def test_norms_are_for_each_application_or_for_all():
    own_norms = made("cifar-resnet-reused").module.layer1.again
    shared = made("cifar-resnet-reused", norms="shared").module.layer1.again
    assert (len(own_norms.bn1), len(shared.bn1)) == (3, 1)


def test_it_is_saved_once_and_loaded(student, images, tmp_path: Path):
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=build)
    with torch.no_grad():
        assert torch.equal(loaded.module(images), student.module(images))
    assert (tmp_path / "weights.safetensors").stat().st_size < 5.2 * parameters(student.module)


def exported(student: Student, images: Tensor, folder: Path) -> tuple[Tensor, onnx.ModelProto]:
    OnnxRuntime().export(student, folder, example=(images[:2],), dynamic_shapes=SHAPES, names=NAMES)
    (answer,) = OnnxRuntime().session(folder)(images.numpy())
    return torch.from_numpy(answer), onnx.load(folder / "model.onnx")


def test_the_exported_file_has_each_weight_once(student, images, tmp_path: Path):
    answer, proto = exported(student, images, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(answer, student.module(images), rtol=1e-3, atol=1e-4)
    held = [i for i in proto.graph.initializer if len(i.dims) > 1]
    numbers = sum(torch.Size(i.dims).numel() for i in held)
    matrices = sum(p.numel() for p in student.module.parameters() if p.dim() > 1)
    assert numbers == matrices


def test_int8_answers_as_pytorch_does(student, images, tmp_path: Path):
    small = quantize(student, Scheme(), [(images,)], example=(images[:2],), dynamic_shapes=SHAPES)
    answer, _ = exported(small, images, tmp_path)
    reference = quantized_reference(small.edits, student.module, (images[:2],), SHAPES)
    with torch.no_grad():
        expected, plain = reference(images), student.module(images)
    spread = float(plain.std())
    assert float((answer - expected).abs().mean()) < 0.05 * spread
    assert float((answer - plain).abs().mean()) < 0.2 * spread


def test_edits_hold_for_a_weight_that_is_used_often(student, digits, tmp_path: Path):
    masked = prune_weights(student, criterion=criteria.get("magnitude")(), ratio=0.5)
    edit, _ = share_weights(masked.module, 3)
    shared = masked.edited(edit)
    run = Context(task=TASK, data=digits, teacher=None, seed=1, work=tmp_path)
    training = Training.model_validate({"epochs": 1, "batch_size": 50})
    run.train(shared, training).check()


@pytest.mark.parametrize(
    ("model", "inside", "around"),
    [
        ("vit-small", "encoder.block", "encoder"),
        ("vit-small", "encoder.block.up", "encoder.block"),
        ("cifar-resnet-reused", "layer1.again.conv1", "layer1.again"),
    ],
)
def test_what_runs_often_is_named_when_it_is_to_be_captured(model, inside, around, images):
    network = made(model).module
    with (
        pytest.raises(UsageError, match=f"'{inside}' runs more than once.*such as '{around}'"),
        Capture(network, [inside])(),
    ):
        network(images)
    with Capture(network, [around.removesuffix(".block")])() as features:
        network(images)
    assert len(features) == 1


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("vit-small", {"patch": 3}, "8x8 don't divide into patch 3"),
        ("vit-small", {"heads": 5}, "width 24 doesn't divide among 5 heads"),
        ("vit-small", {"blocks": 0}, "blocks is 0"),
        ("cifar-resnet-reused", {"blocks": [1, 2]}, "takes three numbers of blocks"),
        ("cifar-resnet-reused", {"norms": "none"}, "norms is 'none': own or shared"),
    ],
)
def test_wrong_sizes_are_named(model, given, message):
    with pytest.raises(UsageError, match=message):
        spec_of(model, **given)
