"""Attention whose heads can be removed: modules whose code takes the heads' width from the
network's are given code that doesn't.

PyTorch's multi-head attention and torchvision's windows compute `width / heads` wherever they need
a head's width, so with fewer heads, or a narrower network around them, they fail or answer
otherwise. The classes here have the same parameters and give the same answers; a head's width is
their own, and the number of heads is what their weights have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import CheckpointError
from attar.prune.removal import answers_alike
from attar.student.edits import Edit, submodule

GIVEN = "the code of heads was changed in"


class Heads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with heads of a fixed width, as many as its weights have."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of the class it stands for, which see: masks are true (or −∞) where not to look."""
        alone = query.dim() == 2
        first = 1 if alone or not self.batch_first else 0
        packed = query is key and key is value
        q, k, v = self._projected(query, key, value, packed)
        if alone:
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        if first == 1:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if alone else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)
        if first == 1:
            mixed = mixed.transpose(0, 1)
        mixed = mixed.squeeze(1) if alone else mixed
        return self.out_proj(mixed), weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, packed: bool
    ) -> tuple[Tensor, ...]:
        if packed:
            joined = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return joined.chunk(3, -1)
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _mask(
        self, q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Both masks as one to add, broadcast over (batch, heads, queries, keys)."""
        if attention is not None and attention.dim() == 3:  # batch × heads in one
            attention = attention.view(q.shape[0], -1, *attention.shape[1:])
        if padding is not None:
            padding = padding.view(-1, 1, 1, k.shape[2])
        added = [_added(m, q.dtype) for m in (attention, padding) if m is not None]
        return sum(added[1:], added[0]) if added else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


@cache
def _windows() -> dict[type[nn.Module], type[nn.Module]]:
    from attar.prune.window_heads import FREED

    return FREED


def _class_for(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module of attention would be given; `None` where there is none."""
    if type(module) is nn.MultiheadAttention:
        simple = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        return Heads if simple else None
    return _windows().get(type(module))


@dataclass(frozen=True)
class HeadsFreed(Edit):
    """Modules of attention whose code takes any number of heads, in a network of any width.

    head_dims: each module's width of a head, by path.
    """

    kind: ClassVar[str] = "heads-freed"

    head_dims: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"head_dims": dict(self.head_dims)}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> HeadsFreed:
        try:
            return cls({str(path): int(width) for path, width in record["head_dims"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the record of freed heads is damaged: {error}") from None

    def replay(self, module: nn.Module) -> None:
        """Gives those modules their code, in place. Raises `CheckpointError` where they differ."""
        for path, width in self.head_dims.items():
            owner = submodule(module, path, GIVEN)
            kind = _class_for(owner)
            if kind is None:
                raise CheckpointError(f"{GIVEN} {path}, which is a {type(owner).__name__} here")
            if _head_dim(owner) != width:
                raise CheckpointError(
                    f"{GIVEN} {path}: its heads were {width} wide, and are {_head_dim(owner)} here"
                )
            owner.__class__ = kind
            owner.head_dim = width  # type: ignore[assignment]
            if isinstance(owner, Heads):
                owner._qkv_same_embed_dim = False  # PyTorch's fused layer would go around it
        for encoder in module.modules():
            if isinstance(encoder, nn.TransformerEncoder) and _holds_heads(encoder):
                encoder.use_nested_tensor = False  # which its fused layers alone can read

    def within(self, paths: Iterable[str]) -> HeadsFreed:
        """Those of the modules in which one of these parameters lies."""
        touched = tuple(paths)
        return HeadsFreed(
            {
                path: width
                for path, width in self.head_dims.items()
                if any(t.startswith(path + ".") or not path for t in touched)
            }
        )

    def __bool__(self) -> bool:
        return bool(self.head_dims)

    def summary(self) -> str:
        return f"heads freed in {len(self.head_dims)} modules of attention"


def with_free_heads(module: nn.Module, example: tuple[Any, ...]) -> tuple[nn.Module, HeadsFreed]:
    """A copy of the network with attention whose heads can be removed, and what was changed; the
    network itself where there is none, or where it would answer otherwise."""
    freed = heads_to_free(module)
    if not freed.head_dims:
        return module, freed
    free = copy.deepcopy(module)
    freed.replay(free)
    return (free, freed) if answers_alike(module, free, example) else (module, HeadsFreed({}))


def heads_to_free(module: nn.Module) -> HeadsFreed:
    """What would have to be given other code before its heads, or its width, can be pruned."""
    return HeadsFreed(
        {path: _head_dim(m) for path, m in module.named_modules() if _class_for(m) is not None}
    )


def _holds_heads(module: nn.Module) -> bool:
    return any(isinstance(m, Heads) for m in module.modules())


def _head_dim(module: nn.Module) -> int:
    measures: dict[str, Callable[[Any], int]] = {
        "n_heads": lambda m: m.head_dim,
        "embed_dim": lambda m: m.embed_dim // m.num_heads,
        "num_heads": lambda m: m.qkv.out_features // 3 // m.num_heads,
    }
    return next(measure(module) for name, measure in measures.items() if hasattr(module, name))
