"""How a transformer's queries, keys and values relate to one another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from attar.data.base import Batch
from attar.distill.criterion import Criterion, criteria, wide
from attar.distill.divergence import divergence
from attar.distill.relations import full_precision
from attar.distill.signal import Signal
from attar.errors import UsageError

Relation = Literal[
    "query-query", "query-key", "query-value",
    "key-query", "key-key", "key-value",
    "value-query", "value-key", "value-value",
]  # fmt: skip


class Projections(BaseModel):
    """Paths of an attention's query, key and value projections. One bare path stands for a layer
    that gives all three, side by side in this order.

    Example:
        >>> Projections.model_validate("blocks.11.attn.qkv").fused
        True
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    query: str
    key: str
    value: str

    @model_validator(mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return {"query": value, "key": value, "value": value} if isinstance(value, str) else value

    @property
    def fused(self) -> bool:
        """Whether one layer gives all three."""
        return self.query == self.key == self.value

    @property
    def paths(self) -> tuple[str, str, str]:
        return self.query, self.key, self.value


class Attentions(BaseModel):
    """A layer's projections in both networks. Bare projections are the same in both.

    Example:
        >>> Attentions.model_validate("attn.qkv").teacher.value
        'attn.qkv'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: Projections
    teacher: Projections

    @model_validator(mode="before")
    @classmethod
    def _same_paths(cls, value: Any) -> Any:
        same = isinstance(value, str) or (
            isinstance(value, dict) and value.keys() & Projections.model_fields.keys()
        )
        return {"student": value, "teacher": value} if same else value


@criteria.register("minilm")
class MiniLM(Criterion):
    """Self-attention relations: how a layer's queries, keys and values relate, token to token.

        L = mean over layers of Σ over relations of
            mean over examples, heads and tokens i of KL(R_T[i] ‖ R_S[i])
        R = softmax over the tokens j of a_i · b_j / √d,  d the width of a head

    for a and b two of the query, key and value projections' outputs, tokens (N, T, D). Widths and
    the networks' own heads may differ: the D numbers are cut into `heads` relation heads anew. One
    layer is usual: the student's last, and of the teacher's the last or, where it is large, one
    above its middle. Padding counts as tokens.

    layers: `{student: {query: path, key: path, value: path}, teacher: {…}}`; a bare path is a layer
    that gives all three side by side (timm's `blocks.11.attn.qkv`), and what is given once is the
    same in both. Projections must be layers: those of `nn.MultiheadAttention` are not. heads: how
    many, a divisor of both widths. relations: `[query-query, key-key, value-value]`, MiniLMv2;
    `[query-key, value-value]` with the networks' own heads, as many in both, is MiniLM.

    Source: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for
    Compressing Pretrained Transformers", section 3; Wang et al. 2020, "MiniLM: Deep Self-Attention
    Distillation", section 3.

    Example:
        >>> minilm = MiniLM(layers=[{"student": "blocks.5.attn.qkv", "teacher": {
        ...     "query": "attn.q", "key": "attn.k", "value": "attn.v"}}], heads=24)
        >>> loss = minilm(own, wanted)  # doctest: +SKIP
    """

    class Settings(Criterion.Settings):
        layers: list[Attentions] = Field(min_length=1)
        heads: int = Field(12, ge=1)
        relations: list[Relation] = Field(["query-query", "key-key", "value-value"], min_length=1)

    settings: Settings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        layers = self.settings.layers
        self.student_layers = _each(one.student for one in layers)
        self.teacher_layers = _each(one.teacher for one in layers)

    def forward(self, student: Signal, teacher: Signal, batch: Batch | None = None) -> Tensor:
        losses = []
        for layer in self.settings.layers:
            own = self._heads(student, layer.student)
            wanted = self._heads(teacher, layer.teacher)
            for relation in self.settings.relations:
                a, _, b = relation.partition("-")
                q, p = _relation(own[a], own[b]), _relation(wanted[a], wanted[b])
                if p.shape != q.shape:
                    raise UsageError(
                        f"the student's attention relates {q.shape[-1]} tokens and the teacher's "
                        f"{p.shape[-1]}: relations can only be compared one to one"
                    )
                losses.append(divergence(p, q))
        return torch.stack(losses).sum() / len(self.settings.layers)

    def _heads(self, signal: Signal, projections: Projections) -> dict[str, Tensor]:
        """Each of query, key and value as (N, heads, T, width of a head)."""
        found = [wide(signal.features[path]) for path in projections.paths]
        if projections.fused:
            _require(found[0], 3, f"query, key and value of {projections.query!r}")
            found = list(found[0].chunk(3, -1))
        for path, tokens in zip(projections.paths, found, strict=True):
            _require(tokens, self.settings.heads, f"{self.settings.heads} heads of {path!r}")
        return {
            name: tokens.unflatten(-1, (self.settings.heads, -1)).transpose(1, 2)
            for name, tokens in zip(Projections.model_fields, found, strict=True)
        }


def _each(projections: Iterable[Projections]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for one in projections for path in one.paths))


def _require(tokens: Tensor, parts: int, what: str) -> None:
    """Raises `UsageError` unless these are tokens whose width can be cut into so many parts."""
    if tokens.dim() != 3 or tokens.shape[2] % parts:
        raise UsageError(
            f"{what} need tokens (N, T, D) with D a multiple of {parts}, not features of shape "
            f"{tuple(tokens.shape)}"
        )


def _relation(a: Tensor, b: Tensor) -> Tensor:
    """log R, (N, heads, T, T)."""
    with full_precision(a):
        return F.log_softmax(a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5, -1)
