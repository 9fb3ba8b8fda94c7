"""Networks by name: what they take, what they give, and how they are built again."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as models_of_torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.errors import AttarError, CheckpointError, UsageError
from attar.files import allow, from_file
from attar.models import ModelSpec, build, models, resolve, shapes_of
from attar.models.cifar_resnet import PadShortcut
from attar.models.torchvision import torchvision_arguments

PARAMETERS = {
    "article-mnist": (1, 28, 421_642),
    "article-cifar10": (3, 32, 4_275_594),
    "lenet5": (1, 28, 431_080),
    "lenet300": (1, 28, 266_610),
    "digits-wide": (1, 8, 151_306),
    "digits-small": (1, 8, 9_802),
    "cifar-resnet20": (3, 32, 269_722),
    "cifar-resnet56": (3, 32, 853_018),
}


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "config"
    monkeypatch.setenv("ATTAR_CONFIG", str(folder))
    return folder


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n"
        "def net(channels, classes, image_size, hidden=4):\n"
        "    h, w = image_size\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * h * w, hidden),\n"
        "                         nn.Linear(hidden, classes))\n"
        "def no_module():\n"
        "    return 3\n"
    )
    return path


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def image_side(name: str) -> int:
    return 8 if name.startswith("digits") else 32 if "cifar" in name else 28


@pytest.mark.parametrize("name", models.names())
def test_a_named_network_takes_the_datas_shape(name: str) -> None:
    side = image_side(name) + 4
    network = build(resolve(name, channels=2, classes=7, shape=(2, side, side + 4)))
    assert network(torch.randn(2, 2, side, side + 4)).shape == (2, 7)


@pytest.mark.parametrize("name", ["cifar-resnet8", "cifar-tiny", "article-mnist", "lenet300"])
def test_a_named_network_exports_with_any_batch(name: str) -> None:
    side = image_side(name)
    network = build(ModelSpec(model=name), channels=1, classes=7, shape=(1, side, side)).eval()
    x = torch.randn(2, 1, side, side)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
    for count in (1, 5):
        x = torch.randn(count, 1, side, side)
        torch.testing.assert_close(exported(x), network(x))
        assert exported(x).shape == (count, 7)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_networks_have_the_published_number_of_parameters(
    name: str, expected: tuple[int, int, int]
) -> None:
    channels, side, parameters = expected
    spec = ModelSpec(model=name)
    network = build(spec, channels=channels, classes=10, shape=(channels, side, side))
    assert size_of(network) == parameters


def test_the_articles_student_is_at_most_a_quarter_of_its_teacher() -> None:
    teacher, student = (
        size_of(build(ModelSpec(model=n), channels=1, classes=10))
        for n in ("article-mnist", "article-mnist-small")
    )
    assert 4 * student <= teacher


def test_every_network_says_what_it_is() -> None:
    described = models.describe()
    assert {"cifar-resnet8", "cifar-resnet110", "cifar-tiny", "lenet-wide"} <= set(described)
    assert all(described.values())


def test_a_narrow_resnet_with_a_strided_stem_is_smaller_and_halves_the_image() -> None:
    arguments = {"width": 8, "stem_stride": 2}
    network = build(ModelSpec(model="cifar-resnet8", arguments=arguments), channels=3, classes=10)
    seen: list[torch.Size] = []
    network.get_submodule("layer1").register_forward_hook(lambda m, i, o: seen.append(o.shape))
    network(torch.randn(2, 3, 32, 32))
    assert seen == [torch.Size([2, 8, 16, 16])]


def test_a_resnets_groups_may_differ_in_length() -> None:
    whole, same = (
        build(ModelSpec(model=name), channels=3, classes=10)
        for name in ("cifar-resnet20", "cifar-resnet")
    )
    assert whole.state_dict().keys() == same.state_dict().keys()
    spec = ModelSpec(model="cifar-resnet", arguments={"blocks": [1, 2, 3]})
    network = build(spec, channels=3, classes=10)
    groups = (network.get_submodule(f"layer{i}") for i in (1, 2, 3))
    assert [len(list(group.children())) for group in groups] == [1, 2, 3]


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("cifar-resnet", {"blocks": [1, 3]}, "three numbers of blocks"),
        ("cifar-resnet", {"blocks": [0, 3, 3]}, "at least 1"),
        ("cifar-tiny", {"widths": [16, 32], "strides": [2]}, "2 widths and 1 strides"),
        ("cifar-tiny", {"widths": [], "strides": []}, "as many strides as widths"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused_in_a_sentence(
    model: str, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(AttarError, match=said):
        build(ModelSpec(model=model, arguments=arguments), channels=3, classes=10)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_a_pad_shortcut_places_its_input_between_zeros(
    before: int, after: int, stride: int, side: int
) -> None:
    x = torch.rand(2, 3, side, side) + 1
    y = PadShortcut(before, after, stride)(x)
    assert y.shape[1] == before + 3 + after
    torch.testing.assert_close(y[:, before : before + 3], x[:, :, ::stride, ::stride])
    assert not y[:, :before].any()
    assert not y[:, before + 3 :].any()


def test_pads_can_be_changed_after_a_removal() -> None:
    network = build(ModelSpec(model="cifar-resnet8"), channels=3, classes=10)
    shortcut = network.get_submodule("layer2.0.shortcut")
    assert isinstance(shortcut, PadShortcut)
    assert (shortcut.before, shortcut.after, shortcut.stride) == (8, 8, 2)
    shortcut.before, shortcut.after = 5, 2
    assert shortcut(torch.randn(1, 16, 8, 8)).shape == (1, 23, 4, 4)


def test_a_resolved_spec_survives_json_and_builds_the_same_network() -> None:
    spec = resolve("article-mnist", channels=1, classes=10, shape=(1, 20, 24))
    again = ModelSpec(**json.loads(spec.model_dump_json()))
    assert again == spec
    assert shapes_of(build(again)) == spec.shapes_sha256
    assert build(again)(torch.randn(2, 1, 20, 24)).shape == (2, 10)


def test_resolving_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    resolve("lenet5", channels=1, classes=10)
    torch.testing.assert_close(torch.rand(2), expected)


def test_a_changed_library_is_named_when_shapes_differ() -> None:
    spec = resolve("squeezenet1_1", channels=3, classes=10)
    old = spec.model_copy(
        update={"library": {"torchvision": "0.1.2"}, "shapes_sha256": "of-something-else"}
    )
    with pytest.raises(CheckpointError, match=r"torchvision 0\.1\.2.*pip install"):
        build(old)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (1, 32, 32)),
        ("torchvision:squeezenet1_1", (1, 48, 48)),
        ("shufflenet_v2_x0_5", (4, 32, 32)),
        ("googlenet", (1, 32, 32)),
    ],
)
def test_torchvision_networks_take_the_datas_channels_and_classes(
    name: str, shape: tuple[int, int, int]
) -> None:
    slow = {"init_weights": False} if name == "googlenet" else {}
    spec = resolve(name, slow, channels=shape[0], classes=7, shape=shape)
    assert spec.model.startswith("torchvision:")
    assert "torchvision" in spec.library
    network = build(spec)
    assert network.train()(torch.randn(2, *shape)).shape == (2, 7)


def test_a_vision_transformer_is_made_for_the_datas_image_size() -> None:
    assert torchvision_arguments("vit_b_32", {}, (3, 64, 64)) == {"image_size": 64}
    own = {"image_size": 96}
    assert torchvision_arguments("vit_b_32", own, (3, 64, 64)) == own


def test_library_weights_keep_their_answers_when_the_data_are_gray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = models_of_torchvision.SqueezeNet1_1_Weights.DEFAULT
    published = models_of_torchvision.squeezenet1_1().state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: published)
    spec = resolve(
        "squeezenet1_1", {"weights": "DEFAULT"}, channels=1, classes=5, shape=(1, 32, 32)
    )
    gray = build(spec).eval()
    color = models_of_torchvision.squeezenet1_1()
    color.load_state_dict(published)
    x = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(
        gray.get_submodule("features")(x), color.eval().features(x.expand(2, 3, 48, 48))
    )
    assert gray(x).shape == (2, 5)
    random = build(spec, pretrained=False)
    assert not torch.equal(
        random.get_parameter("features.3.squeeze.weight"), published["features.3.squeeze.weight"]
    )


def test_timm_networks_take_the_datas_channels_and_classes() -> None:
    pytest.importorskip("timm", reason="the extra `timm` is not installed")
    network = build(resolve("timm:resnet10t", channels=1, classes=3))
    assert network.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("library", "model", "extra"),
    [("timm", "timm:resnet10t", "timm"), ("transformers", "transformers:vit", "text")],
)
def test_without_a_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, library: str, model: str, extra: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=rf"pip install 'attar\[{extra}\]'"):
        build(ModelSpec(model=model), channels=1, classes=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet81", {}, "did you mean 'resnet18'"),
        ("lenet_5", {}, "did you mean 'lenet5'"),
        ("torchvision:resnet81", {}, "did you mean 'resnet18'"),
        ("hub:resnet18", {}, "torchvision:NAME"),
        ("cifar-resnet20", {"witdh": 8}, "did you mean 'width'"),
        ("cifar-resnet20", {"width": "wide"}, "can't be made with"),
        ("resnet18", {"grups": 2}, "can't be made with"),
        ("nowhere.py:net", {}, "can't be read"),
        ("mine.py:not a name", {}, "path/to/file.py:Name"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(
    name: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(name, arguments, channels=3, classes=10)


def test_a_network_without_its_channels_names_what_it_needs() -> None:
    with pytest.raises(UsageError, match="needs channels, classes"):
        build(ModelSpec(model="lenet5"))


def test_a_persons_file_runs_only_when_allowed_and_is_asked_about_once(own_file: Path) -> None:
    questions: list[str] = []

    def yes(question: str) -> bool:
        questions.append(question)
        return True

    reference = f"{own_file}:net"
    with pytest.raises(UsageError, match="--trust"):
        resolve(reference, channels=1, classes=3, shape=(1, 5, 6))
    with pytest.raises(UsageError, match="--trust"):
        allow(own_file, lambda question: False)
    spec = resolve(reference, channels=1, classes=3, shape=(1, 5, 6), trusted=yes)
    assert build(spec)(torch.randn(2, 1, 5, 6)).shape == (2, 3)
    assert len(questions) == 1
    assert str(own_file) in questions[0]


def test_code_that_is_not_allowed_does_not_run(tmp_path: Path) -> None:
    path, ran = tmp_path / "eager.py", tmp_path / "ran"
    path.write_text(f"open({str(ran)!r}, 'w').close()\nclass Net: pass\n")
    with pytest.raises(UsageError):
        from_file(f"{path}:Net")
    assert not ran.exists()
    from_file(f"{path}:Net", trusted=True)
    assert ran.exists()


def test_a_changed_file_is_asked_about_again(own_file: Path) -> None:
    from_file(f"{own_file}:net", trusted=True)
    own_file.write_text(own_file.read_text() + "\n# more\n")
    with pytest.raises(UsageError, match="changed since"):
        from_file(f"{own_file}:net")


def test_a_damaged_store_of_permissions_allows_nothing(own_file: Path, config: Path) -> None:
    from_file(f"{own_file}:net", trusted=True)
    assert (config / "trusted.json").exists()
    (config / "trusted.json").write_text("{")
    with pytest.raises(UsageError, match="--trust"):
        from_file(f"{own_file}:net")


def test_a_relative_path_still_builds_from_another_folder(
    own_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_file.parent)
    spec = resolve(
        "mine.py:net", {"hidden": 2}, channels=1, classes=3, shape=(1, 4, 4), trusted=True
    )
    monkeypatch.chdir("/")
    assert size_of(build(spec)) == 16 * 2 + 2 + 2 * 3 + 3


def test_a_changed_file_that_builds_other_shapes_is_named(own_file: Path) -> None:
    spec = resolve(f"{own_file}:net", channels=1, classes=3, shape=(1, 4, 4), trusted=True)
    own_file.write_text(own_file.read_text().replace("hidden=4", "hidden=5"))
    with pytest.raises(CheckpointError, match=r"mine\.py has changed since"):
        build(spec, trusted=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nprint(undefined)\nclass Net: pass", "line 2: NameError"),
        ("def net(:", "line 1: SyntaxError"),
        ("class Nett: pass", "did you mean 'Nett'"),
    ],
)
def test_a_file_that_fails_is_explained(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(UsageError, match=message):
        from_file(f"{path}:Net", trusted=True)


def test_a_function_must_give_a_module(own_file: Path) -> None:
    with pytest.raises(UsageError, match="int: it should return a torch"):
        resolve(f"{own_file}:no_module", trusted=True)


def test_a_files_dataclasses_and_neighbours_work(tmp_path: Path) -> None:
    (tmp_path / "attar_test_neighbour.py").write_text("VALUE = 7\n")
    path = tmp_path / "parts.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from attar_test_neighbour import VALUE\n"
        "@dataclass\nclass Part:\n    value: int = VALUE\n"
    )
    part = from_file(f"{path}:Part", trusted=True)
    assert part().value == 7
    assert from_file(f"{path}:Part") is part
