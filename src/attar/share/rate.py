"""Training for accuracy and few bits at once: `L + rate · kilobytes`.

The weights lie on a uniform grid, one a tensor, and cost what an entropy coder charges for them:
`-log2` of how often their multiples of the step occur in the tensor. What is frequent is cheap and
so becomes more frequent; zero, which most weights are near, becomes the cheapest, so that pruning,
sharing and coding are one thing, which the loss decides weight by weight. (Entropy-penalised
training: Oktay et al., ICLR 2020, arXiv 1906.06624, who learn a density of the weights where this
fits a law of two numbers; entropy-constrained quantization: Choi et al., ICLR 2017.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attar.data.base import Batch
from attar.errors import UsageError
from attar.share.codebook import as_it_is, finite
from attar.share.edit import Assignment, Shared
from attar.share.weights import Sharing, fitting
from attar.student.packed import coded_size
from attar.training.learned_steps import grown, on_learned_grid
from attar.training.objective import Objective
from attar.training.reweighted import Reweighted, as_name, under_each_name

LARGEST = 127
"""The grid's last point to either side, so that there are fewer than 256 values."""
KILOBYTE = 8000
"""In bits."""
RAMP = 0.4
"""The share of epochs over which the rate grows to what was asked for: a network that is at first
far from its grid would otherwise lose weights that it turns out to need."""
FIRST_RATE = 0.01
"""The loss that all weights are worth at first, where their size is given."""
INTEGRAL, PROPORTIONAL = 60.0, 8.0
"""How far the rate's logarithm moves by an excess of the size's, over a training and at once."""
MOST = 10.0
"""The loss that all weights may be worth at most, or there would be no answers left to train."""
FIRST_GAIN, LARGEST_GAIN = 0.02, 0.2
"""How much of it in a step: of the first epoch, whose length isn't known, and at most."""
GAUSSIAN = 0.5 * math.log2(2 * math.pi * math.e)
"""Bits of a normal variable on a grid as coarse as its deviation."""


class RateDistortion(Reweighted):
    """Another objective, asked of the network with its weights on grids, plus what they cost.

    network: the one that will be trained. rate: the loss that a kilobyte is worth; with more, the
    file is smaller and the answers are worse. kilobytes: instead, what the weights shall cost; the
    rate is then found while training. bits: what a weight costs at first, about. exclude:
    parameters that stay as they are, by patterns of their paths; those of batch norms always do.
    `share(network)` puts the trained weights on their grids for good.

    Steps are learned with the weights, by the gradients of LSQ (Esser et al. 2020) for the answers
    and those of the cost. Between two grid points the cost is interpolated, so that a weight feels
    which of its neighbours is cheaper.

    Example:
        >>> objective = RateDistortion(TaskObjective(task), net, rate=0.01)  # doctest: +SKIP
        >>> train(net, objective=objective, ...)  # doctest: +SKIP
        >>> edit, done = objective.share(net)  # doctest: +SKIP
    """

    def __init__(
        self,
        inner: Objective,
        network: nn.Module,
        *,
        rate: float | None = None,
        kilobytes: float | None = None,
        bits: float = 4.0,
        exclude: Iterable[str] = (),
    ) -> None:
        super().__init__(inner)
        if (rate is None) == (kilobytes is None):
            raise UsageError("give rate or kilobytes, one of them")
        self._fixed = rate
        self._ramp = 1.0
        self._depth = 2 ** (bits - 1)
        self._paths = codable(network, exclude)
        with torch.no_grad():
            self.log_steps = nn.ParameterDict(
                {
                    as_name(path): nn.Parameter(first_step(network.get_parameter(path), bits).log())
                    for path in self._paths
                }
            )
            first = 1.0 if kilobytes is None else self.kilobytes(network)
            self.pressure = Pressure(kilobytes, first)
        self._recount = True

    def start_epoch(self, epoch: int, epochs: int) -> None:
        super().start_epoch(epoch, epochs)
        self.pressure.start_epoch(epoch, epochs)
        self._recount = True
        self._ramp = min(1.0, (epoch + 1) / max(1.0, RAMP * epochs))

    def undecayed(self) -> Iterable[nn.Parameter]:
        return [*self.log_steps.values(), *super().undecayed()]

    def kept(self) -> dict[str, Tensor]:
        own = {f"log_steps.{name}": value for name, value in self.log_steps.items()}
        return {**super().kept(), **own}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms = super().forward(model, batch)
        cost = self.bits(model) / KILOBYTE
        if self._fixed is not None:
            return {**terms, "rate": self._fixed * self._ramp * cost}
        now = float(cost.detach())
        if self._recount:
            self.pressure.compare(self.kilobytes(model), now)
            self._recount = False
        return {**terms, "rate": self.pressure(now, self._ramp) * cost}

    def bits(self, network: nn.Module) -> Tensor:
        """What an entropy coder charges for the network's weights as they are now, a scalar."""
        costs = []
        for path in self._paths:
            weight = network.get_parameter(path)
            costs.append(charged(weight, self._step(path, weight.numel())))
        return torch.stack(costs).sum()

    @torch.no_grad()
    def kilobytes(self, network: nn.Module) -> float:
        """What the network's weights as they are now take in a packed file."""
        rounded = {path: self._rounded(network, path) + 0.0 for path in self._paths}
        return coded_size(rounded) / 1000

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        return under_each_name(network, {p: self._rounded(network, p) for p in self._paths})

    @torch.no_grad()
    def share(self, network: nn.Module) -> tuple[Shared, dict[str, Sharing]]:
        """Puts the network's weights on their grids in place; gives the edit that keeps them equal
        and what was done, by path. Raises `AttarError` for weights that are NaN or infinite."""
        assignments: dict[str, Assignment] = {}
        done: dict[str, Sharing] = {}
        for path in self._paths:
            weight = network.get_parameter(path)
            finite(weight, path)
            before = weight.clone()
            weight.copy_(self._rounded(network, path) + 0.0)  # a zero of either sign costs a bit
            codebook = as_it_is(weight, before)
            assignments[path] = Assignment.of(codebook)
            size = len(codebook.values)
            done[path] = Sharing(size, assignments[path].bits, weight.numel(), codebook.distortion)
        return Shared(assignments), done

    def _rounded(self, network: nn.Module, path: str) -> Tensor:
        weight = network.get_parameter(path)
        return on_learned_grid(weight, self._step(path, weight.numel()), -LARGEST, LARGEST)

    def _step(self, path: str, values: int) -> Tensor:
        """A tensor's step, in the eight leading bits that a file stores; learned straight through
        that rounding."""
        step = grown(self.log_steps[as_name(path)], values, math.ceil(self._depth))
        return step + (step.bfloat16().float() - step).detach()


class Pressure(nn.Module):
    """The rate that brings weights to a size, found while they are trained.

    kilobytes: what they shall take in a file. first: what they take at first. What is aimed at
    falls from the one to the other as the ramp goes from 0 to 1; a size above it raises the rate,
    step by step and at once (a controller with an integral and a proportional part, on logarithms).
    It may move as far in a training of few steps as in one of many.
    """

    log_rate: Tensor
    taken: Tensor
    steps: Tensor
    gain: Tensor

    def __init__(self, kilobytes: float | None, first: float) -> None:
        super().__init__()
        self._first, self._last = first, first if kilobytes is None else kilobytes
        self.register_buffer("log_rate", torch.tensor(math.log(FIRST_RATE / first)))
        self.register_buffer("taken", torch.tensor(1.0))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("gain", torch.tensor(FIRST_GAIN))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, counted from 0."""
        if epoch:
            steps = float(self.steps) / epoch * epochs
            self.gain.fill_(min(LARGEST_GAIN, INTEGRAL / max(1.0, steps)))

    def compare(self, kilobytes: float, charged: float) -> None:
        """Says what weights that are charged so much take in a file: less, for the law that they
        are charged by is simpler than the file's models."""
        self.taken.fill_(kilobytes / max(charged, 1e-9))

    def forward(self, charged: float, ramp: float) -> float:
        """The rate of now, for weights that are charged so many kilobytes."""
        kilobytes = charged * float(self.taken)
        aim = self._first * (self._last / self._first) ** ramp
        excess = math.log(max(kilobytes, 1e-9) / aim)
        self.log_rate += float(self.gain) * max(-1.0, min(1.0, excess))
        most = MOST / max(charged, 1e-9)
        self.log_rate.clamp_(max=math.log(most))
        self.steps += 1
        rate = math.exp(float(self.log_rate) + PROPORTIONAL * excess)
        return min(rate, most)


def codable(network: nn.Module, exclude: Iterable[str] = ()) -> list[str]:
    """The paths of the parameters whose bits are counted, tied ones once: all but those of batch
    norms, empty ones, and those that fit a pattern of `exclude`. Raises `UsageError` for a pattern
    that fits nothing, and where nothing is left."""
    norms = [path for path, layer in network.named_modules() if isinstance(layer, _BatchNorm)]
    paths = [
        path
        for path, parameter in network.named_parameters()
        if parameter.numel() and path.rpartition(".")[0] not in norms
    ]
    left_out = fitting(paths, exclude, "exclude")
    if not set(paths) - left_out:
        raise UsageError("no weight is left to share: the network has none, or all are excluded")
    return [path for path in paths if path not in left_out]


def first_step(weight: Tensor, bits: float) -> Tensor:
    """The step with which normal weights cost about `bits` each, (); small enough to tell any of
    the weights apart from zero, large enough for all to be on the grid."""
    alive = weight[weight != 0].double()
    if not alive.numel():
        return torch.tensor(2.0**-bits)
    largest = alive.abs().max()
    spread = alive.square().mean().sqrt()
    step = spread * 2 ** (GAUSSIAN - bits)
    return step.clamp(min=2 * largest / LARGEST, max=largest).float()


def charged(weight: Tensor, step: Tensor) -> Tensor:
    """The bits of weights rounded to multiples of `step`, a scalar.

    weight: any shape. step: (). A multiple `k` is charged `-log2 p(k)` by what fits these weights
    best of all laws with a probability of their own for zero and a geometric one for the rest:
    `p(0) = 1 - q`, `p(k) = q/2 · (1 - r) · r^(|k| - 1)`. The gradient of a weight between two
    multiples is the difference of their bits, over the step; the law is taken as it is. Where zero
    isn't the most frequent yet, it is taken to be, so that it draws all the same.

    Counting how often each multiple occurs would charge less, but it gives every multiple that
    happens to be rare a wall around it, behind which weights are caught.

    Example:
        >>> weight = torch.tensor([0.1, -0.2, 1.2, 0.0], requires_grad=True)
        >>> bits = charged(weight, torch.tensor(1.0))  # three zeros and a one
        >>> bits.backward()  # all are drawn to zero, which is the cheapest
    """
    return _Charged.apply(weight, step)  # type: ignore[no-any-return, no-untyped-call]


class _Charged(torch.autograd.Function):
    """Few passes over whole tensors, which are as large as the network."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        v = weight.float() * (1 / step)
        size = v.abs().round_().clamp_(max=LARGEST)
        law = _Law(size.numel(), int(size.count_nonzero()), float(size.sum()))
        ctx.law = law
        ctx.save_for_backward(v, step)
        ctx.dtype = weight.dtype
        return step.new_tensor(law.bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        v, step = ctx.saved_tensors
        slope = torch.where(v.abs() < 1, ctx.law.first, ctx.law.further).mul_(v.sign())
        pulled = slope.mul_(grads[0] / step)
        of_step = -(pulled * v).sum() if ctx.needs_input_grad[1] else None
        return pulled.to(ctx.dtype), of_step


class _Law:
    """The bits of integers by the law of `charged`.

    count: how many there are; nonzero: of them not zero; total: the sum of their sizes. bits: of
    all together. further: what each next one costs more than the one before it; first: what one
    costs more than zero, at least as much. A half more of each kind keeps rare ones from costing
    without bound.
    """

    def __init__(self, count: int, nonzero: int, total: float) -> None:
        zero = math.log2((count + 1) / (count - nonzero + 0.5))
        sign = 1 + math.log2((count + 1) / (nonzero + 0.5))
        stop = math.log2((total + 1) / (nonzero + 0.5))
        self.further = math.log2((total + 1) / (total - nonzero + 0.5))
        first = sign + stop - zero
        self.first = max(first, self.further)
        self.bits = count * zero + nonzero * first + (total - nonzero) * self.further
