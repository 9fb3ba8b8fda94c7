"""Structured zeros of single weights: N:M along the inputs, and blocks."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import CheckpointError, ConstraintBroken, RecipeError, UsageError
from attar.prune import Masked, criteria, cubic, prune_channels, prune_weights
from attar.prune.patterns import NM, Blocks, parsed_block, parsed_pattern
from attar.prune.weights import left_dense
from attar.quantize import Scheme, quantize
from attar.recipe import load_recipe
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.share import share_weights
from attar.stages.base import Context
from attar.stages.prune import Prune
from attar.student import Student, load_student, save_student
from attar.training.config import Training
from network_fixture import Encoder
from run_fixture import logged, run_recipe, write_recipe

SHAPES = ({0: torch.export.Dim("batch", min=1)},)


class Convolutional(nn.Module):
    """A first layer of one channel, a depthwise, a grouped and a 1x1 convolution, a layer of six
    inputs, and one of sixteen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.narrow, self.wide = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.grouped(self.depthwise(x)))
        return self.head(F.relu(self.wide(F.relu(self.narrow(x)))).mean((2, 3)))


def student_of(network: Any, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    return Student(network())


def prune(student: Student, **options: Any) -> Student:
    criterion = criteria.get(options.pop("criterion", "magnitude"))()
    return prune_weights(student, criterion=criterion, **options)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {path: w.detach() for path, w in module.named_parameters() if w.dim() > 1}


def masked(student: Student) -> Masked:
    (edit,) = student.find(Masked)
    return edit


# -- references, by loops -------------------------------------------------------------------------


def kept_of_group(scores: list[float], n: int) -> list[bool]:
    """The n largest, the earlier first among equals: ranked by counting who goes before."""
    before = [
        sum(b > a or (b == a and j < i) for j, b in enumerate(scores)) for i, a in enumerate(scores)
    ]
    return [rank < n for rank in before]


def nm_by_hand(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    others = [range(size) if d != dim else range(1) for d, size in enumerate(scores.shape)]
    for place in itertools.product(*others):
        for start in range(0, scores.shape[dim], m):
            at = [(*place[:dim], start + i, *place[dim + 1 :]) for i in range(m)]
            kept = kept_of_group([float(scores[i]) for i in at], n)
            for index, stays in zip(at, kept, strict=True):
                mask[index] = stays
    return mask


def blocks_by_hand(matrix: Tensor, rows: int, columns: int, ratio: float) -> Tensor:
    mask = torch.ones(matrix.shape, dtype=torch.bool)
    corners = list(
        itertools.product(range(0, matrix.shape[0], rows), range(0, matrix.shape[1], columns))
    )
    tiles = [(slice(i, i + rows), slice(j, j + columns)) for i, j in corners]
    kept = kept_of_group(
        [float(matrix[t].mean()) for t in tiles], len(tiles) - int(ratio * len(tiles))
    )
    for tile, stays in zip(tiles, kept, strict=True):
        mask[tile] = stays
    return mask


def is_two_four(matrix: Tensor) -> bool:
    """What sparse tensor cores ask of a matrix (out, in): in whole fours, no more than two each."""
    rows, columns = matrix.shape
    return columns % 4 == 0 and all(
        sum(float(matrix[row, start + i]) != 0 for i in range(4)) <= 2
        for row in range(rows)
        for start in range(0, columns, 4)
    )


# -- N:M ------------------------------------------------------------------------------------------

nm = st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@given(
    nm, st.integers(0, 1), st.integers(1, 3), st.integers(1, 4), st.integers(0, 999), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_every_group_keeps_its_n_best(n_m, dim, groups, others, seed, ties):
    n, m = n_m
    shape = (others, groups * m, 2) if dim == 1 else (groups * m, others, 2)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    scores = (3 * scores).round() if ties else scores
    pattern = NM(n, m, dim)
    mask = pattern.mask(scores)
    assert torch.equal(mask, nm_by_hand(scores, n, m, dim))
    assert (mask.movedim(dim, -1).reshape(-1, m).sum(1) == n).all()
    assert pattern.fits(mask) and not pattern.fits(torch.ones_like(mask))
    assert torch.equal(pattern.mask(mask.float()), mask), "what keeps to it stays as it is"


@given(nm, st.integers(2, 4), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_groups_are_pruned_each_by_itself(n_m, groups, seed):
    n, m = n_m
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, groups, m, generator=draw)
    order = torch.randperm(groups, generator=draw)
    mask = NM(n, m).mask(scores.flatten(1)).view(3, groups, m)
    assert torch.equal(
        NM(n, m).mask(scores[:, order].flatten(1)).view(3, groups, m), mask[:, order]
    )


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (lambda: nn.Linear(24, 5), 1),
        (lambda: nn.Conv1d(8, 3, 3), 1),
        (lambda: nn.Conv2d(8, 3, (3, 2)), 1),
        (lambda: nn.Conv2d(8, 6, 1), 1),
        (lambda: nn.Conv2d(16, 4, 3, groups=2), 1),
        (lambda: nn.Conv3d(4, 3, 2), 1),
        (lambda: nn.ConvTranspose2d(8, 3, 3), 0),
        (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), 0),
    ],
)
def test_groups_run_along_the_inputs_of_every_layer(layer, dim):
    module = student_of(layer).module
    weight = module.weight.detach()
    sparse = prune(Student(module), pattern="2:4", floor=1)
    expected = torch.where(nm_by_hand(weight.abs(), 2, 4, dim), weight, 0.0)
    assert torch.equal(sparse.module.weight, expected)
    assert masked(sparse).patterns == {"weight": NM(2, 4, dim)}
    sparse.check()


def test_the_linear_layer_of_transformers_has_its_inputs_first():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = student_of(lambda: conv1d(6, 8)).module
    sparse = prune(Student(module), pattern="2:4").module.weight
    assert sparse.shape == (8, 6) and is_two_four(sparse.detach().T)


def test_a_linear_weight_is_what_sparse_tensor_cores_take():
    sparse = prune(student_of(lambda: nn.Linear(64, 32)), pattern="2:4").module
    weight = sparse.weight.detach()
    assert is_two_four(weight)
    assert int(weight.count_nonzero()) == weight.numel() // 2
    # as they store it: two values of every four, and where these were
    fours = weight.view(32, 16, 4)
    places = [[[i for i in range(4) if four[i]] for four in row] for row in fours.tolist()]
    values = fours.gather(2, torch.tensor(places))
    assert values.shape == (32, 16, 2)
    whole = torch.zeros(32, 16, 4).scatter(2, torch.tensor(places), values).view(32, 64)
    x = torch.randn(5, 64)
    assert torch.equal(F.linear(x, whole, sparse.bias), sparse(x))


def test_a_convolution_is_sparse_at_every_kernel_position():
    weight = prune(student_of(lambda: nn.Conv2d(8, 4, 3)), pattern="2:4").module.weight.detach()
    for i, j in itertools.product(range(3), range(3)):
        assert is_two_four(weight[:, :, i, j])
    assert not is_two_four(weight.flatten(1)), "a filter's row mixes positions and channels"


def test_layers_that_have_no_groups_stay_dense_and_are_named():
    student = student_of(Convolutional)
    sparse = prune(student, pattern="2:4")
    left = left_dense(student, pattern="2:4")
    assert left == {
        "stem": "its outputs read 1 input each, no multiple of 4",
        "depthwise": "its outputs read 1 input each, no multiple of 4",
        "wide": "its outputs read 6 inputs each, no multiple of 4",
    }
    before = weights_of(student.module)
    for path, weight in weights_of(sparse.module).items():
        if path.removesuffix(".weight") in left:
            assert torch.equal(weight, before[path])
        else:
            assert int((weight == 0).sum()) == weight.numel() // 2, path
    assert set(masked(sparse).masks) == {"grouped.weight", "narrow.weight", "head.weight"}


def test_a_grouped_transposed_convolution_reads_one_group_of_inputs():
    assert left_dense(
        student_of(lambda: nn.ConvTranspose2d(12, 4, 3, groups=2)), pattern="2:4"
    ) == {"weight": "its outputs read 6 inputs each, no multiple of 4"}


def test_layers_nobody_knows_and_small_ones_stay_dense():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    net = nn.Sequential(Own(), nn.Linear(4, 3), nn.Linear(4, 4))
    assert left_dense(Student(net), pattern="2:4") == {
        "0": "which dimension of Own holds its inputs is not known",
        "1": "it would keep 6 weights, less than the floor of 8",
    }
    assert set(masked(prune(Student(net), pattern="2:4")).masks) == {"2.weight"}
    assert set(masked(prune(Student(net), pattern="2:4", floor=6)).masks) == {
        "1.weight",
        "2.weight",
    }


def test_of_a_transformer_every_matrix_is_pruned():
    sparse = prune(student_of(Encoder), pattern="1:4")
    weights = weights_of(sparse.module)
    assert set(masked(sparse).patterns) == set(weights)
    assert "attend.in_proj_weight" in weights
    for path, weight in weights.items():
        assert (weight.view(-1, 4).count_nonzero(1) == 1).all(), path
    assert torch.isfinite(sparse.module(torch.randn(2, 1, 8, 8))).all()


@pytest.mark.parametrize("name", ["magnitude-l2", "lamp", "random", "taylor", "fisher", "movement"])
def test_any_criterion_of_weights_decides(name):
    student = student_of(lambda: nn.Linear(16, 8))
    x, y = torch.randn(12, 16), torch.randint(0, 8, (12,))

    def calls():
        for i in range(12):
            yield (x[i : i + 1],), {}, lambda out, i=i: F.cross_entropy(out, y[i : i + 1])

    sparse = prune(student, criterion=name, pattern="3:8", calls=calls)
    criterion = criteria.get(name)()
    if criterion.needs_data:
        criterion.observe(student.module, calls)
    scores = criterion.scores("weight", student.module.weight.detach(), None)
    expected = nm_by_hand(scores, 3, 8, 1)
    assert torch.equal(masked(sparse).masks["weight"], expected)


def test_what_was_masked_before_is_gone_first():
    student = student_of(lambda: nn.Linear(32, 16))
    once = prune(student, ratio=0.6)
    sparse = prune(once, pattern="2:4")
    gone = once.module.weight == 0
    assert (sparse.module.weight[gone] == 0).all()
    scores = once.module.weight.detach().abs()
    for row, start in itertools.product(range(16), range(0, 32, 4)):
        kept = scores[row, start : start + 4].sort(descending=True).values[:2]
        left = sparse.module.weight[row, start : start + 4].abs()
        assert torch.equal(left[left > 0].sort().values, kept[kept > 0].sort().values)
    assert torch.equal(prune(sparse, pattern="2:4").module.weight, sparse.module.weight)
    assert [edit.kind for edit in sparse.edits] == ["masked"]


def test_a_criterion_that_scores_zeros_keeps_none_of_what_was_masked():
    once = prune(student_of(lambda: nn.Linear(32, 16)), ratio=0.6)
    sparse = prune(once, criterion="random", pattern="2:4").module.weight
    left = once.module.weight.view(-1, 4).count_nonzero(1)
    assert torch.equal(sparse.view(-1, 4).count_nonzero(1), left.clamp(max=2))


def test_a_pattern_outlives_further_pruning_and_stricter_ones_follow():
    student = prune(student_of(lambda: nn.Linear(32, 16)), pattern="2:4")
    fewer = prune(student, ratio=0.7)
    assert masked(fewer).patterns == {"weight": NM(2, 4)}
    stricter = prune(student, pattern="1:4")
    assert masked(stricter).patterns == {"weight": NM(1, 4)}
    assert (stricter.module.weight[student.module.weight == 0] == 0).all()
    blocks = prune(student, ratio=0.5, block=(4, 1))
    assert masked(blocks).patterns == {"weight": NM(2, 4)}, "its zeros are no whole blocks"
    blocks.check()


def test_channels_that_go_out_of_groups_break_the_pattern_and_it_is_dropped():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    student = prune(Student(net), pattern="2:4")
    criterion = criteria.get("magnitude")()
    narrow, _ = prune_channels(student, (torch.randn(2, 8),), criterion=criterion, ratio=0.5)
    narrow.check()
    assert masked(narrow).patterns["0.weight"] == NM(2, 4), "it lost outputs only"
    for path in ("2.weight", "4.weight"):
        counts = narrow.module.get_parameter(path).view(-1, 4).count_nonzero(1)
        assert (path in masked(narrow).patterns) == bool((counts <= 2).all())
    assert len(masked(narrow).patterns) < 3


# -- blocks ---------------------------------------------------------------------------------------


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5),
    st.floats(0.05, 0.95), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_blocks_go_as_by_hand(out, inputs, rows, columns, ratio, seed):
    weight = torch.rand(
        out, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    layer = nn.Linear(inputs, out, dtype=torch.float64)
    layer.weight.data = weight + 0.1
    sparse = prune(Student(layer), ratio=ratio, block=(rows, columns), floor=1)
    expected = blocks_by_hand(layer.weight.detach(), rows, columns, ratio)
    assert torch.equal(sparse.module.weight != 0, expected)
    assert masked(sparse).patterns == {"weight": Blocks(rows, columns)}
    sparse.check()
    assert torch.equal(prune(sparse, ratio=ratio, block=(rows, columns), floor=1).module.weight,
                       sparse.module.weight)  # fmt: skip


def test_a_convolution_is_a_matrix_of_filters():
    module = student_of(lambda: nn.Conv2d(3, 10, 3)).module
    sparse = prune(Student(module), ratio=0.5, block=(4, 2)).module.weight.detach()
    expected = blocks_by_hand(module.weight.detach().abs().reshape(10, 27), 4, 2, 0.5)
    assert torch.equal(sparse.reshape(10, 27) != 0, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_turned(groups):
    module = student_of(lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=groups)).module
    sparse = prune(Student(module), ratio=0.4, block=(2, 3)).module.weight.detach()

    def matrix(weight: Tensor) -> Tensor:
        rows = [weight[:, o].reshape(-1) for o in range(weight.shape[1])]
        return torch.stack(rows)

    expected = blocks_by_hand(matrix(module.weight.detach().abs()), 2, 3, 0.4)
    assert torch.equal(matrix(sparse) != 0, expected)


def test_blocks_of_one_weight_are_single_weights():
    student = student_of(Convolutional)
    single, blocks = prune(student, ratio=0.6), prune(student, ratio=0.6, block=(1, 1))
    for path, mask in masked(single).masks.items():
        assert torch.equal(masked(blocks).masks[path], mask)


def test_a_block_may_be_larger_than_a_layer():
    student = student_of(lambda: nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 4)))
    sparse = prune(student, ratio=0.5, block=(10**9, 8)).module
    assert int((sparse[0].weight == 0).all(0).sum()) == 32
    assert (sparse[1].weight != 0).all(), "one block: half of it is none"


def test_an_edge_is_not_what_goes_first():
    layer = nn.Linear(8, 10)
    layer.weight.data = torch.full((10, 8), 1.0)
    layer.weight.data[8:] = 1.5
    sparse = prune(Student(layer), ratio=0.5, block=(4, 1)).module.weight
    assert (sparse[8:] != 0).all(), "two weights of 1.5 count more than four of 1"


def test_globally_the_share_is_of_all_blocks():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    with torch.no_grad():
        module[0].weight[:, 4:] *= 0.001
    sparse = prune(Student(module), ratio=0.6, scope="global", block=(4, 2))
    gone = [int((m.weight.view(-1, 4, 16, 2) == 0).all(3).all(1).sum()) for m in sparse.module]
    assert sum(gone) == pytest.approx(0.6 * (128 + 64), abs=1)
    assert gone[0] > 0.7 * 128 and gone[1] < 0.5 * 64


def test_a_threshold_is_for_a_blocks_mean():
    module = student_of(lambda: nn.Linear(8, 8)).module
    sparse = prune(Student(module), criterion="threshold", threshold=0.17, block=(2, 2))
    means = module.weight.detach().abs().view(4, 2, 4, 2).mean((1, 3))
    kept = (sparse.module.weight != 0).view(4, 2, 4, 2).all(3).all(1)
    assert torch.equal(kept, means >= 0.17)
    assert 0 < int(kept.sum()) < 16


def test_a_tensor_keeps_blocks_of_its_floor_together():
    layer = nn.Linear(4, 6)
    layer.weight.data = torch.rand(6, 4) + 0.1
    layer.weight.data[4:] += 1
    sparse = prune(Student(layer), criterion="threshold", threshold=1e9, floor=9, block=(4, 4))
    assert int(sparse.module.weight.count_nonzero()) == 24, "the edge has 8, so both stay"
    sparse = prune(Student(layer), criterion="threshold", threshold=1e9, floor=8, block=(4, 4))
    assert int(sparse.module.weight.count_nonzero()) == 8


def test_blocks_grow_in_steps_and_take_what_is_gone_along():
    student = student_of(lambda: nn.Linear(32, 32))
    shares = cubic(0.8, 4)
    before = torch.zeros(32, 32, dtype=torch.bool)
    for share in shares:
        student = prune(student, ratio=share, block=(4, 4))
        zero = student.module.weight == 0
        assert (zero | ~before).all(), "what was gone stays gone"
        assert int(zero.sum()) == 16 * int(share * 64)
        with torch.no_grad():
            student.module.weight[~zero] *= torch.rand(int((~zero).sum())) + 0.5
        before = zero


def test_masked_weights_count_as_zeros_in_their_block():
    layer = nn.Linear(8, 2)
    layer.weight.data = torch.tensor([[1.0, 9, 2, 2, 3, 3, 9, 4], [9.0, 1, 2, 2, 3, 3, 9, 4]])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = mask[0, 7] = False
    with torch.no_grad():
        once = Student(layer).edited(Masked({"weight": mask}))
    sparse = prune(once, ratio=0.5, block=(2, 2), floor=1).module.weight
    expected = torch.tensor([[0, 0, 0, 0, 3, 3, 9, 0], [0, 0, 0, 0, 3, 3, 9, 4.0]])
    assert torch.equal(sparse, expected), "a block with a masked weight may still count most"


# -- promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"pattern": "2:4"}, {"ratio": 0.5, "block": (4, 1)}])
@pytest.mark.parametrize("network", [Convolutional, Encoder])
def test_zeros_survive_training_storage_and_sharing(how, network, tmp_path):
    student = prune(student_of(network), **how)
    zeros = {path: w == 0 for path, w in weights_of(student.module).items()}
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=0.01, weight_decay=0.1)
    before, after = student.hooks()
    for _ in range(3):
        optimizer.zero_grad()
        student.module(torch.randn(8, 1, 8, 8)).square().sum().backward()
        before(student.module)
        optimizer.step()
        after(student.module)
        student.check()
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=None, module=network())
    assert masked(loaded).patterns == masked(student).patterns != {}
    edit, _ = share_weights(loaded.module, 3, [])
    shared = loaded.edited(edit)
    shared.check()
    for path, weight in weights_of(shared.module).items():
        assert torch.equal(weight == 0, zeros[path]), path


def test_int8_keeps_two_of_four_exactly_in_the_exported_file(tmp_path):
    student = prune(student_of(Convolutional), pattern="2:4")
    student.module.eval()
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    small = quantize(
        student,
        Scheme(weight_bits=7, observer="minmax"),
        ((part,) for part in images.split(32)),
        example=(images[:2],),
        dynamic_shapes=SHAPES,
    )
    small.check()
    OnnxRuntime().export(
        small, tmp_path, example=(images[:2],), dynamic_shapes=SHAPES, names=(["input"], ["logits"])
    )
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = [numpy_helper.to_array(t) for t in graph.initializer]
    integers = {w.shape: w for w in stored if w.dtype == np.int8 and w.ndim > 1}
    for path in ("grouped.weight", "narrow.weight", "head.weight"):
        weight = weights_of(small.module)[path].numpy()
        found = integers.get(weight.shape)
        found = integers[weight.shape[::-1]].T if found is None else found
        assert not found[weight == 0].any(), path
        assert (np.count_nonzero(np.moveaxis(found, 1, -1).reshape(-1, 4), axis=1) <= 2).all(), path
        assert np.count_nonzero(found) > 0.4 * found.size, path


def test_broken_promises_are_noticed():
    student = prune(student_of(lambda: nn.Linear(16, 8)), pattern="2:4")
    grown = student.copy()
    with torch.no_grad():
        grown.module.weight[0] += 1e-3
    with pytest.raises(ConstraintBroken, match="8 masked weights of weight are no longer zero"):
        grown.check()
    mask = masked(student).masks["weight"].clone()
    mask[0, :4] = True
    edit = Masked({"weight": mask}, {"weight": NM(2, 4)})
    with pytest.raises(ConstraintBroken, match="the zeros of weight are not 2:4 as promised"):
        Student(student.module, None, [edit]).check()
    holes = Masked({"weight": mask}, {"weight": Blocks(4, 1)})
    with pytest.raises(ConstraintBroken, match="are not blocks of 4x1 as promised"):
        Student(student.module, None, [holes]).check()


def test_the_record_only_gains_keys():
    plain = masked(prune(student_of(Encoder), ratio=0.5)).to_json()
    assert set(plain) == {"shapes"}
    record = masked(prune(student_of(lambda: nn.Linear(8, 4)), pattern="2:4")).to_json()
    assert record == {
        "shapes": {"weight": [4, 8]},
        "patterns": {"weight": {"pattern": "2:4", "dim": 1}},
    }
    blocks = masked(prune(student_of(lambda: nn.ConvTranspose1d(4, 4, 2)), ratio=0.5, block=(2, 2)))
    assert blocks.to_json()["patterns"] == {"weight": {"block": [2, 2], "dim": 0}}
    again = Masked.from_json(json.loads(json.dumps(blocks.to_json())), blocks.tensors())
    assert again.patterns == blocks.patterns
    assert blocks.summary() == "16 of 32 weights masked, blocks of 2x2 in 1 tensor"


@pytest.mark.parametrize(
    "patterns",
    [
        {"weight": {"pattern": "4:2", "dim": 1}},
        {"weight": {"pattern": "2:4", "dim": 2}},
        {"weight": {"pattern": "2:4"}},
        {"weight": {"block": [0, 4], "dim": 1}},
        {"weight": 7},
        {"other": {"pattern": "2:4", "dim": 1}},
        [1],
    ],
)
def test_a_damaged_record_is_refused(patterns):
    edit = masked(prune(student_of(lambda: nn.Linear(8, 4)), pattern="2:4"))
    with pytest.raises(CheckpointError, match="damaged"):
        Masked.from_json({**edit.to_json(), "patterns": patterns}, edit.tensors())


# -- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "ratio": 0.5}, "takes no ratio"),
        ({"pattern": "2:4", "threshold": 0.5}, "takes no ratio"),
        ({"pattern": "2:4", "scope": "global"}, "global scope"),
        ({"pattern": "2:4", "block": (4, 1)}, "give one of the two"),
        ({"block": (4, 1)}, "exactly one"),
        ({"block": (0, 4), "ratio": 0.5}, "whole numbers from 1"),
        ({"pattern": "4:2"}, "N from 1 and less than M"),
        ({"pattern": "2:5"}, r"2:5 leaves every layer dense \(0: its outputs read 8 inputs each"),
        ({"pattern": "2:4", "criterion": "activation"}, "use granularity: channel"),
        ({"pattern": "2:4", "exclude": ["9"]}, "no layer matches"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        prune(Student(nn.Sequential(nn.Linear(8, 8))), **options)


@pytest.mark.parametrize(
    "text", ["4:2", "4:4", "0:4", "2", "2:4:8", "a:b", "", "-1:4", 4, True, 0.5]
)
def test_what_is_no_pattern(text):
    with pytest.raises(UsageError, match="is not N:M"):
        parsed_pattern(text)


@pytest.mark.parametrize("block", [[0, 4], [4], [4, 1, 1], "41", 4, [1.5, 1], [True, 1], [-1, 2]])
def test_what_is_no_block(block):
    with pytest.raises(UsageError, match=r"is not \[rows, columns\]"):
        parsed_block(block)


@given(nm)
@settings(max_examples=30, deadline=None)
def test_every_pattern_reads_back(n_m):
    n, m = n_m
    assert parsed_pattern(f"{n}:{m}") == n_m
    assert parsed_pattern(60 * n + m) == n_m, "as YAML reads it without quotes"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "2:4", "granularity": "channel"}, "are for granularity: weight"),
        ({"block": [4, 1], "ratio": 0.5, "granularity": "channel"}, "are for granularity: weight"),
        ({"pattern": "2:4", "block": [4, 1]}, "not both"),
        ({"pattern": "2:4", "ratio": 0.5}, "leave ratio: 0.5 out"),
        ({"pattern": "2:4", "ratio": "auto"}, "leave ratio: auto out"),
        ({"pattern": "2:4", "criterion": "threshold", "threshold": 1.0}, "leave threshold and"),
        ({"pattern": "2:4", "scope": "global"}, "leave scope: global out"),
        ({"pattern": "2:4", "schedule": {"cubic": 3}, "recover": {}}, "leave schedule out"),
        ({"pattern": "4:2"}, "is not N:M"),
        ({"pattern": "0:4"}, "is not N:M"),
        ({"block": [0, 4], "ratio": 0.5}, "whole numbers from 1"),
        ({"block": [4, 1]}, "give ratio"),
        ({"pattern": "2:4", "criterion": "activation"}, "scores channels"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message) as error:
        Prune(**{"granularity": "weight", **fields})
    assert len(error.value.errors()) == 1


RECIPE = """\
name: sparse
data: {source: digits, subset: 200}
teacher: {model: digits-small, train: {epochs: 2, batch_size: 32, optimizer: {lr: 0.01}}}
stages:
  - prune: {granularity: weight, pattern: 2:4, recover: {epochs: 1, batch_size: 32}}
budget: {max_drop: 60%}
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("pattern=4:2", "stages[0].prune.pattern (from --set): pattern '4:2' is not N:M"),
        ("block=[0, 4]", "stages[0].prune.block (from --set): block [0, 4] is not [rows, columns]"),
        ("ratio=auto", "stages[0].prune (line 5): pattern 2:4 says how many weights of each group"),
    ],
)
def test_a_recipe_says_it_in_one_sentence(tmp_path, change, said):
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(tmp_path, RECIPE), [f"stages.prune.{change}"])
    assert said in str(error.value) and "\n" not in str(error.value)


# -- the stage ------------------------------------------------------------------------------------


class Bench(Context):
    """A context whose metric is the share of weights left, and whose training moves all weights."""

    def evaluate(self, module: nn.Module, split: str = "validation") -> float:
        weights = weights_of(module).values()
        return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)

    def train(self, student: Student, training: Training, objective=None, **rest: Any) -> Student:
        with torch.no_grad():
            for weight in student.module.parameters():
                weight += 0.01
        student.hooks()[1](student.module)
        return student


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def run(tmp_path: Path, events) -> Bench:
    task = SimpleNamespace(metric=SimpleNamespace(higher_is_better=True))
    return Bench(
        task=task, data=None, teacher=None, seed=0, work=tmp_path, tell=events.append,
        max_drop=0.5, baseline=1.0,
    )  # fmt: skip


def notes(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "note"]


def test_the_stage_says_what_was_done_and_what_stayed_dense(run, events):
    stage = Prune(
        granularity="weight", pattern="2:4", exclude=["narrow"], recover=Training(epochs=1)
    )
    sparse = stage.apply(student_of(Convolutional), run)
    sparse.check()
    assert run.found["weights"] == {
        "grouped": {"weights": 576, "kept": 288, "pattern": "2:4"},
        "head": {"weights": 160, "kept": 80, "pattern": "2:4"},
    }
    assert set(run.found["kept_whole"]) == {"stem", "depthwise", "wide"}
    assert notes(events) == [
        "prune: 2:4 leaves stem, depthwise dense: its outputs read 1 input each, no multiple of 4",
        "prune: 2:4 leaves wide dense: its outputs read 6 inputs each, no multiple of 4",
    ]
    json.dumps(run.found)


def test_the_stage_prunes_blocks_in_steps(run, events):
    stage = Prune(
        granularity="weight", block=[4, 4], ratio=0.6, schedule={"cubic": 3}, recover={"epochs": 3}
    )
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(4, 4), nn.Linear(8, 4))
    sparse = stage.apply(Student(net), run)
    sparse.check()
    assert run.found["weights"]["0"] == {"weights": 256, "kept": 112, "block": [4, 4]}
    assert run.found["weights"]["2"] == {"weights": 32, "kept": 16, "block": [4, 4]}
    assert run.found["kept_whole"] == {"1": "none of its blocks was to go"}
    assert notes(events) == ["prune: block [4, 4] leaves 1 dense: none of its blocks was to go"]


def test_auto_finds_the_share_of_blocks(run):
    stage = Prune(granularity="weight", block=[4, 1], ratio="auto")
    assert stage.searches
    sparse = stage.apply(student_of(lambda: nn.Sequential(nn.Linear(20, 20))), run)
    assert run.found["ratio"] == 0.5
    assert run.found["weights"] == {"0": {"weights": 400, "kept": 200, "block": [4, 1]}}
    assert (sparse.module[0].weight.view(5, 4, 20) != 0).all(1).sum() == 50


def test_a_pattern_lost_with_its_channels_is_said(run, events, monkeypatch):
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))
    student = prune(Student(net), pattern="2:4")
    monkeypatch.setattr("attar.stages.prune._example", lambda run, device: (torch.randn(2, 8),))
    monkeypatch.setattr("attar.stages.prune.calls_of", lambda *a: None)
    Prune(ratio=0.5, round_to=1).apply(student, run)
    assert "prune: the pattern 2:4 no longer holds in 2" in notes(events)


def test_a_whole_run_keeps_two_of_four(tmp_path):
    done = run_recipe(write_recipe(tmp_path, RECIPE), tmp_path / "run")
    row = next(row for row in done.ledger["rows"] if row["stage"] == "prune")
    sparse = {k: w for k, w in weights_of(done.student).items() if w.shape[1] % 4 == 0}
    assert len(sparse) > 1 and row["nonzero"] < 0.6 * row["parameters"]
    for path, weight in sparse.items():
        groups = weight.movedim(1, -1).reshape(-1, 4).count_nonzero(1)
        assert (groups == 2).all(), path
    told = [e["text"] for e in logged(tmp_path / "run", "note") if e["text"].startswith("prune:")]
    assert any("2:4 leaves" in text for text in told)
