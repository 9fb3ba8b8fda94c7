"""Sizes in a network's code: which attributes they are, and that those fall with the channels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.prune import criteria, prune_channels
from attar.prune.groups import channel_graph
from attar.student import Student, load_student, save_student

POSITIONS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Self-attention of a person's own; subclasses say how they get their sizes."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.unit, self.inner = heads, width // heads, width
        self.shape = (-1, heads, width // heads)
        self.qkv, self.out = nn.Linear(12, 3 * width), nn.Linear(width, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.apart(t).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = self.joined(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
        return self.head((x + self.out(mixed)).mean(1))

    def apart(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def joined(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class ByAttribute(Attention):
    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, self.unit).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.reshape(n, length, self.inner)
        return self.head((x + self.out(mixed)).mean(1))


class ByLocal(Attention):
    def forward(self, x: Tensor) -> Tensor:
        heads, inner = self.heads, self.inner
        sizes = x.shape[:-1] + (heads, self.unit)  # noqa: RUF005
        q, k, v = (t.view(sizes).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = torch.reshape(mixed, (*x.shape[:-1], inner))
        return self.head((x + self.out(mixed)).mean(1))


class ByMethod(Attention):
    def apart(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.heads, self.unit)

    def joined(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.inner)


class BySequence(Attention):
    def apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.shape[1:]) if x.dim() < 2 else x.view(len(x), *self.shape)


class ByNothing(Attention):
    def apart(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.unit))


class ByInput(Attention):
    """The width is read off the input, which heads then must go with."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(self.embed(x)).mean(1))

    def mixed(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, -1, self.unit).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(mixed.reshape(n, length, width))


class ByAModule(Attention):
    """Sizes in a method of a module within."""

    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.wide = 4, 32

        def apart(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1, self.count, 8).transpose(1, 2)

        def joined(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(len(x), -1, self.wide)

    def __init__(self) -> None:
        super().__init__()
        self.layout = self.Layout()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.layout.apart(t) for t in self.qkv(x).chunk(3, -1))
        mixed = self.layout.joined(F.scaled_dot_product_attention(q, k, v))
        return self.head((x + self.out(mixed)).mean(1))


class CutByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.parts = 20, (4, 16, 12)
        self.a, self.b = nn.Linear(12, 32), nn.Linear(12, 32)
        self.c, self.d = nn.Linear(20, 24), nn.Linear(12, 24)
        self.e, self.f, self.g = (nn.Linear(n, 24) for n in self.parts)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        y = self.c(a[..., : self.first]) + self.d(a[..., self.first :])
        one, two, three = self.b(x).tanh().split(self.parts, dim=-1)
        y = y * (self.e(one) + self.f(two) + self.g(three)).sigmoid()
        return self.head(y.mean(1))


class CutByNumber(CutByAttribute):
    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        y = self.c(a[..., :20]) + self.d(a[..., 20:])
        one, two, three = self.b(x).tanh().split((4, 16, 12), dim=-1)
        y = y * (self.e(one) + self.f(two) + self.g(three)).sigmoid()
        return self.head(y.mean(1))


def halved(module: nn.Module, x: Tensor = POSITIONS):
    torch.manual_seed(0)
    criterion = criteria.get("magnitude")()
    return prune_channels(Student(module.eval()), (x,), criterion=criterion, ratio=0.5)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize(
    "kind", [ByAttribute, ByLocal, ByMethod, BySequence, ByNothing, ByInput, ByAModule]
)
def test_heads_go_however_the_code_counts_them(kind, tmp_path):
    student, pruned = halved(made(kind))
    assert not pruned.undone
    assert pruned.widths["qkv"] == (96, 48)
    assert student.module.out.in_features == 16
    save_student(student, tmp_path)
    loaded = load_student(tmp_path, build=lambda _: None, module=made(kind))
    longer = torch.randn(3, 7, 12)  # another batch and length than it was pruned with
    assert torch.equal(loaded.module(longer), student.module(longer))


def test_attributes_fall_with_what_they_count():
    attention = halved(made(ByAttribute))[0].module
    assert (attention.heads, attention.unit, attention.inner) == (2, 8, 16)
    assert halved(made(BySequence))[0].module.shape == (-1, 2, 8)
    assert (module := halved(made(ByAModule))[0].module).layout.count == 2
    assert module.layout.wide == 16 and module.heads == 4  # which its code doesn't read


def test_an_attribute_of_the_same_value_is_not_taken_for_a_count():
    class Windows(ByNothing):
        def __init__(self) -> None:
            super().__init__()
            self.window = 4  # as many as there are heads

        def apart(self, x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0, 0, self.window - 1))[:, : x.shape[1]]
            return x.unflatten(-1, (-1, self.unit))

    student, _ = halved(made(Windows))
    assert student.module.window == 4 and student.module.out.in_features == 16


def test_cuts_at_attributes_move():
    student, pruned = halved(made(CutByAttribute))
    module = student.module
    assert module.first == module.c.in_features
    assert pruned.widths["a"] == (32, module.c.in_features + module.d.in_features)
    wide = (module.e.in_features, module.f.in_features, module.g.in_features)
    assert isinstance(module.parts, tuple) and module.parts == wide
    assert pruned.widths["b"] == (32, sum(wide))
    assert all(after < 20 for _, after in (pruned.widths["a"], pruned.widths["b"]))


def test_cuts_at_numbers_stay():
    student, pruned = halved(made(CutByNumber))
    assert pruned.widths["b"] == (32, 32)
    assert "test_prune_sources.py" in pruned.kept["b"] and "fixed place" in pruned.kept["b"]
    assert student.module.c.in_features == 20  # before the cut; after it, all but a floor may go
    assert pruned.widths["a"] == (32, 26) and student.module.d.in_features == 6
    assert "d" in pruned.floored


def test_chunks_with_a_shorter_last_stay_chunks():
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = nn.Linear(12, 38), nn.Linear(9, 3)
            self.last, self.mix = nn.Linear(8, 8), nn.Linear(38, 9)

        def forward(self, x: Tensor) -> Tensor:
            *pieces, last = self.wide(x).chunk(4, -1)  # 10, 10, 10 and 8
            return self.head(self.mix(torch.cat([*pieces, self.last(last)], -1)).mean(1))

    student, _ = halved(made(Uneven))
    wide, last = student.module.wide.out_features, student.module.last.in_features
    assert wide < 26 and wide == -(-wide // 4) * 3 + last


def test_a_width_that_no_narrower_one_suits_stays_and_says_where():
    class Alone(ByInput):
        def __init__(self) -> None:
            super().__init__()
            self.unit = 32  # one head, which can't go

    module = made(Alone)
    _, pruned = halved(copy.deepcopy(module))
    assert pruned.widths["embed"] == (32, 32)
    assert "test_prune_sources.py" in pruned.kept["embed"]


def test_source_that_is_not_at_hand_is_no_failure():
    code = """
class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv, self.out, self.head = nn.Linear(12, 96), nn.Linear(32, 12), nn.Linear(12, 3)
    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.heads, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))
"""
    space = {"nn": nn, "F": F}
    exec(compile(code, "<typed>", "exec"), space)
    module = made(space["Typed"])
    student, pruned = halved(module)
    assert pruned.undone and torch.allclose(student.module(POSITIONS), module(POSITIONS))


def test_a_decoder_s_attention_is_pruned():
    module = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, dropout=0).eval()

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer, self.head = nn.Linear(12, 32), module, nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(self.layer(x, x.flip(1)).mean(1))

    student, pruned = halved(Decoding())
    layer = student.module.layer
    assert pruned.widths["embed"] == (32, 16)
    assert layer.multihead_attn.in_proj_weight.shape == (48, 16)
    assert (layer.multihead_attn.num_heads, layer.multihead_attn.head_dim) == (2, 8)


def test_places_know_their_attribute():
    graph = channel_graph(made(ByAttribute), (POSITIONS[:1],))
    named = {(p.path, p.at) for p in graph.places if isinstance(p.at, str)}
    assert named == {("", "heads"), ("", "inner")}
