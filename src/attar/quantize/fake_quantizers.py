"""What stands in a graph that is trained wherever the exported one has a grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attar.quantize.calibration import least_weight_scale
from attar.quantize.observers import SMALLEST_SCALE, Grid, PerChannelWeight
from attar.training.learned_steps import grown, on_learned_grid


class FakeQuantizer(nn.Module):
    """Rounds one tensor to a grid like its observer's, with a step that can be learned.

    A weight's steps are those that it has before batch norms are folded into it, for that is the
    weight that is trained beside them, at the same pace; `factors`, (channels,), are what folding
    multiplies them by. There is a step an output channel; where `shared`, one for all. Zero points
    are whole and not learned.
    """

    zero_point: Tensor

    def __init__(self, grid: Grid, *, learned: bool, shared: bool = False) -> None:
        super().__init__()
        self.key = grid.key
        self.ends = (grid.quant_min, grid.quant_max)
        self._zero: int | None = None
        self.per_channel = isinstance(grid, PerChannelWeight)
        self.shared = shared
        self.factors = torch.ones(())
        shape = (1,) if shared else grid.scale.shape
        self.log_step = nn.Parameter(torch.zeros(shape), requires_grad=learned)
        self.register_buffer("zero_point", grid.zero_point.clone())
        self.take(grid)

    def take(self, grid: Grid) -> None:
        """Begins at the observer's grid."""
        scale = grid.scale.float() / self.factors.to(grid.scale.device)
        if self.shared:
            scale = scale.amax().reshape(1)
        with torch.no_grad():
            self.log_step.copy_(scale.log())
            self.zero_point.copy_(grid.zero_point)
        self._zero = None

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are, on the CPU."""
        return self.scale.detach().cpu().clone(), self.zero_point.cpu().clone()

    @property
    def starts_at_zero(self) -> bool:
        """Whether the grid has no negative values."""
        return int(self.zero_point.flatten()[0]) == self.ends[0]

    @property
    def scale(self) -> Tensor:
        """Of the grid: a scalar, or (channels,)."""
        return self.log_step.exp() * self.factors if self.per_channel else self.log_step.exp()

    def at_least(self, scale: Tensor) -> None:
        """Coarsens the grid where it is finer than this, (channels,)."""
        least = scale / self.factors
        if self.shared:
            least = least.amax().reshape(1)
        with torch.no_grad():
            least = least.clamp_min(SMALLEST_SCALE).log()
            self.log_step.copy_(torch.where(least > self.log_step, least, self.log_step))

    def forward(self, x: Tensor) -> Tensor:
        if self._zero is None:  # asked seldom: a device is waited for
            self._zero = int(self.zero_point.flatten()[0])
        low, high = (end - self._zero for end in self.ends)
        sharing = x.numel() // self.log_step.numel() if self.per_channel else x[:1].numel()
        step = grown(self.log_step, sharing, max(-low, high), weight=self.per_channel)
        if self.per_channel:
            step = (step * self.factors).reshape(-1, *[1] * (x.dim() - 1))
        return on_learned_grid(x, step, low, high)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._zero = None


class FakeBias(nn.Module):
    """Rounds a bias to steps of its layer's input scale times its weight's, where the runtime adds
    it; its gradient is straight through."""

    def __init__(self, source: FakeQuantizer, weight: FakeQuantizer) -> None:
        super().__init__()
        self._derived_from = (source, weight)

    def forward(self, bias: Tensor) -> Tensor:
        source, weight = self._derived_from
        with torch.no_grad():
            step = source.scale * weight.scale
            # Counted in float64: there are more steps than a float32 can tell apart.
            moved = torch.round(bias.double() / step) * step - bias
        return bias + moved.to(bias.dtype)

    def make_room(self, bias: Tensor) -> None:
        """Coarsens the weight's grid where the bias would overflow."""
        source, weight = self._derived_from
        weight.at_least(least_weight_scale(bias.detach(), source.scale.detach()))
