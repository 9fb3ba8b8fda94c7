"""Weights from files: every layout people have, and a clear refusal of everything else."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from attar.errors import CheckpointError
from attar.models import ModelSpec, build, load_checkpoint


def network(width: int = 4) -> nn.Module:
    spec = ModelSpec(model="cifar-resnet8", arguments={"width": width})
    return build(spec, channels=1, classes=3)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best_prec1": 93.4},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(0.1)},
    "model": lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},
    "net": lambda s: {"net": s, "optimizer": {"state": {}, "param_groups": []}},
    "ema": lambda s: {"ema": s},
    "two deep": lambda s: {"model": {"state_dict": s}},
    "parallel": lambda s: {"state_dict": prefixed(s, "module.")},
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 1},
    "parallel and compiled": lambda s: prefixed(s, "module._orig_mod."),
    "averaged": lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(5)},
    "old": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_load_from_every_layout(tmp_path: Path, layout: str) -> None:
    source, target = network(), network()
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "w.pth")
    load_checkpoint(target, tmp_path / "w.pth")
    for name, parameter in target.named_parameters():
        torch.testing.assert_close(
            parameter, source.get_parameter(name), rtol=2e-3, atol=2e-3 if layout == "half" else 0
        )


def test_weights_load_from_safetensors_whatever_the_file_is_called(tmp_path: Path) -> None:
    source, target = network(), network()
    for name in ("w.safetensors", "w.bin"):
        save_file(prefixed(source.state_dict(), "module."), tmp_path / name)
        load_checkpoint(target, tmp_path / name)
        torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_weights_load_from_pytorchs_old_format(tmp_path: Path) -> None:
    source, target = network(), network()
    torch.save(source.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    load_checkpoint(target, tmp_path / "w.pt")
    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_a_network_with_a_part_called_model_keeps_its_names(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        return nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.Linear(2, 2)})

    source, target = nested(), nested()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_checkpoint(target, tmp_path / "w.pt")
    torch.testing.assert_close(target.state_dict(), source.state_dict())


def test_another_networks_weights_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = network().state_dict()
    state["head.weight"] = state.pop("linear.weight")
    state["conv1.weight"] = torch.zeros(4, 3, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    target = network()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, tmp_path / "w.pth")
    message = str(caught.value)
    assert "1 missing: linear.weight" in message
    assert "1 unexpected: head.weight" in message
    assert "conv1.weight (4x3x3x3 in the file, 4x1x3x3 in the network)" in message
    torch.testing.assert_close(target.state_dict(), before)


def test_a_long_list_shows_its_first_few(tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"missing: \S+, \S+, \S+ and \d+ more; 1 unexpected"):
        load_checkpoint(network(), tmp_path / "w.pth")


class Hostile:
    """Unpickles into a call that writes a file."""

    def __init__(self, path: Path, call: Callable[..., object] = os.system) -> None:
        self.path = path
        self.call = call

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        if self.call is os.system:
            return os.system, (f"echo hacked > {self.path}",)
        return self.call, (f"open({str(self.path)!r}, 'w').write('hacked')",)


@pytest.mark.parametrize("call", [os.system, exec], ids=["system", "exec"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_hostile_checkpoint_is_refused_and_not_executed(
    tmp_path: Path, call: Callable[..., object], zipped: bool
) -> None:
    path, written = tmp_path / "evil.pth", tmp_path / "written"
    torch.save(
        {"state_dict": network().state_dict(), "epoch": Hostile(written, call)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="refused to open"):
        load_checkpoint(network(), path)
    assert not written.exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert written.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    path, written = tmp_path / "evil.pkl", tmp_path / "written"
    path.write_bytes(pickle.dumps(Hostile(written), protocol=protocol))
    with pytest.raises(CheckpointError):
        load_checkpoint(network(), path)
    assert not written.exists()


def test_a_whole_pickled_model_is_told_apart(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"whole pickled model.*state_dict\(\)"):
        load_checkpoint(network(), tmp_path / "model.pth")


@pytest.mark.parametrize("kind", ["zip", "old format", "safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_damaged(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "w"
    if kind == "safetensors":
        save_file(network().state_dict(), path)
    else:
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(network(), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no checkpoint"),
        (b"epoch,loss\n1,0.3\n", "neither a safetensors file nor"),
        (b"PK\x03\x04 not really a zip", "damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(network(), tmp_path / "w.pth")


def test_a_file_that_is_missing_or_a_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(network(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint(network(), tmp_path)


@pytest.mark.parametrize("content", [{"epoch": 3, "lr": 0.1}, [1, 2], {"model": {"a": 1}}])
def test_a_checkpoint_without_weights_says_what_it_holds(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no weights, only"):
        load_checkpoint(network(), tmp_path / "w.pth")


def test_the_published_resnet56_loads(attar_data: Path) -> None:
    path = attar_data / "checkpoints" / "resnet56-4bfd9763.th"
    teacher = build(ModelSpec(model="cifar-resnet56"), channels=3, classes=10)
    load_checkpoint(teacher, path)
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    torch.testing.assert_close(
        teacher.get_parameter("layer3.8.conv2.weight").data, stored["module.layer3.8.conv2.weight"]
    )
