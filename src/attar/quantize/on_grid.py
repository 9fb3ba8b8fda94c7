"""Training that feels the weights' integer grid, while activations stay float."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from attar.training.learned_steps import grown, on_learned_grid
from attar.training.objective import Objective
from attar.training.reweighted import Reweighted, as_name

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class OnGrid(Reweighted):
    """Another objective, asked of the network with its weights rounded to their integer grid.

    Each convolution's and linear layer's weight is rounded as the quantized graph will round it: to
    `bits` bits (±64 steps for 7, ±127 for 8), symmetric, with a scale an output channel, or a
    tensor where `per_tensor` names it; a batch norm that follows scales a channel as a whole and
    doesn't change that. Gradients pass the rounding as if it were not there (straight-through
    estimator, Bengio et al. 2013, section 4), so the network that is trained stays a float one.
    Activations are computed in float: their grids are chosen after the training. The rounded
    network is what validation judges.

    Example:
        >>> objective = OnGrid(recovery_objective(task, teacher, training))  # doctest: +SKIP
        >>> train(net, objective=objective, ...)  # doctest: +SKIP
    """

    def __init__(
        self,
        inner: Objective,
        *,
        bits: int = 8,
        per_tensor: Collection[str] = (),
    ) -> None:
        super().__init__(inner)
        self._largest = min(127, 2 ** (bits - 1))
        self._per_tensor = frozenset(per_tensor)

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        return {path: self._rounded(path, w) for path, w in self._weights(network).items()}

    def _weights(self, network: nn.Module) -> dict[str, Tensor]:
        return layer_weights(network)

    def _rounded(self, path: str, weight: Tensor) -> Tensor:
        return rounded(weight, self._largest, per_tensor=path in self._per_tensor)


class OnLearnedGrid(OnGrid):
    """`OnGrid` to few bits, its steps learned with the weights (LSQ: Esser et al. 2020): for
    weights that are stored in few bits and computed with in float (`quantize_weights`).

    network: the one that will be trained. weights: paths of the parameters that will be stored so;
    default: those of convolutions and linear layers. `scales()` gives the learned scales
    afterwards.

    Example:
        >>> objective = OnLearnedGrid(TaskObjective(task), net, bits=4)  # doctest: +SKIP
        >>> train(net, objective=objective, ...)  # doctest: +SKIP
        >>> small = quantize_weights(  # doctest: +SKIP
        ...     student, "int4", grids=objective.scales(), ...)
    """

    def __init__(
        self,
        inner: Objective,
        network: nn.Module,
        *,
        bits: int = 4,
        weights: Collection[str] | None = None,
        per_tensor: Collection[str] = (),
    ) -> None:
        super().__init__(inner, bits=bits, per_tensor=per_tensor)
        self._paths = tuple(layer_weights(network) if weights is None else weights)
        self._largest = 2 ** (bits - 1) - 1
        # A byte's grid leaves out -128, so that both sides are alike; few bits use all there are.
        self._least = -self._largest - (bits < 7)
        self.log_steps = nn.ParameterDict(
            {
                as_name(path): nn.Parameter(self._first(path, weight.detach()).log())
                for path, weight in self._weights(network).items()
            }
        )

    def undecayed(self) -> Iterable[nn.Parameter]:
        return [*self.log_steps.values(), *self.inner.undecayed()]

    def kept(self) -> dict[str, Tensor]:
        own = {f"log_steps.{name}": value for name, value in self.log_steps.items()}
        return {**super().kept(), **own}

    def scales(self) -> dict[str, Tensor]:
        """The learned scales by weight path (`layer1.0.conv1.weight`), float32 on the CPU: one an
        output channel, (channels,), or one, (), where a weight has a grid for all of it."""
        return {
            name.replace("/", "."): step.detach().exp().float().cpu()
            for name, step in self.log_steps.items()
        }

    def _weights(self, network: nn.Module) -> dict[str, Tensor]:
        return {path: network.get_parameter(path) for path in self._paths}

    def _first(self, path: str, weight: Tensor) -> Tensor:
        """LSQ's own (section 2.1): `2 · mean|w| / √largest`, which the largest values may exceed; a
        channel of zeros takes the whole weight's."""
        whole = weight.abs().mean().clamp_min(1e-9)
        mean = whole if path in self._per_tensor else weight.abs().flatten(1).mean(1)
        return 2 * torch.where(mean > 0, mean, whole) / math.sqrt(self._largest)

    def _rounded(self, path: str, weight: Tensor) -> Tensor:
        log_step = self.log_steps[as_name(path)]
        sharing = weight.numel() // log_step.numel()
        step = grown(log_step, sharing, self._largest, weight=True)
        if step.dim():
            step = step.reshape(-1, *[1] * (weight.dim() - 1))
        return on_learned_grid(weight, step, self._least, self._largest)


def layer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions, linear layers and attention's projections, by path."""
    found: dict[str, Tensor] = {}
    for path, layer in network.named_modules():
        name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
        weight = getattr(layer, name, None)
        if isinstance(layer, (*LAYERS, nn.MultiheadAttention)) and weight is not None:
            found[f"{path}.{name}" if path else name] = weight
    return found


def rounded(weight: Tensor, largest: int, *, per_tensor: bool = False) -> Tensor:
    """A weight (output channels first) on its symmetric grid of ±`largest` steps; its gradient is
    that of the weight itself.

    >>> rounded(torch.tensor([[0.9, -2.0]]), 2).tolist()
    [[1.0, -2.0]]
    """
    values = weight.detach()
    extent = values.abs().amax() if per_tensor else values.abs().flatten(1).amax(1)
    shape = () if per_tensor else (-1, *[1] * (weight.dim() - 1))
    step = (extent / largest).clamp_min(torch.finfo(weight.dtype).tiny).reshape(shape)
    return weight + (torch.round(values / step) * step - values)
