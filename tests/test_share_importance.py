import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from attar.errors import AttarError, UsageError
from attar.share import cluster, fisher_importance, share_weights
from network_fixture import Encoder

Pair = tuple[Tensor, Tensor]


def loss_of(network: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.cross_entropy(network(batch[0]), batch[1])


def examples(count: int) -> Pair:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def one_by_one(batch: Pair) -> list[Pair]:
    return list(zip(batch[0].split(1), batch[1].split(1), strict=True))


@pytest.fixture(params=["cnn", "transformer"])
def module(request, tiny_net) -> nn.Module:
    torch.manual_seed(0)
    return tiny_net() if request.param == "cnn" else Encoder()


def test_it_is_the_mean_square_of_each_examples_gradient(module):
    batch = examples(6)
    ours = fisher_importance(module, one_by_one(batch), loss_of)
    parameters = {path: p.detach() for path, p in module.named_parameters()}
    still = copy.deepcopy(module).eval()

    def loss(values, image, label):
        output = functional_call(still, values, (image[None],))
        return nn.functional.cross_entropy(output, label[None])

    theirs = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *batch)
    assert ours.keys() == theirs.keys()
    for path, gradients in theirs.items():
        expected = gradients.double().square().mean(0)
        assert torch.allclose(ours[path], expected, rtol=1e-3, atol=1e-9)


def test_the_network_is_left_as_it_is(module):
    module.train()
    module[0].weight.requires_grad_(False) if isinstance(module, nn.Sequential) else None
    before = copy.deepcopy(module.state_dict())
    found = fisher_importance(module, one_by_one(examples(2)), loss_of)
    assert found.keys() == dict(module.named_parameters()).keys(), "frozen ones too"
    assert module.training and all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())


def test_what_can_not_be_scored_is_refused(module):
    with pytest.raises(UsageError, match="there is no batch"):
        fisher_importance(module, [], loss_of)
    with pytest.raises(UsageError, match="must be one number"):
        fisher_importance(module, one_by_one(examples(1)), lambda net, b: net(b[0]))
    with pytest.raises(UsageError, match="doesn't depend on any weight"):
        fisher_importance(module, one_by_one(examples(1)), lambda net, b: torch.ones(()))


def test_important_weights_keep_their_values():
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0]) + 1
    alike = cluster(weight, 2)
    assert alike.values.tolist() == [1.5, 3.5]
    first = cluster(weight, 2, importance=torch.tensor([9.0, 1.0, 1.0, 1.0]))
    assert first.values.tolist() == pytest.approx([1.1, 3.5])
    third = cluster(weight, 2, importance=torch.tensor([1.0, 1.0, 99.0, 1.0]))
    assert third.values.tolist() == pytest.approx([1.5, 301 / 100])


@pytest.mark.parametrize("further", [{}, {"scope": "network"}, {"channels": 4}])
def test_a_loss_rises_less_where_its_curvature_counts(module, further):
    """By its second-order expansion, which is what the weighted error is."""
    importance = {p: w.detach().relu() ** 4 for p, w in module.named_parameters()}

    def risen(**arguments):
        shared = copy.deepcopy(module)
        share_weights(shared, 2, **further, **arguments)
        pairs = zip(shared.named_parameters(), module.parameters(), strict=True)
        return sum(float((importance[p] * (a - b).detach() ** 2).sum()) for (p, a), b in pairs)

    assert risen(importance=importance) < 0.8 * risen()


def test_weights_without_importance_are_not_put_anywhere():
    torch.manual_seed(0)
    weight = torch.randn(1000)
    importance = torch.zeros(1000)
    importance[:10] = 1.0
    book = cluster(weight, 16, importance=importance)
    assert book.distortion < 0.2
    assert cluster(weight, 16, importance=torch.zeros(1000)).distortion == pytest.approx(
        cluster(weight, 16).distortion
    )


def test_importances_that_can_not_be_are_refused_by_name(tiny_net):
    module = tiny_net()
    with pytest.raises(UsageError, match=r"no parameter '0\.wieght'; did you mean '0\.weight'"):
        share_weights(module, 4, importance={"0.wieght": torch.ones(1)})
    with pytest.raises(UsageError, match=r"importance of 0\.weight is of shape \(1,\)"):
        share_weights(module, 4, importance={"0.weight": torch.ones(1)})
    wrong = torch.full_like(module[0].weight, -1.0)
    with pytest.raises(AttarError, match=r"importance of 0\.weight has negative"):
        share_weights(module, 4, importance={"0.weight": wrong})
