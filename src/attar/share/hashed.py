"""Layers whose weights are drawn from a few values by a hash, and the edit that makes them
(HashedNets: Chen et al., ICML 2015)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import CheckpointError, UsageError
from attar.share.weights import shareable
from attar.student import Edit, Student
from attar.student.edits import submodule

Start = Literal["drawn", "mean"]


class HashedLayer(nn.Module):
    """What hashed layers have in common: weight i is `sign(i) · buckets[place(i)]`.

    Place and sign follow from i, the weight's position in row-major order, and a key
    (`hashed_places`), so that only `buckets` (k,) and `bias` are parameters and saved. A bucket's
    gradient is the signed sum over its weights. `weight` is computed anew whenever it is read.
    """

    def __init__(self, shape: Iterable[int], buckets: int, key: int, bias: Tensor | None) -> None:
        super().__init__()
        self.shape, self.key = tuple(shape), key
        self.buckets = nn.Parameter(torch.zeros(buckets))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)
        places = hashed_places(int(np.prod(self.shape)), buckets, key)
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The dense weight, in the plain layer's shape."""
        signed = torch.cat([self.buckets, -self.buckets])
        return signed.index_select(0, self.get_buffer("places")).reshape(self.shape)

    @torch.no_grad()
    def start(self, weight: Tensor, how: Start) -> None:
        """Fills the buckets from a weight of this layer's shape (see `hash_weights`)."""
        count = len(self.buckets)
        places = self.get_buffer("places").long()
        signed = torch.where(places < count, weight.flatten(), -weight.flatten()).double()
        sums = torch.zeros(count, dtype=torch.float64, device=weight.device)
        sums.index_add_(0, places % count, signed)
        sharing = torch.bincount(places % count, minlength=count).clamp_min(1)
        self.buckets.copy_(sums / (sharing.sqrt() if how == "drawn" else sharing))

    def plain(self) -> nn.Module:
        """An ordinary layer with the weight as it is now."""
        layer = self._dense()
        layer.weight = nn.Parameter(self.weight.detach().clone())
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"{shape} from {len(self.buckets)} values, key={self.key}"

    def _dense(self) -> Any:
        raise NotImplementedError


class HashedLinear(HashedLayer):
    """A linear layer of few values: (…, in) → (…, out)."""

    def __init__(self, like: nn.Linear, buckets: int, key: int) -> None:
        super().__init__(like.weight.shape, buckets, key, like.bias)
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _dense(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")


class HashedConv2d(HashedLayer):
    """A convolution of few values: (N, in, H, W) → (N, out, H', W')."""

    def __init__(self, like: nn.Conv2d, buckets: int, key: int) -> None:
        super().__init__(like.weight.shape, buckets, key, like.bias)
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size = (like.weight.shape[2], like.weight.shape[3])
        self.geometry: dict[str, Any] = {
            name: getattr(like, name) for name in ("stride", "padding", "dilation", "groups")
        }

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.geometry)

    def _dense(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size,
            bias=self.bias is not None, device="meta", **self.geometry,
        )  # fmt: skip


class Hashed(Edit):
    """Layers whose weights are drawn from a few values by a hash of their positions.

    layers: how many values each has, by path. seed: what the hash begins with. Which weight takes
    which value follows from these, so nothing else is kept.
    """

    kind: ClassVar[str] = "hashed"

    def __init__(self, layers: Mapping[str, int], seed: int) -> None:
        self.layers = dict(layers)
        self.seed = seed

    def to_json(self) -> dict[str, Any]:
        return {"layers": self.layers, "seed": self.seed}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Hashed:
        layers = {str(path): int(count) for path, count in record["layers"].items()}
        if any(count < 1 for count in layers.values()):
            raise ValueError("a hashed layer has no values")
        return cls(layers, int(record["seed"]))

    def replay(self, module: nn.Module) -> None:
        """Puts hashed layers in the place of plain ones, in place; their values are zero."""
        for path, count in self.layers.items():
            layer = submodule(module, path, "weights were hashed in")
            hashed = _hashed(layer, count, _key(self.seed, path))
            if hashed is None:
                raise CheckpointError(
                    f"weights were hashed in {path}, which is a {type(layer).__name__}: only plain "
                    "linear layers and 2-d convolutions can be"
                )
            _exchange(module, layer, hashed)

    def check(self, module: nn.Module) -> list[str]:
        return [
            sentence
            for path, count in self.layers.items()
            for sentence in self._broken(module, path, count)
        ]

    def graph(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
    ) -> nn.Module | None:
        """A copy with plain layers: what is deployed computes with dense weights."""
        return with_plain_layers(module)

    def summary(self) -> str:
        return f"weights of {len(self.layers)} layers drawn from {sum(self.layers.values())} values"

    def _broken(self, module: nn.Module, path: str, count: int) -> list[str]:
        layer = dict(module.named_modules(remove_duplicate=False)).get(path)
        if not isinstance(layer, HashedLayer):
            return [f"{path} has hashed weights but is no hashed layer any more"]
        if len(layer.buckets) != count or layer.key != _key(self.seed, path):
            return [f"{path} was hashed with other settings than the layer that is there now"]
        return []


@dataclass(frozen=True)
class Hashing:
    """What was done to one layer. weights: how many there were; values: how many there are."""

    weights: int
    values: int


def hash_weights(
    module: nn.Module,
    ratio: float | Mapping[str, int] = 1 / 16,
    *,
    seed: int = 0,
    exclude: Iterable[str] = (),
    start: Start = "mean",
) -> tuple[Hashed, dict[str, Hashing]]:
    """Turns the linear layers and 2-d convolutions of `module`, in place, into hashed ones.

    The network is to be trained afterwards: which weights are one is left to chance, not to what
    they were. Layers whose weight or bias is another layer's too, whose class is one of their own
    (such as attention's), or that don't pad with zeros are left alone.

    ratio: values for each weight of a layer, above 0 and below 1, at least one a layer; or how many
    values for each layer, by path, others being left alone. exclude: patterns of paths, as for
    `share_weights`. start: each value's beginning, from the weights that share it: their signed
    `mean`, the nearest to what the network was; or their signed sum over √n, `drawn` as widely as a
    layer of random weights is initialised, for a network that is to be trained from the start.
    Returns the edit and what was done, by path. Raises `UsageError`.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> edit, done = hash_weights(net, 1 / 16, exclude=["2"])
        >>> net[0].buckets.shape, done["0"]
        (torch.Size([256]), Hashing(weights=4096, values=256))
    """
    if start not in ("mean", "drawn"):
        raise UsageError(f"start is {start!r}: a bucket begins at the mean, or drawn")
    counts = _counts(module, ratio, exclude)
    edit = Hashed(counts, seed)
    weights = {path: module.get_parameter(f"{path}.weight").detach() for path in counts}
    edit.replay(module)
    for path, weight in weights.items():
        layer = module.get_submodule(path)
        assert isinstance(layer, HashedLayer)
        layer.start(weight, start)
    return edit, {p: Hashing(w.numel(), counts[p]) for p, w in weights.items()}


def hash_student(
    student: Student,
    ratio: float | Mapping[str, int] = 1 / 16,
    *,
    seed: int = 0,
    exclude: Iterable[str] = (),
    start: Start = "mean",
) -> tuple[Student, dict[str, Hashing]]:
    """`hash_weights` of a student in place, with the edit on its record.

    Raises `UsageError` as well where an earlier edit's promise is about a weight that is hashed (a
    mask, a codebook, a grid): its weight is no longer there to keep.
    """
    trial = copy.deepcopy(student.module)
    hash_weights(trial, ratio, seed=seed, exclude=exclude, start=start)
    for edit in student.edits:
        if broken := edit.check(trial):
            raise UsageError(
                f"weights can't be hashed after the edit {edit.kind!r}: {broken[0]}; hash first, "
                "or exclude that layer"
            )
    edit, done = hash_weights(student.module, ratio, seed=seed, exclude=exclude, start=start)
    return student.edited(edit), done


def with_plain_layers(module: nn.Module) -> nn.Module:
    """A copy of the network whose hashed layers are plain ones of the same weights."""
    dense = copy.deepcopy(module)
    for layer in [m for m in dense.modules() if isinstance(m, HashedLayer)]:
        _exchange(dense, layer, layer.plain())
    return dense


def hashed_places(count: int, buckets: int, key: int) -> np.ndarray:
    """Which bucket each of `count` weights takes: int32 (count,), plus `buckets` where negated.

    Weight i has the i-th output z of SplitMix64 (Steele, Lea and Flood 2014) begun with `key`: with
    x = key + (i + 1) · 0x9E3779B97F4A7C15, x = (x ⊕ x≫30) · 0xBF58476D1CE4E5B9,
    x = (x ⊕ x≫27) · 0x94D049BB133111EB, z = x ⊕ x≫31, all modulo 2⁶⁴. Its bucket is
    ⌊⌊z / 2³²⌋ · buckets / 2³²⌋, and it is negated where z is odd. Integers alone decide, so that
    it is the same on every machine.

    Example:
        >>> hashed_places(6, 4, key=0).tolist()
        [7, 1, 4, 3, 4, 1]
    """
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = x ^ (x >> np.uint64(31))
    bucket = ((z >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
    return (bucket + (z & np.uint64(1)) * np.uint64(buckets)).astype(np.int32)


def _key(seed: int, path: str) -> int:
    """A layer's key: the first eight bytes of SHA-256 of `seed/path`, so that layers of one shape
    don't share their pattern."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "big")


def _counts(
    module: nn.Module, ratio: float | Mapping[str, int], exclude: Iterable[str]
) -> dict[str, int]:
    """How many values each hashed layer gets."""
    possible = {f"{path}.weight": path for path in _hashable(module)}
    included = [possible[n] for n in shareable(module, exclude) if n in possible]
    if isinstance(ratio, Mapping):
        return _given(module, ratio, included)
    if not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio:g}: values for each weight lie between 0 and 1")
    if not included:
        raise UsageError(
            "nothing is left to hash: the network has no plain linear layer or 2-d convolution of "
            "its own weight, or all are excluded"
        )
    sizes = {path: module.get_parameter(f"{path}.weight").numel() for path in included}
    return {path: max(1, round(ratio * size)) for path, size in sizes.items()}


def _given(module: nn.Module, counts: Mapping[str, int], included: list[str]) -> dict[str, int]:
    for path, count in counts.items():
        if path not in included:
            raise UsageError(
                f"the weights of {path!r} can't be hashed; those of these layers can: "
                + ", ".join(included)
            )
        size = module.get_parameter(f"{path}.weight").numel()
        if not 1 <= count <= size:
            raise UsageError(f"{path} can't have {count} values: it has {size} weights")
    return dict(counts)


def _hashable(module: nn.Module) -> Iterator[str]:
    """The paths of layers that can be hashed, each once."""
    owners: dict[int, set[int]] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(layer))
    for path, layer in module.named_modules():
        kind = type(layer)
        plain = kind is nn.Linear or (kind is nn.Conv2d and layer.padding_mode == "zeros")
        own = all(len(owners[id(p)]) == 1 for p in layer.parameters(recurse=False))
        if path and plain and own:
            yield path


def _hashed(layer: nn.Module, count: int, key: int) -> HashedLayer | None:
    made: HashedLayer
    if type(layer) is nn.Linear:
        made = HashedLinear(layer, count, key)
    elif type(layer) is nn.Conv2d:
        made = HashedConv2d(layer, count, key)
    else:
        return None
    made.buckets.requires_grad_(layer.weight.requires_grad)
    return made.to(layer.weight.device, layer.weight.dtype).train(layer.training)


def _exchange(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a layer at every path where another is."""
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if layer is old:
            module.set_submodule(path, new)
