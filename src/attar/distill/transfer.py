"""The transfer set: which of the training examples a student learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from attar.data.arrays import ArraySplit
from attar.data.augment import mixed
from attar.data.base import UNLABELLED, Batch, Data, Split
from attar.data.config import Fraction, Positive, bare_amount
from attar.data.splits import count_of, draw, quota
from attar.distill.adapters import channels
from attar.distill.capture import Capture, unwrapped
from attar.errors import UsageError
from attar.tasks.base import Task
from attar.training.evaluation import device_of, evaluating, to_device

DRAWS = 4
"""Augmentations of each example that `disagreement` compares."""
BATCH = 256
BLOCK = 1024
"""Rows of one block of similarities: at most 1,024 × 8,192 of them are held at once."""
COLUMNS = 8192
LOGITS = "logits"
"""What the feature is called where the teacher has no linear layer."""
ROUNDING = 1e-6
"""By how much a cosine of equal vectors may fall short of 1."""
SCORED = ("confident", "uncertain", "disagreement")
SPREAD = ("k-centre", "herding")


class Transfer(BaseModel):
    """How a transfer set is chosen, as `distill: {transfer: {…}}` has it.

    count, fraction: how many of the training examples; one of them, or neither where duplicates are
        only left out. A bare number is a count (500) or a fraction (0.1).
    method: `random`, `stratified` (the classes' shares are kept), or by the teacher, shares kept:
        `confident` (its highest probability of any class), `uncertain` (the smallest margin between
        its two best answers), `disagreement` (its answers to several augmentations of one example
        differ most), `herding` (the mean of its features stays nearest the class's); or `k-centre`
        (each example lies far from those before it in its features), whatever the classes.
    layer: path of the teacher's layer whose output is the feature, averaged over positions;
        default: what goes into its last linear layer, or its logits where it has none.
    deduplicate: `true` leaves out an example whose pixels have come before, a number in (0, 1] one
        whose feature has at least this cosine similarity with an earlier one that is kept. That is
        done first.

    Example:
        >>> Transfer.model_validate({"count": 500, "method": "k-centre"}).asks_teacher
        True
        >>> Transfer.model_validate(0.1).method
        'stratified'
    """

    model_config = ConfigDict(extra="forbid")

    count: Positive | None = None
    fraction: Fraction | None = None
    method: Literal[
        "random",
        "stratified",
        "confident",
        "uncertain",
        "disagreement",
        "k-centre",
        "herding",
    ] = "stratified"
    layer: str | None = None
    deduplicate: bool | Annotated[float, Field(gt=0, le=1)] = False

    @model_validator(mode="before")
    @classmethod
    def _bare_amount(cls, written: Any) -> Any:
        return bare_amount(written)

    @model_validator(mode="after")
    def _one_amount(self) -> Transfer:
        if self.count is not None and self.fraction is not None:
            raise ValueError("a transfer set has either a `count` or a `fraction`")
        if not self.chooses and self.deduplicate is False:
            raise ValueError("a transfer set needs a `count` or a `fraction`, or `deduplicate`")
        if not self.chooses and self.method != "stratified":
            raise ValueError(f"method {self.method} needs a `count` or a `fraction` to choose")
        if self.layer is not None and not self.reads_features:
            raise ValueError(
                "`layer` is for k-centre, herding, and for `deduplicate` by similarity (0.95)"
            )
        return self

    @property
    def chooses(self) -> bool:
        """Whether it takes a part of the examples, and not only duplicates out."""
        return self.count is not None or self.fraction is not None

    @property
    def by_similarity(self) -> bool:
        """Whether duplicates are told by the teacher's features."""
        return not isinstance(self.deduplicate, bool)

    @property
    def reads_features(self) -> bool:
        return self.by_similarity or (self.chooses and self.method in SPREAD)

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's network is needed."""
        return self.reads_features or (self.chooses and self.method in SCORED)


class Chosen(NamedTuple):
    """places: int64 (n,), sorted, in the split. found: JSON values, what was done, for the report:
    `method`, `of` how many examples, `duplicates`, `layer`, and the `chosen` ones by class."""

    places: np.ndarray
    found: dict[str, Any]


def choose(
    transfer: Transfer,
    split: Split,
    teacher: nn.Module | None,
    task: Task,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> Chosen:
    """The examples of a labelled split that a student is to learn from.

    The same arguments give the same places. Scores and herding keep the classes' shares, to within
    one example. The teacher is called in evaluation mode and left as it was. Of each example at
    most a feature is held, never the images.

    teacher: needed where `transfer.asks_teacher`. classes: what the report calls them.
    Raises `UsageError` for a split that can't be taken in part, a teacher that isn't there, more
    examples than there are, and `disagreement` without augmentation.

    Source: k-centre: Gonzalez 1985, "Clustering to minimize the maximum intercluster distance";
    Sener & Savarese 2018, "Active Learning for Convolutional Neural Networks: A Core-Set Approach",
    algorithm 1. Herding: Welling 2009, "Herding Dynamical Weights to Learn", as in Rebuffi et al.
    2017, "iCaRL", algorithm 4 (whose features are brought to length 1 first; these are not).
    Margin: Scheffer et al. 2001, "Active Hidden Markov Models for Information Extraction".
    Divergence: Lin 1991, "Divergence Measures Based on the Shannon Entropy", equation 5.1.

    Example:
        >>> chosen = choose(Transfer(count=500), data.train, None, task)  # doctest: +SKIP
        >>> len(data.train.only(chosen.places))  # doctest: +SKIP
        500
    """
    _require_possible(transfer, split, teacher)
    asked = _Asked(teacher, split, task, mixed(seed, "transfer"))
    found: dict[str, Any] = {"method": transfer.method} if transfer.chooses else {}
    features, places = None, np.arange(len(split))
    if transfer.reads_features:
        features, found["layer"] = asked.features(transfer.layer)
    if transfer.deduplicate is not False:
        places = _once_each(transfer, split, features)
        found["duplicates"] = len(split) - len(places)
    targets = _targets(split)
    if transfer.chooses:
        count = count_of("a transfer set", transfer.count, transfer.fraction, len(places))
        own = None if features is None else features[places]
        places = places[_chosen(transfer.method, count, places, targets[places], own, asked)]
    found |= {"chosen": len(places), "of": len(split)}
    found["classes"] = _counted(targets[places], classes)
    return Chosen(places, found)


def transferred(
    transfer: Transfer, data: Data, teacher: nn.Module | None, task: Task, seed: int = 0
) -> tuple[Data, dict[str, Any]]:
    """The data with the chosen examples alone to train on, and what was done (see `choose`)."""
    places, found = choose(transfer, data.train, teacher, task, seed, data.classes)
    part = data.train.only(places)  # type: ignore[attr-defined]  # choose has looked
    return replace(data, train=part), found


def with_unlabelled(data: Data) -> Data:
    """The data with the unlabelled examples behind the labelled ones in `train`.

    Raises `UsageError` where either aren't arrays, `DataError` for images of another form.
    """
    train, unlabelled = data.train, data.unlabelled
    if not (isinstance(train, ArraySplit) and isinstance(unlabelled, ArraySplit)):
        raise UsageError(
            "unlabelled examples join training examples that Attar holds in memory: both must be "
            "an attar.data.ArraySplit"
        )
    return replace(data, train=train.joined(unlabelled), unlabelled=None)


def said(found: dict[str, Any]) -> str:
    """What was chosen, in a sentence."""
    text = f"{found['chosen']:,} of {found['of']:,} training examples are learnt from"
    if "method" in found:
        text += f", chosen by {found['method']}"
    if "duplicates" in found:
        text += f"; {found['duplicates']:,} duplicates are left out"
    return f"{text}."


def _require_possible(transfer: Transfer, split: Split, teacher: nn.Module | None) -> None:
    if not hasattr(split, "only"):
        raise UsageError(
            f"transfer: {split.name} is a {type(split).__name__}, which can't be taken in part: a "
            "DataLoader over a data set with a length, or a data set, would work"
        )
    if teacher is None and transfer.asks_teacher:
        why = transfer.method if transfer.chooses else f"deduplicate: {transfer.deduplicate:g}"
        raise UsageError(
            f"transfer: {why} asks the teacher's network, and there is none here: random, "
            "stratified and `deduplicate: true` do without"
        )


def _chosen(
    method: str,
    count: int,
    pool: np.ndarray,
    targets: np.ndarray,
    features: Tensor | None,
    asked: _Asked,
) -> np.ndarray:
    """Places in the pool, sorted. pool: places in the split. targets, features: the pool's."""
    if method == "random":
        return draw(np.zeros(len(pool), np.int64), count, asked.seed)
    if method == "stratified":
        return draw(targets, count, asked.seed)
    if method == "k-centre":
        assert features is not None
        return np.sort(k_centres(features, count, asked.seed))
    if method == "herding":
        assert features is not None
        return _by_class(targets, count, lambda own, few: herded(features[own], few))
    scores = asked.scores(method)[pool]
    return _by_class(targets, count, lambda own, few: np.argsort(-scores[own], kind="stable")[:few])


def _by_class(
    targets: np.ndarray, count: int, take: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Places, sorted, every class in its share. take: which of a class's places, and how many."""
    labels, sizes = np.unique(targets, return_counts=True)
    taken = []
    for label, few in zip(labels, quota(sizes, count, sizes), strict=True):
        own = np.flatnonzero(targets == label)
        taken.append(own[take(own, int(few))])
    return np.sort(np.concatenate(taken))


def _counted(targets: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """How many of each class, by its name where it has one."""
    labels, counts = np.unique(targets[targets != UNLABELLED], return_counts=True)
    names = [classes[n] if n < len(classes) else str(n) for n in labels.tolist()]
    return dict(zip(names, counts.tolist(), strict=True))


def _targets(split: Split) -> np.ndarray:
    """int64 (n,), `UNLABELLED` where an example has no label."""
    held = getattr(split, "targets", None)
    if isinstance(held, Tensor):
        return held.numpy()
    each = [
        batch.targets if batch.targets is not None else torch.full_like(batch.indices, UNLABELLED)
        for batch in split.batches(BATCH)
    ]
    return torch.cat(each).numpy()


# -- what the teacher says -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A teacher, the split it is asked about, and what augmentations are drawn by."""

    teacher: nn.Module | None
    split: Split
    task: Task
    seed: int

    def logits(self, batch: Batch) -> Tensor:
        """(n, classes), float64, on the CPU."""
        assert self.teacher is not None
        args, kwargs = self.task.arguments(to_device(batch, device_of(self.teacher)))
        with evaluating(self.teacher):
            return self.task.logits(self.teacher(*args, **kwargs)).cpu().double()

    def features(self, path: str | None) -> tuple[Tensor, str]:
        """(n, width), float32, and what they are called."""
        assert self.teacher is not None
        net = unwrapped(self.teacher)
        reading = partial(_last_linears_input, net) if path is None else Capture(net, [path])
        name, rows = LOGITS, []
        for batch in self.split.batches(BATCH):
            with reading() as seen:
                logits = self.logits(batch)
            name, feature = next(iter(seen.items()), (LOGITS, logits))
            rows.append(_vectors(feature, name, len(logits)))
        return torch.cat(rows), name

    def scores(self, method: str) -> np.ndarray:
        """float64 (n,): those with the highest are chosen."""
        if method == "disagreement":
            return torch.cat(list(self._disagreements())).numpy()
        score = {"confident": confidence, "uncertain": uncertainty}[method]
        return torch.cat([score(self.logits(b)) for b in self.split.batches(BATCH)]).numpy()

    def _disagreements(self) -> Iterator[Tensor]:
        passes = [
            self.split.batches(BATCH, augment=True, seed=self.seed, epoch=epoch)
            for epoch in range(DRAWS)
        ]
        for step, draws in enumerate(zip(*passes, strict=True)):
            if step == 0 and all(torch.equal(d.inputs, draws[0].inputs) for d in draws):
                raise UsageError(
                    "transfer: disagreement compares the teacher's answers to several "
                    "augmentations of one example, and these aren't augmented: give the data "
                    "`augment`, or take uncertain"
                )
            yield disagreement(torch.stack([self.logits(d) for d in draws]))


@contextmanager
def _last_linears_input(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What goes into the linear layer that runs last during one call, by its name: empty where none
    runs."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.clear()
        if args:
            seen[f"input of {path}"] = args[0].detach()

    handles = [
        module.register_forward_pre_hook(partial(keep, path))
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _vectors(feature: Tensor, name: str, count: int) -> Tensor:
    """(n, width), float32, on the CPU: the mean over the positions of maps or tokens."""
    if not 2 <= feature.dim() <= 4 or len(feature) != count:
        raise UsageError(
            f"transfer: the feature {name!r} has shape {tuple(feature.shape)} for {count} "
            "examples: give the `layer` of one that is a vector, tokens or maps for each"
        )
    return channels(feature).float().mean(2).cpu()


def confidence(logits: Tensor) -> Tensor:
    """The logarithm of the likeliest class's probability: (n,) of (n, classes)."""
    return F.log_softmax(logits, -1).amax(-1)


def uncertainty(logits: Tensor) -> Tensor:
    """The negative margin between the two largest probabilities: (n,) of (n, classes).

    Example:
        >>> uncertainty(torch.tensor([[0.5, 0.3, 0.2]]).log()).round(decimals=4).tolist()
        [-0.2]
    """
    best = logits.softmax(-1).topk(2, -1).values
    return best[..., 1] - best[..., 0]


def disagreement(logits: Tensor) -> Tensor:
    """The generalised Jensen-Shannon divergence of several answers to each example, in nats: (n,)
    of (draws, n, classes).

        JS(p₁ … p_k) = H(mean of pᵢ) − mean of H(pᵢ)

    Example:
        >>> sure = torch.tensor([[[0.0, 50.0]], [[50.0, 0.0]]])
        >>> disagreement(sure).round(decimals=4).tolist()  # the logarithm of 2
        [0.6931]
    """
    p = logits.softmax(-1)
    return torch.special.entr(p.mean(0)).sum(-1) - torch.special.entr(p).sum(-1).mean(0)


# -- which are far apart, alike, or typical ------------------------------------------------------


def k_centres(features: Tensor, count: int, seed: int = 0) -> np.ndarray:
    """Greedy farthest points: int64 (count,), each the farthest from all before it; the seed draws
    the first. No point is then farther from its nearest centre than twice the best any choice of so
    many could do (Gonzalez 1985).

    features: float (n, width). Takes n × width × count multiplications.

    Example:
        >>> sorted(k_centres(torch.tensor([[0.0], [1.0], [9.0], [10.0]]), 2).tolist())[1] > 1
        True
    """
    x = features - features.mean(0)  # distances are the same, and less is lost in rounding
    square = x.square().sum(1)
    nearest = torch.full_like(square, torch.inf)
    places = [int(np.random.RandomState(seed % 2**32).randint(len(x)))]
    for _ in range(count - 1):
        last = places[-1]
        distance = torch.addmv(square, x, x[last], alpha=-2).add_(square[last])
        torch.minimum(nearest, distance, out=nearest)
        nearest[last] = -torch.inf
        places.append(int(nearest.argmax()))
    return np.array(places)


def herded(features: Tensor, count: int) -> np.ndarray:
    """Herding: int64 (count,), each such that the mean of those chosen so far is the nearest to the
    mean of all.

    features: float (n, width). Takes n × width × count multiplications.

    Example:
        >>> herded(torch.tensor([[0.0], [4.0], [5.0], [11.0]]), 2).tolist()  # the mean is 5
        [2, 1]
    """
    x = features.double()
    x = x - x.mean(0)  # from here on the mean to be near to is 0
    square = x.square().sum(1)
    total = torch.zeros_like(x[0])
    places = []
    for _ in range(count):
        places.append(int(torch.addmv(square, x, total, alpha=2).argmin()))
        total += x[places[-1]]
        square[places[-1]] = torch.inf
    return np.array(places, np.int64)


def unlike(features: Tensor, similarity: float) -> np.ndarray:
    """Places, sorted, of the examples whose cosine similarity with every earlier one that is kept
    is below `similarity`.

    features: float (n, width). At most 1,024 × 8,192 similarities are held at once.

    Example:
        >>> unlike(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), 0.9).tolist()
        [0, 2]
    """
    unit, least = F.normalize(features), similarity - ROUNDING
    kept = torch.empty_like(unit)
    count, places = 0, []
    for start in range(0, len(unit), BLOCK):
        rows = unit[start : start + BLOCK]
        out = torch.zeros(len(rows), dtype=torch.bool)
        for earlier in kept[:count].split(COLUMNS):
            out |= (rows @ earlier.T >= least).any(1)
        alike = rows @ rows.T >= least
        for i in range(len(rows)):
            if not out[i]:
                out[i + 1 :] |= alike[i, i + 1 :]
        new = (~out).nonzero().flatten()
        kept[count : count + len(new)] = rows[new]
        count += len(new)
        places.append(new + start)
    return torch.cat(places).numpy()


def _once_each(transfer: Transfer, split: Split, features: Tensor | None) -> np.ndarray:
    """Places, sorted, without those that repeat an earlier one."""
    if features is None or not transfer.by_similarity:
        return _unlike_in_pixels(split)
    return unlike(features, float(transfer.deduplicate))


def _unlike_in_pixels(split: Split) -> np.ndarray:
    """Places, sorted, of the examples whose pixels haven't come before."""
    seen: set[bytes] = set()
    places = []
    for batch in split.batches(BATCH):
        for place, pixels in zip(batch.indices.tolist(), batch.inputs.numpy(), strict=True):
            digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                places.append(place)
    return np.array(places, np.int64)
