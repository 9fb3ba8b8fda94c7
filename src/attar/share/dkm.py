"""Training that feels its clustering: k-means as a differentiable part of the network (DKM)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attar.errors import UsageError
from attar.share.codebook import as_it_is, cluster
from attar.share.edit import Assignment, Shared
from attar.share.weights import Sharing, shareable
from attar.training.objective import Objective
from attar.training.reweighted import Reweighted, as_name, under_each_name


class DifferentiableKMeans(Reweighted):
    """Another objective, asked of the network with each weight tensor softly clustered (DKM: Cho
    et al., ICLR 2022, section 3.2).

    Every weight w attends to its tensor's k = 2**bits centroids c by distance,
    `a_j = softmax_j(-(w - c_j)² / (temperature · s² / k))`; every centroid becomes the mean of the
    weights that attend to it, `c_j = Σ a_j w / Σ a_j`; after `rounds` of this the network computes
    with `Σ_j a_j c_j`. Gradients go through all of it, so a weight that hurts where it is moves
    towards another centroid, and may change sides; with a clustering that is fixed it can't.

    As in the paper, centroids begin with k-means and each step goes on from where the last one left
    them, so a round or two a step settle them. Unlike there, distances are squared and relative to
    s² / k, where s² is the tensor's mean squared weight, so that one temperature suits layers of
    any scale and codebooks of any size (where it is too warm for k, centroids fall together);
    clusters are of single weights; the temperature falls from epoch to epoch, so that weights can
    change sides at first and lie at their centroids at last; and attention is computed again in the
    backward pass instead of being kept: beyond the network's own, the memory is that of one
    tensor's weights × k × rounds.

    Validation judges the network with every weight at its nearest centroid, which is what `share`
    makes of it in the end. Weights that are zero when training begins, in tensors that have such,
    are taken for pruned: they stay zero, which is then one of the 2**bits values.

    network: the one that will be trained. bits: 1 to 8. temperature: in the first epoch. cooling:
    how many times colder the last epoch is; 1 keeps the temperature, as the paper does. rounds: of
    k-means in each step. exclude: layers or weights to leave alone, as for `share_weights`. Raises
    `UsageError` for settings out of range or a pattern that fits nothing, `AttarError` for weights
    that are NaN or infinite.

    Example:
        >>> objective = DifferentiableKMeans(TaskObjective(task), net, bits=2)  # doctest: +SKIP
        >>> train(net, objective=objective, ...)  # doctest: +SKIP
        >>> edit, done = objective.share(net)  # doctest: +SKIP
    """

    def __init__(
        self,
        inner: Objective,
        network: nn.Module,
        *,
        bits: int,
        temperature: float = 0.6,
        cooling: float = 30.0,
        rounds: int = 1,
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__(inner)
        _check(bits, temperature, cooling, rounds)
        self._warmest, self._cooling, self._rounds = temperature, cooling, rounds
        self._temperature = temperature
        self._paths = shareable(network, exclude)
        self._pruned: set[str] = set()
        for path in self._paths:
            weight = network.get_parameter(path)
            values = cluster(weight, 2**bits, name=path).values.float()
            if (values == 0).any():
                self._pruned.add(path)
            alive = values[values != 0]
            self.register_buffer(as_name(path), alive if len(alive) else values)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        done = epoch / (epochs - 1) if epochs > 1 else 1.0
        self._temperature = self._warmest / self._cooling**done

    def centroids(self, path: str) -> Tensor:
        """The centroids of one tensor as they are now, float32 (k,), without the pruned zero."""
        return self.get_buffer(as_name(path))

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        soft: dict[str, Tensor] = {}
        for path in self._paths:
            weight = network.get_parameter(path)
            soft[path], moved = self._softly(path, weight)
            if self.training:
                self.centroids(path).copy_(moved)
        return under_each_name(network, soft)

    def judged_weights(self, network: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            hard = {p: self._snapped(p, network.get_parameter(p)) for p in self._paths}
        return under_each_name(network, hard)

    def kept(self) -> dict[str, Tensor]:
        return {**super().kept(), **{as_name(p): self.centroids(p) for p in self._paths}}

    @torch.no_grad()
    def share(self, module: nn.Module) -> tuple[Shared, dict[str, Sharing]]:
        """Puts every weight of the trained network, in place, at its nearest centroid.

        Returns the edit that keeps it so and what was done, by path, as `share_weights` does; the
        distortion is of this last step, which is small where the training has gathered the weights.
        """
        assignments: dict[str, Assignment] = {}
        done: dict[str, Sharing] = {}
        for path in self._paths:
            weight = module.get_parameter(path)
            snapped = self._snapped(path, weight)
            book = as_it_is(snapped, weight)
            weight.copy_(snapped)
            assignments[path] = Assignment.of(book)
            bits = assignments[path].bits
            done[path] = Sharing(len(book.values), bits, weight.numel(), book.distortion)
        return Shared(assignments), done

    def _softly(self, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weights that the network computes with, and where the centroids have moved."""
        alive = weight != 0 if path in self._pruned else None
        with torch.autocast(weight.device.type, enabled=False):
            soft, moved = checkpoint(
                _attended, weight.float().flatten(), self.centroids(path).clone(), alive,
                self._temperature, self._rounds, use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return soft.view_as(weight).to(weight.dtype), moved.detach()

    def _snapped(self, path: str, weight: Tensor) -> Tensor:
        snapped = _nearest(weight.float(), self.centroids(path)).to(weight.dtype)
        return snapped.where(weight != 0, 0) if path in self._pruned else snapped


def _attended(
    weights: Tensor, centroids: Tensor, alive: Tensor | None, temperature: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """Rounds of soft k-means: each weight as its attention makes it, (n,), and the centroids, (k,).

    A centroid that nobody attends to stays where it is.
    """
    counted = torch.ones_like(weights) if alive is None else alive.flatten().to(weights.dtype)
    squared = weights.detach().square().sum() / counted.sum().clamp_min(1)
    scale = temperature * squared / len(centroids)
    scale = scale.clamp_min(torch.finfo(weights.dtype).tiny)
    column = weights.unsqueeze(1)
    for _ in range(rounds):
        attention = torch.softmax(-((column - centroids).square() / scale), 1)
        attention = attention * counted.unsqueeze(1)
        mass = attention.sum(0)
        attended = mass > 1e-20  # below, gradients of the mean would overflow
        means = (attention * column).sum(0) / mass.where(attended, 1)
        centroids = means.where(attended, centroids)
    attention = torch.softmax(-((column - centroids).square() / scale), 1)
    return (attention * centroids).sum(1) * counted, centroids


def _nearest(weights: Tensor, centroids: Tensor) -> Tensor:
    """Each weight's nearest centroid; in memory of the weights' own size."""
    values = centroids.sort().values
    between = (values[1:] + values[:-1]) / 2
    return values[torch.bucketize(weights.contiguous(), between)]


def _check(bits: int, temperature: float, cooling: float, rounds: int) -> None:
    """Raises `UsageError` for settings out of range."""
    if not 1 <= bits <= 8:
        raise UsageError(f"bits is {bits}: a codebook's indices take 1 to 8")
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature:g}: attention needs one above 0")
    if not cooling >= 1:
        raise UsageError(f"cooling is {cooling:g}: training can't end warmer than it begins")
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}: each step needs at least one")
