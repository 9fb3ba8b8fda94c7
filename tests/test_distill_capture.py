"""Inner layers by path: what is captured, and that nothing stays behind."""

import copy

import pytest
import torch
from torch import nn

from attar.distill import Capture
from attar.errors import UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.stage = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
        self.act = nn.ReLU()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.unused = nn.Linear(2, 2)
        self.names = Names()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.stage(x))
        sequence, _ = self.lstm(x.flatten(2).transpose(1, 2))
        self.names(x)
        return sequence[:, -1]


class Names(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    nn.init.constant_(made.stage[0].bias, -0.5)
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_outputs_come_by_path_with_gradients(net, x):
    with Capture(net, ["stem", "stage.2"])() as features:
        net(x)
    assert torch.equal(features["stem"], net.stem(x))
    assert features["stage.2"].shape == (2, 3, 4, 4)
    features["stage.2"].sum().backward()
    assert net.stem.weight.grad.abs().sum() > 0


def test_what_follows_in_place_does_not_change_what_was_captured(net, x):
    with Capture(net, ["stage.0"])() as features:
        net(x)
    expected = net.stage[0](torch.relu(net.stem(x)))
    assert (expected < 0).any()
    assert torch.equal(features["stage.0"], expected)


def test_the_first_of_a_tuple_is_taken(net, x):
    with Capture(net, ["lstm"])() as features:
        answer = net(x)
    assert torch.equal(features["lstm"][:, -1], answer)


def test_the_module_is_left_as_it_was(net, x):
    before = {name: set(vars(m)) for name, m in net.named_modules()}
    plain = net(x)
    capture = Capture(net, ["stem", "lstm"])
    with capture():
        assert hooks(net) == 2
        assert torch.equal(net(x), plain)
    assert hooks(net) == 0
    assert {name: set(vars(m)) for name, m in net.named_modules()} == before
    copy.deepcopy(net)


def test_hooks_are_gone_after_an_error(net, x):
    with pytest.raises(RuntimeError), Capture(net, ["stem"])():
        net(torch.zeros(2, 7, 4, 4))
    with pytest.raises(KeyboardInterrupt), Capture(net, ["stem"])():
        raise KeyboardInterrupt
    assert hooks(net) == 0


def test_a_capture_is_used_again_and_again(net, x):
    capture = Capture(net, ["stem"])
    for scale in (1.0, 2.0):
        with capture() as features:
            net(scale * x)
        assert torch.equal(features["stem"], net.stem(scale * x))


def test_a_layer_that_runs_twice_is_refused(net, x):
    with pytest.raises(UsageError, match=r"'act' runs more than once"), Capture(net, ["act"])():
        net(x)
    assert hooks(net) == 0


def test_a_layer_that_does_not_run_is_refused(net, x):
    with pytest.raises(UsageError, match="'unused' is not used"), Capture(net, ["unused"])():
        net(x)


def test_a_layer_without_a_tensor_is_refused(net, x):
    with pytest.raises(UsageError, match="'names' gives a dict"), Capture(net, ["names"])():
        net(x)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("stage.3", r"Net has no layer 'stage.3'; did you mean 'stage.\d'"),
        ("steem", "did you mean 'stem'"),
        ("backbone", "known: act, lstm, names, stage, stem, unused"),
        ("", "has no layer ''"),
    ],
)
def test_a_wrong_path_lists_near_ones(net, path, said):
    with pytest.raises(UsageError, match=said):
        Capture(net, [path])


def test_a_wrapped_network_keeps_its_own_paths(net, x):
    wrapped = nn.DataParallel(net)
    with Capture(wrapped, ["stem"])() as features:
        wrapped(x)
    assert torch.equal(features["stem"], net.stem(x))
