"""The stage that lets weights share a few values: what a recipe says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from attar.share import fold_norms
from attar.stages.base import Context, Stage, stages
from attar.stages.recovery import Recovery
from attar.student import Student
from attar.units import parse_size

Bits = Annotated[int, Field(ge=1, le=8)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Method = Literal["kmeans", "dkm", "rate", "hashed"]
OF: dict[str, tuple[Method, ...]] = {
    "bits": ("kmeans", "dkm"),
    "values": ("kmeans",),
    "scope": ("kmeans",),
    "channels": ("kmeans",),
    "importance": ("kmeans",),
    "vectors": ("kmeans",),
    "gradient": ("kmeans",),
    "temperature": ("dkm",),
    "rate": ("rate",),
    "size": ("rate",),
    "norms": ("rate",),
    "ratio": ("hashed",),
}
"""By setting: the methods that it is for. Those that aren't here are for all."""


class SharedVectors(BaseModel):
    """Which layers share runs of weights, and how (product quantization)."""

    model_config = ConfigDict(extra="forbid")

    length: int = Field(4, ge=2)
    """Weights in a run: consecutive inputs of an output, coordinates of an embedding; 9 for whole
    3 × 3 kernels."""
    values: int = Field(256, ge=2, le=4096)
    """Vectors in a tensor's codebook."""
    layers: list[str] = Field(default_factory=lambda: ["*"])
    """Layers or weights meant, by path; `*` stands for anything."""


@stages.register("share")
class Share(Stage):
    """Lets weights share a few values, so that the network packs into a small file.

    `kmeans`: each layer's weights take at most 2**bits values, by optimal k-means, which `recover`
    trains on (Deep Compression, Han et al., ICLR 2016). `dkm`: which weights are one is trained too
    (DKM, Cho et al., ICLR 2022). `rate`: weights lie on a grid and the loss has their entropy in
    it, so that they become zero, equal or cheap as far as the answers allow; the smallest files.
    `hashed`: weights are one by a hash of their positions (HashedNets, Chen et al., ICML 2015).
    Weights pruned to zero stay zero. Which weights are equal no longer changes afterwards.
    """

    name: ClassVar[str] = "share"
    not_after: ClassVar[dict[str, str]] = {
        "quantize": "quantized weights already lie on their grid, and moving them would leave it"
    }
    searched: ClassVar[tuple[str, ...]] = ("bits",)

    method: Method = "kmeans"
    """How it is decided which weights are one: `kmeans`, `dkm`, `rate` or `hashed`."""
    bits: Bits | Literal["auto"] | list[Bits] = 5
    """Of `kmeans` and `dkm`, per index. `auto`: the fewest that keep the budget's `max_drop` on
    validation, at most 8. A list: each is tried, and the smallest file that keeps it is chosen."""
    values: int | None = Field(None, ge=2, le=256)
    """Of `kmeans`: how many values, instead of `bits`."""
    scope: Literal["tensor", "network"] = "tensor"
    """Of `kmeans`: who has a codebook: each `tensor`, or the whole `network` one together."""
    channels: int | None = Field(None, ge=1)
    """Of `kmeans`: so many consecutive output channels of a tensor have a codebook of their own."""
    importance: Literal["fisher"] | None = None
    """Of `kmeans`: weigh each weight's error by how much the task's loss depends on it."""
    vectors: SharedVectors | None = None
    """Of `kmeans`: layers that share runs of weights instead of single ones."""
    gradient: Literal["mean", "sum"] = "mean"
    """Of `kmeans`: what a shared value's gradient is made of, its weights' mean or their sum."""
    temperature: float = Field(0.6, gt=0, allow_inf_nan=False)
    """Of `dkm`: how softly weights choose their value at first, relative to their mean square over
    the number of values; it falls thirtyfold while training."""
    rate: Rate | list[Rate] | None = None
    """Of `rate`: the loss that a kilobyte is worth. A list: as of `bits`."""
    size: Annotated[int, BeforeValidator(parse_size), Field(ge=1)] | None = None
    """Of `rate`, instead: the packed file's bytes, as `20KB`; the rate is found in training."""
    fold: bool = False
    """First fold batch norms into the convolutions before them, which have biases instead."""
    norms: int = Field(8, ge=4, le=16)
    """Of `rate`: about how many bits each number of a batch norm is rounded to afterwards."""
    ratio: float | None = Field(None, gt=0, lt=1)
    """Of `hashed`: values for each weight of a layer, such as 0.0625."""
    recover: Recovery | None = None
    """Training against the teacher: of the shared values, or with `dkm` and `rate` of the weights
    while they come to share."""
    exclude: list[str] = Field(default_factory=list)
    """Layers or weights to leave alone, by path; `*` stands for anything."""

    @property
    def files(self) -> list[Path]:
        return self.recover.files if self.recover is not None else []

    @property
    def searches(self) -> bool:
        return self.bits == "auto" or self.sweep is not None

    @property
    def sweep(self) -> tuple[str, list[Any]] | None:
        """The setting of which each of a list is tried, and the list."""
        for setting in ("bits", "rate"):
            if isinstance(getattr(self, setting), list):
                return setting, getattr(self, setting)
        return None

    @model_validator(mode="after")
    def _for_its_method(self) -> Share:
        for field, methods in OF.items():
            if self.method not in methods and self._says(field):
                raise ValueError(
                    f"{field} is for method {' or '.join(methods)}, not for {self.method}: leave "
                    "it out"
                )
        if self.method == "rate" and (self.rate is None) == (self.size is None):
            raise ValueError("method: rate takes rate, such as 0.01, or size, such as 20KB")
        if self.method == "hashed" and self.ratio is None:
            raise ValueError("method: hashed takes ratio, such as 0.0625")
        if self.method in ("dkm", "rate") and self.recover is None:
            raise ValueError(f"method: {self.method} trains: give recover, such as {{epochs: 5}}")
        return self

    @model_validator(mode="after")
    def _agrees(self) -> Share:
        if self.values is not None and self._says("bits"):
            raise ValueError("values takes the place of bits: give one of them")
        if self.channels is not None and self.scope == "network":
            raise ValueError("channels and scope: network exclude each other: leave one out")
        if self.sweep is not None and not self.sweep[1]:
            raise ValueError(f"{self.sweep[0]} is an empty list: give what is to be tried")
        return self

    def _says(self, field: str) -> bool:
        """Whether the recipe asks for something else than the default."""
        return bool(getattr(self, field) != type(self).model_fields[field].get_default())

    def apply(self, student: Student, run: Context) -> Student:
        from attar.stages.sharing.choosing import fewest_bits, smallest

        run.found["method"] = self.method
        if self.fold:
            student = student.edited(fold_norms(student.module.eval()))
            student.check()
        if self.sweep is not None:
            return smallest(self, student, run, *self.sweep)
        if self.bits != "auto" or self.values is not None:
            return self.shared(student, run)
        bits = fewest_bits(self, student, run)
        if bits is None:
            text = "share: even 8 bits drop too much; nothing is shared"
            run.tell({"event": "note", "text": text})
            return student
        return self.having(bits=bits).shared(student, run)

    def having(self, **settings: Any) -> Share:
        """The same stage with one choice made."""
        return self.model_copy(update=settings)

    def shared(self, student: Student, run: Context) -> Student:
        """The student, shared as this stage says; there is nothing left to choose."""
        from attar.stages.sharing.clustered import share_by_kmeans
        from attar.stages.sharing.hashed import share_by_hash
        from attar.stages.sharing.trained import share_by_dkm, share_by_rate

        bits = self.bits if isinstance(self.bits, int) else None
        if self.method == "rate":
            rate = self.rate if not isinstance(self.rate, list) else None
            return share_by_rate(self, student, run, rate=rate, size=self.size)
        if self.method == "hashed":
            return share_by_hash(self, student, run)
        if self.method == "dkm":
            assert bits is not None
            return share_by_dkm(self, student, run, bits)
        return share_by_kmeans(self, student, run, None if self.values is not None else bits)
