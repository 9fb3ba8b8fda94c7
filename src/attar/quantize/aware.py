"""Quantization-aware training: the graph that is exported is the one that learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attar.data.base import Batch
from attar.errors import ExportError, UsageError
from attar.quantize.edit import Quantized, Scheme
from attar.quantize.on_grid import OnGrid
from attar.quantize.post_training import shared_grids
from attar.quantize.training_graph import Examples, TrainingGraph
from attar.registry import near
from attar.student import Student
from attar.student.fingerprint import weights_sha256
from attar.training.objective import Objective
from attar.training.stand_in import StandIn

Steps = Literal["learned", "fixed"]
Wrap = Callable[[Objective], Objective]


class QuantizationAware(Objective):
    """Another objective, asked of the graph that will be exported, with its grids.

    The training has two parts. For a share `freeze` of its epochs the float network trains with its
    weights on their grid and its batch norms live (`OnGrid`); after each of these epochs all grids
    are chosen anew by the scheme's observer, from the examples. Then batch norms freeze: the graph
    itself is trained, batch norms folded, activations and weights rounded as the export rounds
    them, their steps learned (LSQ, Esser et al. 2020, arXiv 1902.08153) or fixed. There is no
    dropout in it. Validation judges the graph in both parts, and the steps of the epoch whose
    weights are kept are kept with them.

    student: the one that will be trained; its module stays a float one. examples: called whenever
    grids are chosen. freeze: 0 starts with the graph. Raises `ExportError` for a network that can't
    be traced, and where a criterion reads a layer whose output the graph doesn't have; `DataError`
    for examples that aren't finite; `UsageError` for a share out of range or several processes.

    Example:
        >>> objective = QuantizationAware(                          # doctest: +SKIP
        ...     distillation, student, Scheme(), examples, example=(x,), dynamic_shapes=shapes)
        >>> train(student.module, objective=objective, ...)         # doctest: +SKIP
        >>> small = objective.quantized(student)                    # doctest: +SKIP
    """

    def __init__(
        self,
        inner: Objective,
        student: Student,
        scheme: Scheme,
        examples: Examples,
        *,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
        freeze: float = 0.3,
        steps: Steps = "learned",
    ) -> None:
        super().__init__()
        if not 0 <= freeze < 1:
            raise UsageError(f"freeze is a share of the epochs, from 0 to below 1, not {freeze!r}")
        self.inner = inner
        self._scheme, self._freeze, self._frozen = scheme, freeze, freeze == 0
        shared = shared_grids(student)
        # What it does is wanted, and not the objective in it a second time.
        self._rounding = (OnGrid(Objective(), bits=scheme.weight_bits, per_tensor=shared),)
        self._graph = TrainingGraph(
            student.module,
            scheme,
            examples,
            example=example,
            dynamic_shapes=dynamic_shapes,
            per_tensor=shared,
            learned=steps == "learned",
        )
        self._require_layers(student.module)
        self.quantizers = self._graph.quantizers
        self._stand_ins: list[StandIn] = []  # in a list, so that it is no part of this module

    def start_epoch(self, epoch: int, epochs: int) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            raise UsageError(
                "quantization-aware training runs in one process: start it without torchrun"
            )
        frozen = epoch >= min(math.ceil(self._freeze * epochs), epochs - 1)
        if frozen != self._frozen:
            self._frozen, self._stand_ins = frozen, []
        self.inner.start_epoch(epoch, epochs)

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if not self._stand_ins or self._stand_ins[0].network is not model:
            (rounding,) = self._rounding
            made = self._of_graph(model) if self._frozen else rounding.judged(model)
            self._stand_ins = [made]
        return self.inner(self._stand_ins[0], batch)

    def undecayed(self) -> Iterable[nn.Parameter]:
        return [*self.quantizers.parameters(), *self.inner.undecayed()]

    def judged(self, model: nn.Module) -> nn.Module:
        if not self._frozen:
            self._graph.calibrate(model)
        return self._of_graph(model)

    def kept(self) -> dict[str, Tensor]:
        return {f"quantizers.{k}": v for k, v in self.quantizers.state_dict().items()}

    def quantized(self, student: Student) -> Student:
        """The trained student with a `Quantized` edit of the trained grids: its graph is the one
        that was trained."""
        grids = self._graph.grids(student.module)
        return student.edited(Quantized(self._scheme, grids, weights_sha256(student.module)))

    def _of_graph(self, network: nn.Module) -> StandIn:
        return StandIn(network, self._graph.layers, self._graph)

    def _require_layers(self, network: nn.Module) -> None:
        """Raises `ExportError` now for a criterion that would fail when the graph is trained."""
        wanted = {p for part in self.inner.modules() for p in getattr(part, "student_layers", ())}
        there = [path for path, _ in network.named_modules() if path not in self._graph.lost]
        for path in sorted(wanted & self._graph.lost):
            raise ExportError(
                f"a criterion reads {path!r} of the student, whose output the quantized graph "
                "doesn't compute (a batch norm after it is folded into it): name the batch norm or "
                f"what follows it{near(path, there)}"
            )


def quantize_aware(
    student: Student,
    scheme: Scheme,
    train: Callable[[Wrap], Student],
    examples: Examples,
    *,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
    freeze: float = 0.3,
    steps: Steps = "learned",
) -> Student:
    """The student trained with its grids, and its `Quantized` edit (`QuantizationAware`).

    train: trains it in place through the objective that its argument makes of another one, and
    returns it: `lambda wrap: run.train(student, training, wrap=wrap)`. examples: gives the argument
    tuples to calibrate with, batch first, the same ones whenever it is called. The rest is as
    `quantize` and `QuantizationAware` have it, with what they raise.

    Example:
        >>> small = quantize_aware(                                            # doctest: +SKIP
        ...     student, Scheme(), lambda wrap: run.train(student, training, wrap=wrap),
        ...     examples, example=(x,), dynamic_shapes=({0: Dim("batch")},)
        ... )
    """
    made: list[QuantizationAware] = []

    def wrap(inner: Objective) -> Objective:
        aware = QuantizationAware(
            inner,
            student,
            scheme,
            examples,
            example=example,
            dynamic_shapes=dynamic_shapes,
            freeze=freeze,
            steps=steps,
        )
        made.append(aware)
        return aware

    trained = train(wrap)
    return made[-1].quantized(trained)
