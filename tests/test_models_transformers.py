"""transformers' image classifiers: built for the data, refused in a sentence, exported, taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attar.errors import UsageError
from attar.models import ModelSpec, build, resolve
from attar.quantize import Scheme, quantize, quantized_reference
from attar.runtimes import runtimes
from attar.runtimes.parity import FLOAT, QUANTIZED, check_parity
from attar.student import Student
from attar.tasks.image_classification import ImageClassification
from run_fixture import TINY, run_recipe, write_recipe
from runtime_fixture import SHAPES, images, same_class

pytest.importorskip("transformers", reason="the extra `text` is not installed")

VIT = {
    "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def test_networks_take_the_datas_channels_classes_and_size() -> None:
    spec = resolve("transformers:vit", VIT, channels=1, classes=3, shape=(1, 8, 8))
    assert spec.arguments["image_size"] == 8
    network = build(ModelSpec.model_validate_json(spec.model_dump_json()))
    assert network.eval()(images(2)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    "kind",
    ["beit", "convnext", "deit", "efficientnet", "mobilenet_v2", "mobilevit", "resnet", "swin"],
)
def test_common_kinds_are_built_for_the_datas_images(kind: str) -> None:
    with torch.device("meta"):
        spec = resolve(f"transformers:{kind}", channels=1, classes=3, shape=(1, 224, 224))
        answers = build(spec).eval()(torch.empty(2, 1, 224, 224))
    assert answers.logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("transformers:vitt", {}, "no image classifier 'vitt'; did you mean 'vit'"),
        ("transformers:vit", {"hiden_size": 16}, "no 'hiden_size'; did you mean 'hidden_size'"),
        ("transformers:vit", {"pretrained": True}, "is a kind of network and has no weights"),
    ],
)
def test_what_transformers_lacks_is_named(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(ModelSpec(model=name, arguments=arguments), channels=1, classes=3)


def test_a_classifier_is_exported_and_quantized(tmp_path: Path) -> None:
    spec = resolve("transformers:vit", VIT, channels=1, classes=3, shape=(1, 8, 8))
    student, runtime = Student(build(spec).eval()), runtimes.get("onnxruntime")()
    shown: dict[str, Any] = {"example": (images(2),), "dynamic_shapes": SHAPES}
    small = quantize(student, Scheme(), [(images(64),)], **shown)
    for name, made, bound in (("float", student, FLOAT), ("int8", small, QUANTIZED)):
        runtime.export(made, tmp_path / name, names=(["image"], ["logits"]), **shown)
        (found,) = runtime.session(tmp_path / name)(images(64).numpy())
        graph = quantized_reference(made.edits, made.module, *shown.values()) or made.module
        wanted = ImageClassification().logits(graph(images(64)))
        check_parity(wanted.detach().numpy(), found, same_class, bound)


def test_a_recipe_teaches_one(tmp_path: Path) -> None:
    student = f"student: {{model: 'transformers:vit', arguments: {VIT}}}"
    text = TINY.replace("student: {model: digits-small}", student).partition("  - prune")[0]
    text = text.replace("distill: {epochs: 3,", "distill: {epochs: 30,")
    run = run_recipe(write_recipe(tmp_path, text), tmp_path / "run")
    assert [row["stage"] for row in run.ledger["rows"]][-2:] == ["distill", "deploy"]
    assert run.ledger["rows"][-1]["metric"]["value"] > 0.4
