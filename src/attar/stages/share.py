"""The stage that lets weights share a few values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from attar.share import Sharing, share_weights
from attar.stages.base import Context, Stage, stages
from attar.student import Student
from attar.training.config import Training

Bits = Annotated[int, Field(ge=1, le=8)]


@stages.register("share")
class Share(Stage):
    """Clusters each layer's weights into a codebook of at most 2**bits values (optimal k-means).

    Biases and norms are left alone; weights pruned to zero stay zero. The values are trained on by
    `recover` and every later stage; which weights are equal no longer changes. (Deep Compression,
    Han et al., ICLR 2016.)
    """

    name: ClassVar[str] = "share"
    not_after: ClassVar[dict[str, str]] = {
        "quantize": "quantized weights already lie on their grid, and moving them would leave it"
    }
    searched: ClassVar[tuple[str, ...]] = ("bits",)

    bits: Bits | Literal["auto"] = 5
    """Per layer; `auto`: the fewest that keep the budget's `max_drop` on validation, at most 8."""
    recover: Training | None = None
    """Fine-tuning of the shared values against the teacher."""
    exclude: list[str] = Field(default_factory=list)
    """Layers or weights to leave alone, by path; `*` stands for anything."""

    def apply(self, student: Student, run: Context) -> Student:
        bits = self._fewest(student, run) if self.bits == "auto" else self.bits
        if bits is None:
            run.tell(
                {"event": "note", "text": "share: even 8 bits drop too much; nothing is shared"}
            )
            return student
        shared, done = self._shared(student, bits)
        run.found.update(bits=bits, layers={path: asdict(layer) for path, layer in done.items()})
        run.found["distortion"] = _overall(done)
        return run.train(shared, self.recover) if self.recover else shared

    def _fewest(self, student: Student, run: Context) -> int | None:
        from attar.tuning.auto import search

        def attempt(bits: int) -> nn.Module:
            trial, _ = self._shared(student.copy(), bits)
            if self.recover:
                short = self.recover.model_copy(update={"epochs": max(1, self.recover.epochs // 3)})
                trial = run.at(f"bits-{bits}").train(trial, short, label=f"recover at {bits} bits")
            return trial.module

        found = search(run, "bits", range(8, 0, -1), attempt)
        fewest, run.found["tried"] = found
        return fewest

    def _shared(self, student: Student, bits: int) -> tuple[Student, dict[str, Sharing]]:
        edit, done = share_weights(student.module, bits, self.exclude)
        return student.edited(edit), done


def _overall(done: dict[str, Sharing]) -> float:
    """The layers' distortion, weighted by their numbers of weights."""
    weights = sum(layer.weights for layer in done.values())
    return sum(s.distortion * s.weights for s in done.values()) / weights if weights else 0.0
