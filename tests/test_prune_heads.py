"""Attention whose heads can be removed: the same answers while whole, and the right ones after."""

import copy
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)

from attar.errors import CheckpointError
from attar.models.base import ModelSpec
from attar.prune import Pruned, RemovalFailed, channel_graph, criteria, prune_channels
from attar.prune.heads import Heads, heads_to_free
from attar.prune.masking import masked, masked_answers
from attar.prune.removal import ChannelsRemoved, removal_of, remove_verified
from attar.prune.window_heads import CosineWindowHeads, GridHeads, WindowHeads
from attar.runtimes import runtimes
from attar.student import Student, load_student, save_student


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter at random, biases and norms too, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.1)
    return module


def free(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    heads_to_free(module).replay(module)
    return module


def rand(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def prune(module: nn.Module, *example: Tensor, **options) -> tuple[Student, Pruned]:
    criterion = criteria.get("magnitude")()
    return prune_channels(Student(module), example, criterion=criterion, ratio=0.5, **options)


def removal_from(student: Student) -> ChannelsRemoved:
    (removal,) = student.find(ChannelsRemoved)
    return removal


def kept(removal: ChannelsRemoved, path: str, dim: int, size: int) -> list[int]:
    gone = set(removal.removed[path][dim])
    return [i for i in range(size) if i not in gone]


def alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-10)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


# --- whole, it answers as what it stands for

HEADS, WIDTH, BATCH, QUERIES, KEYS = 3, 12, 2, 4, 5


def inputs_for(layout: str, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: the `same` tensor, two the same (another as `memory`, or other
    `values`), or all `different`."""
    queries, keys = QUERIES, keys_for(which)

    def one(length: int, seed: int) -> Tensor:
        shape = {"alone": (length,), "first": (BATCH, length), "second": (length, BATCH)}[layout]
        return rand(*shape, WIDTH, seed=seed).requires_grad_()

    q, k, v = one(queries, 1), one(keys, 2), one(keys, 3)
    return {
        "same": (q, q, q), "memory": (q, k, k), "values": (q, q, v), "different": (q, k, v)
    }[which]  # fmt: skip


def keys_for(which: str) -> int:
    return QUERIES if which in ("same", "values") else KEYS


def mask_for(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    rows = (queries, keys) if kind.endswith("2d") else (batch * HEADS, queries, keys)
    hidden = rand(*rows, seed=4) > 0.3
    hidden[..., 0] = False  # something to look at
    return hidden if kind.startswith("bool") else rand(*rows, seed=5).masked_fill(hidden, -1e30)


def padding_for(padded: bool, layout: str, keys: int) -> Tensor | None:
    padding = torch.zeros(1 if layout == "alone" else BATCH, keys, dtype=torch.bool)
    padding[0, -2:] = True
    return (padding[0] if layout == "alone" else padding) if padded else None


def answers_and_gradients(module: nn.Module, inputs, **options) -> list[Tensor]:
    output, weights = module(*inputs, **options)
    found = [output] if weights is None else [output, weights]
    wanted = [*dict.fromkeys(inputs), *module.parameters()]
    loss = sum((x * rand(*x.shape, seed=6)).sum() for x in found)
    return found + list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("layout", ["first", "second", "alone"])
@pytest.mark.parametrize("which", ["same", "memory", "values", "different"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multi_head_attention_answers_as_before(layout, which, bias):
    attention = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=layout == "first")
    attention = lively(attention)
    freed = free(attention)
    assert type(freed) is Heads and shapes(freed) == shapes(attention)
    inputs = inputs_for(layout, which)
    keys, batch = keys_for(which), 1 if layout == "alone" else BATCH
    for padded, mask, weighed in product(
        [False, True],
        ["none", "bool 2d", "float 2d", "bool 3d", "float 3d"],
        [{}, {"average_attn_weights": False}, {"need_weights": False}],
    ):
        options = {
            "key_padding_mask": padding_for(padded, layout, keys),
            "attn_mask": mask_for(mask, batch, QUERIES, keys),
            **weighed,
        }
        found = answers_and_gradients(freed, inputs, **options)
        wanted = answers_and_gradients(attention, inputs, **options)
        assert len(found) == len(wanted)
        assert all(map(alike, found, wanted)), (padded, mask, weighed)


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_causal_mask_with_its_hint(weighed, padded):
    attention = lively(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": weighed}
    options["key_padding_mask"] = padding_for(padded, "first", QUERIES)
    inputs = inputs_for("first", "same")
    found = answers_and_gradients(free(attention), inputs, **options)
    assert all(map(alike, found, answers_and_gradients(attention, inputs, **options)))


@given(*[st.integers(1, 4)] * 5, st.booleans())
@settings(max_examples=40, deadline=None)
def test_attention_of_any_size(heads, width, batch, queries, keys, batch_first):
    attention = lively(nn.MultiheadAttention(heads * width, heads, batch_first=batch_first))
    q, k = rand(batch, queries, heads * width), rand(batch, keys, heads * width, seed=2)
    inputs = (q, k, k) if batch_first else (q.transpose(0, 1), *[k.transpose(0, 1)] * 2)
    with torch.no_grad():
        assert all(map(alike, free(attention)(*inputs), attention(*inputs)))


@pytest.mark.parametrize("weighed", [True, False])
def test_in_training_the_same_weights_are_dropped(weighed):
    attention = lively(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)).train()
    x = rand(BATCH, QUERIES, WIDTH)
    found = []
    for module in (attention, free(attention)):
        torch.manual_seed(0)
        found.append([a for a in module(x, x, x, need_weights=weighed) if a is not None])
    assert all(map(alike, *found))
    if weighed:
        assert (found[1][1] == 0).any()


# --- PyTorch's fused layers don't go around it


@pytest.fixture
def without_fused(monkeypatch):
    """Makes PyTorch's fused attention fail."""

    def fused(*arguments, **options):
        raise AssertionError("the fused layer was called")

    for name in (
        "_transformer_encoder_layer_fwd", "_native_multi_head_attention",
        "_nested_tensor_from_mask",
    ):  # fmt: skip
        monkeypatch.setattr(torch, name, fused)


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
    return lively(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True))


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CALLS = {
    "plain": {},
    "padding": {"src_key_padding_mask": PADDED},
    "mask": {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "causal": {"mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_answers_as_before(call):
    module, x = encoder(), rand(2, 5, 16)
    seen = ~PADDED if call == "padding" else ...  # PyTorch writes zeros where padding is
    with torch.no_grad():
        wanted, found = module(x, **CALLS[call])[seen], free(module)(x, **CALLS[call])[seen]
    assert alike(found, wanted)
    assert alike(free(module)(x, **CALLS[call])[seen], found)  # with gradients


@pytest.mark.parametrize("call", CALLS)
def test_an_encoder_is_not_fused(call, without_fused):
    module, x = encoder(), rand(2, 5, 16)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="the fused layer was called"):
            module(x, **CALLS[call])
        free(module)(x, **CALLS[call])
        free(module.layers[0])(x)
        free(module.layers[0].self_attn)(x, x, x)


@pytest.mark.parametrize("options", [{"norm_first": True}, {"activation": "gelu"}, {"bias": False}])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_of_another_kind_answers_as_before(options):
    module, x = encoder(**options), rand(2, 5, 16)
    with torch.no_grad():
        assert alike(free(module)(x), module(x))


def test_a_decoder_answers_as_before():
    module = lively(nn.TransformerDecoderLayer(16, 4, 24, batch_first=True))
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    given = (rand(2, 5, 16), rand(2, 3, 16, seed=2))
    with torch.no_grad():
        found = free(module)(*given, tgt_mask=causal, tgt_is_causal=True)
        assert alike(found, module(*given, tgt_mask=causal, tgt_is_causal=True))


# --- windows

SHIFTS = [([4, 4], [0, 0]), ([4, 4], [2, 2]), ([2, 4], [1, 2]), ([4, 2], [0, 1]), ([3, 3], [1, 0])]
IMAGES = {"a multiple": (8, 8), "no multiple": (7, 9), "smaller": (3, 2), "one way": (3, 9)}


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize(("window", "shift"), SHIFTS)
@pytest.mark.parametrize("biased", [True, False])
def test_windows_answer_as_before(kind, window, shift, biased):
    attention = kind(12, window, shift, 3, qkv_bias=biased, proj_bias=biased)
    attention = lively(attention)
    if kind is ShiftedWindowAttentionV2:
        attention.logit_scale.data[0] = 9.0  # more than it is let
    freed = free(attention)
    assert type(freed) is (WindowHeads if kind is ShiftedWindowAttention else CosineWindowHeads)
    for size in IMAGES.values():
        x = rand(2, *size, 12).requires_grad_()
        found, wanted = freed(x), attention(x)
        assert alike(found, wanted), size
        direction = rand(*found.shape, seed=2)
        pair = [
            torch.autograd.grad((y * direction).sum(), [x, *module.parameters()])
            for y, module in ((found, freed), (wanted, attention))
        ]
        assert all(map(alike, *pair)), size
    assert alike(freed.get_relative_position_bias(), attention.get_relative_position_bias())


def test_windows_drop_the_same_in_training():
    attention = ShiftedWindowAttention(12, [4, 4], [2, 2], 3, attention_dropout=0.5, dropout=0.3)
    found = []
    for module in (lively(attention).train(), free(attention).train()):
        torch.manual_seed(0)
        found.append(module(rand(2, 7, 9, 12)))
    assert alike(*found) and (found[0] == 0).any()


def test_attention_over_a_grid_answers_as_before():
    attention = lively(RelativePositionalMultiHeadAttention(12, 4, 9))
    freed, x = free(attention), rand(2, 5, 9, 12)
    assert type(freed) is GridHeads
    assert alike(freed(x), attention(x))


# --- heads go whole


class Between(nn.Module):
    """Attention between layers that its input and output leave free."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.attention = attention or nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + mixed).relu().mean(1))


class Alone(nn.Module):
    """Attention whose width is the network's: only heads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def attention_by_hand(m: nn.MultiheadAttention, x: Tensor, heads: list[int]) -> Tensor:
    """Of one sequence, with some of the module's heads, element by element."""
    size, total = 8, m.out_proj.bias.clone()
    rows = [total.clone() for _ in range(len(x))]
    w, b = m.in_proj_weight.view(3, 4, size, 32), m.in_proj_bias.view(3, 4, size)
    for h in heads:
        q, k, v = ([w[i, h] @ token + b[i, h] for token in x] for i in range(3))
        out = m.out_proj.weight[:, h * size : (h + 1) * size]
        for i in range(len(x)):
            scores = torch.stack([(q[i] * k[j]).sum() / size**0.5 for j in range(len(x))]).exp()
            rows[i] += sum(out @ v[j] * scores[j] / scores.sum() for j in range(len(x)))
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [0, 3], [2]])
def test_without_some_heads_it_answers_as_the_others_by_hand(heads):
    module, x = lively(Alone()), rand(2, 5, 32)
    freed = free(module)
    graph = channel_graph(freed, (x[:1],))
    (columns,) = [p for p in graph.places if p.path == "attention.out_proj.weight" and p.at == 1]
    gone = [columns.atoms[8 * h] for h in range(4) if h not in heads]
    assert len(graph.prunable()) == 4
    narrow = remove_verified(freed, removal_of(graph, gone), (x,), graph=graph)
    count = len(heads)
    assert shapes(narrow) == {
        "attention.in_proj_weight": (24 * count, 32),
        "attention.in_proj_bias": (24 * count,),
        "attention.out_proj.weight": (32, 8 * count),
        "attention.out_proj.bias": (32,),
    }
    with torch.no_grad():
        found = narrow(x)
        for i in range(len(x)):
            assert alike(found[i], attention_by_hand(module.attention, x[i], heads))


def test_the_smallest_heads_go():
    module = lively(Alone())
    with torch.no_grad():
        module.attention.in_proj_weight.view(3, 4, 8, 32)[:, 1:3] *= 0.01
        module.attention.out_proj.weight.view(32, 4, 8)[:, 1:3] *= 0.01
    x = rand(2, 5, 32)
    student, pruned = prune(module, x)
    assert pruned.widths["attention.in_proj_weight"] == (96, 48)
    with torch.no_grad():
        assert alike(student.module(x)[1], attention_by_hand(module.attention, x[1], [0, 3]))


def test_averaged_weights_are_of_the_heads_that_stay():
    class Weights(Alone):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.attention(x, x, x)

    module, x = lively(Weights()), rand(2, 5, 32)
    student, _ = prune(module, x)
    rows = kept(removal_from(student), "attention.in_proj_weight", 0, 96)
    heads = [i // 8 for i in rows[:16:8]]
    with torch.no_grad():
        _, every = module.attention(x, x, x, average_attn_weights=False)
        assert alike(student.module(x)[1], every[:, heads].mean(1))


def answers_as_masked(module: nn.Module, student: Student, x: Tensor) -> bool:
    freed, removal = free(module), removal_from(student)
    graph = channel_graph(freed, (x[:1],))
    (wanted,) = masked_answers(masked(freed, removal), removal, (x,), graph)
    with torch.no_grad():
        return alike(student.module(x), wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_half_the_heads_and_half_the_width_go(bias):
    module = lively(Between(nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)))
    x = rand(3, 5, 6)
    student, _ = prune(module, x)
    attention = student.module.attention
    assert attention.head_dim == 8
    assert attention.in_proj_weight.shape == (3 * 2 * 8, 16)
    assert attention.out_proj.weight.shape == (16, 2 * 8)
    assert bias == (attention.in_proj_bias is not None)
    assert answers_as_masked(module, student, x)


def test_a_narrow_module_says_its_heads_and_its_width():
    attention = prune(lively(Between()), rand(2, 5, 6))[0].module.attention
    assert (attention.num_heads, attention.embed_dim) == (2, 16)
    assert (attention.out_proj.in_features, attention.out_proj.out_features) == (16, 16)


def test_the_width_can_go_while_heads_stay():
    module, x = lively(Between()), rand(3, 5, 6)
    student, _ = prune(module, x, exclude=["attention.in_proj_weight"])
    attention = student.module.attention
    assert attention.in_proj_weight.shape == (96, 16) and attention.head_dim == 8
    assert attention.out_proj.weight.shape == (16, 32)
    assert answers_as_masked(module, student, x)


class Windows(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 32, 2, 2), block, nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("kind", [SwinTransformerBlock, SwinTransformerBlockV2])
def test_half_the_heads_of_windows_go(kind):
    module = lively(Windows(kind(32, 4, [2, 2], [1, 1], stochastic_depth_prob=0.0)))
    x = rand(2, 3, 10, 12)
    student, _ = prune(module, x)
    attention = student.module.block.attn
    assert attention.head_dim == 8
    assert attention.qkv.weight.shape == (3 * 2 * 8, 16)
    assert attention.proj.weight.shape == (16, 2 * 8)
    if kind is SwinTransformerBlock:
        assert attention.relative_position_bias_table.shape == (9, 2)
    else:
        assert attention.logit_scale.shape == (2, 1, 1)
        assert attention.cpb_mlp[2].out_features == 2
    assert answers_as_masked(module, student, x)


def test_half_the_heads_over_a_grid_go():
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 32), nn.Linear(32, 5)
            self.attention = RelativePositionalMultiHeadAttention(32, 8, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(self.embed(x)).mean((1, 2)))

    module, x = lively(Grid()), rand(2, 3, 9, 6)
    student, _ = prune(module, x)
    attention = student.module.attention
    assert attention.to_qkv.weight.shape == (3 * 2 * 8, 16)
    assert attention.merge.weight.shape == (16, 2 * 8)
    assert attention.relative_position_bias_table.shape == (25, 2)
    assert (attention.head_dim, attention.scale_factor) == (8, 32**-0.5)
    assert answers_as_masked(module, student, x)


def test_an_encoder_with_padding_is_pruned():
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 32), nn.Linear(32, 3)
            layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
            x = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
            return self.head(x[:, 0])

    module = lively(Sentences())
    tokens = torch.arange(10).view(2, 5)
    student, pruned = prune(module, tokens, PADDED)
    assert pruned.widths["encoder.layers.1.self_attn.in_proj_weight"] == (96, 48)
    with torch.no_grad():
        short = student.module(tokens[1:, :3], PADDED[1:, :3])
        assert alike(student.module(tokens, PADDED)[1:], short)


# --- what is left as it was


def test_attention_that_loses_nothing_keeps_its_class(tmp_path):
    def make() -> nn.Module:
        return lively(nn.Sequential(Between(), nn.Unflatten(1, (1, 5)), Fixed()))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    student, _ = prune(make(), rand(2, 5, 6), exclude=["2.attention", "0.head"])
    assert type(student.module[0].attention) is Heads
    assert type(student.module[2].attention) is nn.MultiheadAttention
    assert student.edits[0].head_dims == {"0.attention": 8}
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=no_spec, module=make())
    assert type(loaded.module[2].attention) is nn.MultiheadAttention


def test_nothing_is_freed_where_nothing_goes():
    student, _ = prune(lively(Between()), rand(2, 5, 6), exclude=["*"])
    assert student.edits == [] and type(student.module.attention) is nn.MultiheadAttention


class Mine(nn.MultiheadAttention):
    """A person's own, whose code may do anything."""


VARIANTS = {
    "a subclass": lambda: Mine(32, 4, batch_first=True),
    "other keys": lambda: nn.MultiheadAttention(32, 4, kdim=16, batch_first=True),
    "other values": lambda: nn.MultiheadAttention(32, 4, vdim=16, batch_first=True),
    "a key of its own": lambda: nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True),
    "a zero": lambda: nn.MultiheadAttention(32, 4, add_zero_attn=True, batch_first=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_attention_of_another_kind_is_not_freed(name):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = VARIANTS[name]()
            self.embed, self.hidden = nn.Linear(6, 32), nn.Linear(32, 24)
            self.key = nn.Linear(6, self.attention.kdim)
            self.value = nn.Linear(6, self.attention.vdim)
            self.head = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            mixed, _ = self.attention(self.embed(x), self.key(x), self.value(x), need_weights=False)
            return self.head(self.hidden(mixed).relu().mean(1))

    module, x = lively(Wide()), rand(2, 5, 6)
    assert not heads_to_free(module).head_dims
    student, pruned = prune(module, x)
    assert type(student.module.attention) is type(module.attention)
    assert [e.kind for e in student.edits] == ["channels-removed"]
    assert pruned.widths["hidden"] == (24, 16) and answers_as_masked(module, student, x)
    whole = {layer for layer, (before, after) in pruned.widths.items() if before == after}
    assert "head" in whole
    assert all(pruned.kept.get(layer) for layer in whole)


# --- saved and loaded


def no_spec(spec: ModelSpec) -> nn.Module:
    raise AssertionError("a handed-in module needs no spec")


def fresh(spec: ModelSpec) -> nn.Module:
    assert spec.model == "between"
    return Between()


def pruned_student() -> Student:
    student = Student(lively(Between()).float(), ModelSpec(model="between"))
    return prune_channels(
        student, (rand(2, 5, 6).float(),), criterion=criteria.get("magnitude")(), ratio=0.5
    )[0]


def test_a_loaded_student_answers_the_same(tmp_path):
    student, x = pruned_student(), rand(2, 5, 6).float()
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=fresh)
    assert [e.kind for e in loaded.edits] == ["heads-freed", "channels-removed"]
    assert type(loaded.module.attention) is Heads
    with torch.no_grad():
        assert torch.equal(loaded.module(x), student.module(x))


def test_a_student_pruned_again_is_freed_once(tmp_path):
    student, x = pruned_student(), rand(2, 5, 6).float()
    student, _ = prune_channels(student, (x,), criterion=criteria.get("magnitude")(), ratio=0.5)
    assert [e.kind for e in student.edits] == ["heads-freed"] + ["channels-removed"] * 2
    assert student.module.attention.in_proj_weight.shape == (24, 8)
    save_student(student, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path, build=fresh).module(x), student.module(x))


def refused(folder: Path, build=fresh) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_student(folder, build=build)
    assert "\n" not in str(caught.value) and "Error" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "the record of freed heads is damaged"),
        ({"head_dims": ["attention"]}, "the record of freed heads is damaged"),
        ({"head_dims": {"attention": "wide"}}, "the record of freed heads is damaged"),
        ({"head_dims": {"attention": None}}, "the record of freed heads is damaged"),
        ({"head_dims": {"attention": 0}}, "attention: its heads were 0 wide, and are 8 here"),
        ({"head_dims": {"attention": 16}}, "attention: its heads were 16 wide, and are 8 here"),
        ({"head_dims": {"attentive": 8}}, "attentive, which the network doesn't have"),
        ({"head_dims": {"head": 8}}, "head, which is a Linear here"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, fields, said):
    save_student(pruned_student(), tmp_path)
    record = json.loads((tmp_path / "student.json").read_text())
    record["edits"][0] = {"kind": "heads-freed", **fields}
    (tmp_path / "student.json").write_text(json.dumps(record))
    assert said in refused(tmp_path)


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        (lambda: nn.Linear(32, 32), "attention, which is a Linear here"),
        (lambda: Mine(32, 4, batch_first=True), "attention, which is a Mine here"),
        (lambda: nn.MultiheadAttention(32, 8), "were 8 wide, and are 4 here"),
    ],
)
def test_another_network_is_refused(tmp_path, attention, said):
    save_student(pruned_student(), tmp_path)
    assert said in refused(tmp_path, lambda spec: Between(attention()))


# --- exported


def test_the_narrow_network_runs_in_onnx_runtime(tmp_path):
    student, runtime = pruned_student(), runtimes.get("onnxruntime")()
    runtime.export(
        student,
        tmp_path,
        example=(rand(2, 5, 6).float(),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        names=(["tokens"], ["logits"]),
    )
    x = rand(7, 5, 6, seed=3).float()
    (found,) = runtime.session(tmp_path)(x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, student.module(x).numpy(), rtol=0, atol=1e-4)


def test_the_narrow_network_is_read_by_torch_export():
    student = pruned_student()
    shape = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2, max=64)},)
    program = torch.export.export(student.module, (rand(2, 5, 6).float(),), dynamic_shapes=shape)
    x = rand(3, 9, 6, seed=3).float()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), student.module(x))


# --- over channels: those that stay, not zeros


def layer_norm(x: Tensor, m: nn.LayerNorm, stay: list[int]) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt() * m.weight[stay] + m.bias[stay]


def rms_norm(x: Tensor, m: nn.RMSNorm, stay: list[int]) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt() * m.weight[stay]


def group_norm(x: Tensor, m: nn.GroupNorm, stay: list[int]) -> Tensor:
    """Of (batch, positions, channels): over both."""
    x = x - x.mean((1, 2), keepdim=True)
    x = x / (x.square().mean((1, 2), keepdim=True) + m.eps).sqrt()
    return x * m.weight[stay] + m.bias[stay]


class LastFirst(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class Standard(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.var(-1, keepdim=True))


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def variance(x: Tensor) -> Tensor:
    squares = (x - x.mean(-1, keepdim=True)).square()
    return squares.sum(-1, keepdim=True) / (x.shape[-1] - 1)


OVER = {
    "layer norm": (lambda: nn.LayerNorm(32), layer_norm),
    "rms norm": (lambda: nn.RMSNorm(32, eps=1e-3), rms_norm),
    "group norm": (lambda: LastFirst(1, 32), group_norm),
    "mean": (Centred, lambda x, m, stay: x - x.sum(-1, keepdim=True) / len(stay)),
    "variance": (Standard, lambda x, m, stay: x / (1 + variance(x))),
    "length": (Unit, lambda x, m, stay: x / x.square().sum(-1, keepdim=True).sqrt()),
}


@pytest.mark.parametrize("name", OVER)
def test_what_computes_over_channels_does_so_over_those_that_stay(name):
    make, by_hand = OVER[name]
    module = lively(nn.Sequential(nn.Linear(6, 32), make(), nn.Linear(32, 5)))
    x = rand(3, 4, 6)
    student, pruned = prune(module, x)
    assert pruned.widths == {"0": (32, 16), "2": (5, 5)}
    removal = removal_from(student)
    stay = kept(removal, "0.weight", 0, 32)
    first, norm, last = module
    with torch.no_grad():
        hidden = by_hand(x @ first.weight[stay].T + first.bias[stay], norm, stay)
        wanted = hidden @ last.weight[:, stay].T + last.bias
        found = student.module(x)
    assert alike(found, wanted)

    graph = channel_graph(module, (x[:1],))
    (answers,) = masked_answers(masked(module, removal), removal, (x,), graph)
    assert alike(answers, wanted)
    if name != "length":  # to which zeros add nothing
        with pytest.raises(RemovalFailed, match="doesn't answer as the masked one"):
            remove_verified(module, removal, (x,))  # which is over zeros, without the graph
