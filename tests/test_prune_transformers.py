"""Pruning attention as networks write it: whole heads go, and the answers are the masked ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.prune import criteria, prune_channels, residual_blocks, without_blocks
from attar.prune.exporting import export
from attar.student import Student, load_student, save_student

POSITIONS = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """Self-attention between layers; subclasses weigh values in their own way."""

    heads, kept, unit = 4, 4, 8

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.unit
        self.embed, self.norm = nn.Linear(12, 24), nn.LayerNorm(24)
        self.q = nn.Linear(24, width)
        self.k, self.v = (nn.Linear(24, self.kept * self.unit) for _ in range(2))
        self.out, self.head = nn.Linear(width, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, self.unit)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.head((x + self.out(self.mixed(q, k, v))).mean(1))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class ByProducts(Written):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) / math.sqrt(self.unit)).softmax(-1)
        return torch.matmul(weights, v).transpose(1, 2).flatten(2)


class BySums(Written):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhqd, bhkd -> bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)


class ByBatches(Written):
    """Heads laid into the batch, as older code has them."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = len(q)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return mixed.unflatten(0, (n, -1)).transpose(1, 2).flatten(2)


class Rotated(Written):
    """Positions by rotating pairs of a head's units; norms of queries and keys, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(self.unit) + 0.5)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(q.shape[2])[:, None] / 10 ** torch.arange(self.unit // 2)
        angles = torch.cat([angles, angles], -1)

        def turned(x: Tensor) -> Tensor:
            x = self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            left, right = x[..., : self.unit // 2], x[..., self.unit // 2 :]
            return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return mixed.transpose(1, 2).flatten(2)


class Biased(Written):
    """A bias for each head by how far positions are apart, as a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(self.heads, 11))
        self.register_buffer("apart", torch.arange(6)[:, None] - torch.arange(6) + 5)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table[:, self.apart])
        return mixed.transpose(1, 2).flatten(2)


class Shared(Written):
    """Two heads of queries to each of keys and values."""

    heads, kept = 4, 2

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AcrossChannels(Written):
    """Units attend to units, positions are summed over (cross-covariance attention)."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return (weights @ v).permute(0, 3, 1, 2).flatten(2)


KINDS = [ByProducts, BySums, ByBatches, Rotated, Biased, Shared, AcrossChannels]


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = kind().eval()
    nn.init.uniform_(module.norm.weight, 0.5, 1.5)
    nn.init.normal_(module.norm.bias)
    return module


def halved(module: nn.Module, x: Tensor):
    magnitude = criteria.get("magnitude")()
    return prune_channels(Student(module), (x,), criterion=magnitude, ratio=0.5)


def by_hand(module: Written, heads: list[int]) -> nn.Module:
    """The same with the other heads' weights set to zero."""
    group = module.heads // module.kept
    with torch.no_grad():
        for layer, mine in ((module.q, heads), (module.v, sorted({h // group for h in heads}))):
            for h in set(range(layer.out_features // module.unit)) - set(mine):
                layer.weight[h * module.unit : (h + 1) * module.unit] = 0
                layer.bias[h * module.unit : (h + 1) * module.unit] = 0
        for h in set(range(module.heads)) - set(heads):
            module.out.weight[:, h * module.unit : (h + 1) * module.unit] = 0
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_heads_go_whole_and_the_width_with_its_norm(kind):
    student, pruned = halved(made(kind), POSITIONS)
    module = student.module
    group = kind.heads // kind.kept
    assert not pruned.undone
    assert pruned.widths["embed"] == (24, 16) and module.norm.normalized_shape == (16,)
    heads = module.q.out_features // kind.unit
    assert heads == kind.heads // 2 and module.q.out_features % kind.unit == 0
    assert module.k.out_features == module.v.out_features == heads // group * kind.unit
    assert module.out.in_features == heads * kind.unit


@pytest.mark.parametrize("kind", KINDS)
def test_without_other_heads_the_answers_are_theirs(kind):
    stays = ["embed", "out"]
    student, _ = prune_channels(
        Student(made(kind)),
        (POSITIONS,),
        criterion=criteria.get("magnitude")(),
        ratio=0.5,
        exclude=stays,
    )
    rows = made(kind).q.weight.detach().unflatten(0, (-1, kind.unit))
    left = student.module.q.weight.detach().unflatten(0, (-1, kind.unit))
    heads = [h for h, row in enumerate(rows) if any(torch.equal(row, other) for other in left)]
    assert len(heads) == kind.heads // 2
    wanted = by_hand(made(kind), heads)(POSITIONS)
    assert torch.allclose(student.module(POSITIONS), wanted, atol=1e-5)


def test_a_network_with_one_head_keeps_it():
    class One(ByProducts):
        heads, kept, unit = 1, 1, 32

    student, pruned = halved(made(One), POSITIONS)
    assert student.module.q.out_features == student.module.k.out_features == 32
    assert pruned.widths["embed"] == (24, 16)


# --- networks of the library transformers, from their configurations


def configured(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 100, "num_labels": 3, "pad_token_id": 0,
    }  # fmt: skip
    special = {
        "Bert": {}, "Roberta": {}, "Electra": {"embedding_size": 32},
        "DistilBert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
        "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
        "Llama": {"num_key_value_heads": 2}, "Mistral": {"num_key_value_heads": 2},
        "Qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    }[name]  # fmt: skip
    own = {} if name in ("DistilBert", "GPT2") else sizes
    plain = {k: sizes[k] for k in ("vocab_size", "num_labels", "pad_token_id")}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**plain, **own, **special})
    module = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    for layer in module.modules():
        if isinstance(getattr(layer, "weight", None), nn.Parameter) and layer.weight.dim() == 1:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return module


@pytest.mark.parametrize(
    "name",
    ["Bert", "Llama", *(pytest.param(n, marks=pytest.mark.long) for n in
     ("Roberta", "Electra", "DistilBert", "GPT2", "Mistral", "Qwen3"))],
)  # fmt: skip
def test_transformers_are_halved_saved_and_loaded(name, tmp_path):
    module = configured(name)
    student, pruned = halved(module, IDS)
    size = [sum(p.numel() for p in m.parameters()) for m in (module, student.module)]
    assert not pruned.undone and size[1] < 0.45 * size[0]
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=lambda _: None, module=configured(name))
    longer = torch.randint(3, 90, (3, 21))
    with torch.no_grad():
        assert torch.equal(loaded.module(longer).logits, student.module(longer).logits)


def test_grouped_queries_go_with_their_key():
    module = halved(configured("Llama"), IDS)[0].module
    for layer in module.model.layers:
        attention = layer.self_attn
        assert attention.q_proj.out_features == 2 * attention.k_proj.out_features == 32
        assert attention.v_proj.out_features == attention.k_proj.out_features == 16
        assert attention.o_proj.in_features == 32 and attention.o_proj.out_features == 32
    assert module.model.embed_tokens.weight.shape == (100, 32)


@pytest.mark.parametrize("name", ["Bert", pytest.param("Llama", marks=pytest.mark.long)])
def test_layers_are_blocks_that_can_go(name, tmp_path):
    module = configured(name)
    blocks = residual_blocks(module, (IDS,), export(module, (IDS[:1],)))
    inner = "bert.encoder.layer" if name == "Bert" else "model.layers"
    assert list(blocks) == [f"{inner}.0", f"{inner}.1"]
    student = without_blocks(Student(module), {f"{inner}.0": blocks[f"{inner}.0"]})
    assert not halved(student.module, IDS)[1].undone
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=lambda _: None, module=configured(name))
    with torch.no_grad():
        assert torch.equal(loaded.module(IDS).logits, student.module(IDS).logits)
        assert not torch.equal(module(IDS).logits, student.module(IDS).logits)


TIMM = ["tiny_vit_5m_224", "coatnet_nano_rw_224", "volo_d1_224", "edgenext_xx_small", "dpn48b"]


@pytest.mark.long
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False, num_classes=10).eval()
    x = torch.randn(2, *module.pretrained_cfg["input_size"])
    student, _ = halved(module, x)
    size = [sum(p.numel() for p in m.parameters()) for m in (module, student.module)]
    assert size[1] < 0.45 * size[0]
