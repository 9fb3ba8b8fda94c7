import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from attar.errors import AttarError, UsageError
from attar.share import Vectors, cluster_vectors, share_weights
from attar.share.codebook import pack, unpack


def planted(runs: int, vectors: int, length: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of vectors drawn from a few, and these."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(vectors, length, generator=generator)
    places = torch.cat(
        [torch.arange(vectors), torch.randint(vectors, (runs - vectors,), generator=generator)]
    )
    return few[places].reshape(8, -1), few


@pytest.mark.parametrize("runs", [512, 1 << 16])
def test_a_weight_made_of_few_vectors_is_kept_as_it_is(runs):
    weight, few = planted(runs, 8)
    book = cluster_vectors(weight, Vectors(values=16))
    assert torch.equal(book.values[book.indices.long()].reshape(weight.shape), weight)
    assert torch.equal(book.values, few.unique(dim=0))
    assert book.distortion == 0


def test_the_error_is_that_of_a_good_clustering():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    book = cluster_vectors(weight, Vectors(length=4, values=32))
    runs = weight.reshape(-1, 4).numpy()
    best = KMeans(32, n_init=5, random_state=3).fit(runs).inertia_
    error = float(((book.values[book.indices.long()] - weight.reshape(-1, 4)) ** 2).sum())
    assert error <= 1.05 * best
    assert book.distortion == pytest.approx(error / float((weight**2).sum()), rel=1e-4)


def test_it_loses_less_than_single_values_of_the_same_bits():
    torch.manual_seed(0)
    many, few = nn.Linear(512, 512), nn.Linear(512, 512)
    nn.init.normal_(many.weight)
    few.load_state_dict(many.state_dict())
    _, single = share_weights(many, bits=2)
    _, runs = share_weights(few, bits=2, vectors=Vectors(length=2, values=16))
    assert runs["weight"].bits / runs["weight"].length == single["weight"].bits
    assert runs["weight"].distortion < single["weight"].distortion


def test_runs_of_zeros_stay_zero_and_apart():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 100
    weight[:, 8:24] = 0
    module = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    edit, done = share_weights(module, 4, vectors=Vectors(length=4, values=16))
    assert done["weight"].single is None and done["weight"].values == 16
    assert torch.equal(module.weight == 0, weight == 0)
    module.weight.grad = torch.ones_like(module.weight)
    edit.before_step(module)
    assert (module.weight.grad[:, 8:24] == 0).all() and (module.weight.grad[:, :8] == 1).all()
    with torch.no_grad():
        module.weight[:, 8:24] = 0.5
    assert edit.check(module) == ["weight's zeros are 0.5 now"]


def test_layers_that_are_not_fit_share_single_values_and_it_is_said_why(tiny_net):
    module = nn.Sequential(tiny_net(32), nn.Linear(10, 10), nn.Linear(10, 64), nn.Linear(64, 64))
    with torch.no_grad():
        module[3].weight[3, 5] = 0
    vectors = Vectors(length=9, values=16, layers=("0.*", "1"))
    edit, done = share_weights(module, 4, vectors=vectors)
    assert edit.runs() == {"0.4.weight": 9}, "whole kernels"
    assert done["0.0.weight"].single == "it has 32 runs of 9, fewer than 4 for each of 16 vectors"
    assert done["1.weight"].single == "its outputs have 10 weights each, no multiple of 9"
    assert done["2.weight"].single is None and done["2.weight"].length == 1, "not asked for"
    assert done["0.4.weight"].values == 16 and done["0.4.weight"].length == 9
    kernels = module[0][4].weight.reshape(-1, 9).unique(dim=0)
    assert len(kernels) == 16
    _, again = share_weights(module, 4, vectors=Vectors(length=4, values=16, layers=["3"]))
    assert again["3.weight"].single == (
        "it has zeros beside other weights in a run, and zeros must stay"
    )


def test_tables_of_embeddings_share_runs_of_coordinates():
    torch.manual_seed(0)
    module = nn.Embedding(500, 16, padding_idx=0)
    edit, _ = share_weights(module, 8, vectors=Vectors(length=8, values=64))
    assert len(module.weight.reshape(-1, 8).unique(dim=0)) == 64
    assert (module.weight[0] == 0).all()
    assert edit.codebook(module, "weight").shape == (64, 8)
    assert edit.tensors()["weight"].numel() == 1000 * 6 // 8
    assert edit.summary() == "1 tensors of 64 values, 1 in vectors of 8"


def test_the_same_seed_gives_the_same_vectors():
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    first, second = (cluster_vectors(weight, Vectors(values=16, seed=3)) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.indices, second.indices)


def test_each_weight_of_a_run_weighs_by_itself():
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 8 + [[9.0, 9.0]] * 16) + 1
    importance = torch.tensor([[3.0, 1.0], [1.0, 3.0]] * 8 + [[1.0, 1.0]] * 16)
    book = cluster_vectors(weight, Vectors(length=2, values=2), importance=importance)
    assert book.values.tolist() == [[1.25, 1.25], [10.0, 10.0]]


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 12, 16])
def test_packed_indices_come_back(bits):
    indices = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << bits, 1001))
    packed = pack(indices, bits)
    assert packed.numel() == -(-1001 * bits // 8)
    assert torch.equal(unpack(packed, bits, 1001).long(), indices)


def test_wrong_settings_and_weights_are_refused():
    with pytest.raises(UsageError, match="vectors of length 1"):
        Vectors(length=1)
    with pytest.raises(UsageError, match="2 to 4096 vectors, not 5000"):
        Vectors(values=5000)
    with pytest.raises(UsageError, match=r"vectors\.layers: 'fc' fits no weight"):
        share_weights(nn.Sequential(nn.Linear(8, 8)), 4, vectors=Vectors(layers=["fc"]))
    with pytest.raises(AttarError, match="the tensor has NaN"):
        cluster_vectors(torch.full((64, 64), float("nan")), Vectors(values=16))
