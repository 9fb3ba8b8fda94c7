"""The edit that quantization leaves: its scheme and grids, enough to make the same graph again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule

from attar.errors import CheckpointError
from attar.quantize.cpu import safe_on, weight_bits
from attar.student import Edit
from attar.student.edits import Rounds, RowGrid
from attar.student.fingerprint import weights_sha256


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and how.

    runtime: whose kernels the graph is made for. weight_bits: 8, or 7 for processors whose 8-bit
    products overflow; by default, as this one needs. float_layers: paths of modules that compute
    in float with all inside them, their weights rounded to 8 bits; `*` means everything. observer,
    calibration: how the grids were chosen, from how many examples.
    """

    runtime: str = "onnxruntime"
    weight_bits: int = field(default_factory=lambda: weight_bits("auto"))
    float_layers: tuple[str, ...] = ()
    observer: str = "mse"
    calibration: int = 0

    @property
    def all_float(self) -> bool:
        """Whether the whole network computes in float."""
        return "*" in self.float_layers


Grids = dict[str, tuple[Tensor, Tensor]]
"""Scale and zero point by the observer's key: one each, or one an output channel for a weight."""


def changed_weights(module: nn.Module, sha256: str) -> list[str]:
    """What of a quantization's promise is broken where weights are no longer those with this
    checksum."""
    if weights_sha256(module) == sha256:
        return []
    return ["weights changed after quantization, so its scales no longer fit them"]


class Quantized(Edit):
    """An int8 network: static, uint8 activations, int8 weights with a scale an output channel.

    The weights stay in float; `graph` makes the quantized graph from them and the
    grids, the same in any process. So the promise is that the weights are still those that the
    grids were chosen for.

    biases: what bias correction adds to layers' biases, float32 (channels,), by the key of the
    layer's weight's grid without `/weight`; none by default. steps: of weights that lie on their
    grids themselves (`settle_weights`), float32 (channels, 1), by parameter path.
    """

    kind: ClassVar[str] = "quantized"
    rounds: ClassVar[Rounds] = "activations"

    def __init__(
        self,
        scheme: Scheme,
        grids: Grids,
        weights_sha256: str,
        biases: Mapping[str, Tensor] | None = None,
        steps: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.scheme = scheme
        self.grids = grids
        self.weights_sha256 = weights_sha256
        self.biases = dict(biases or {})
        self.steps = dict(steps or {})

    def settled_at(self, weights_sha256: str, steps: Mapping[str, Tensor]) -> Quantized:
        """The same of weights that lie on their grids, with this checksum."""
        return Quantized(self.scheme, self.grids, weights_sha256, self.biases, steps)

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": asdict(self.scheme),
            "safe_on": safe_on(self.scheme.weight_bits),
            "grids": list(self.grids),
            "biases": list(self.biases),
            "steps": list(self.steps),
            "weights_sha256": self.weights_sha256,
        }

    def tensors(self) -> dict[str, Tensor]:
        grids = {
            f"{name}/{key}": tensor
            for key, grid in self.grids.items()
            for name, tensor in zip(("scale", "zero_point"), grid, strict=True)
        }
        biases = {f"bias/{key}": bias for key, bias in self.biases.items()}
        return grids | biases | {f"steps/{path}": steps for path, steps in self.steps.items()}

    @classmethod
    def from_json(cls, record: dict[str, Any], tensors: dict[str, Tensor]) -> Quantized:
        try:
            grids = {
                k: (tensors[f"scale/{k}"], tensors[f"zero_point/{k}"]) for k in record["grids"]
            }
            biases = {k: tensors[f"bias/{k}"] for k in record.get("biases", ())}
            steps = {path: tensors[f"steps/{path}"] for path in record.get("steps", ())}
        except KeyError as error:
            raise CheckpointError(f"the student's quantization lacks {error}") from None
        known = record["scheme"]
        scheme = Scheme(**{**known, "float_layers": tuple(known["float_layers"])})
        return cls(scheme, grids, record["weights_sha256"], biases, steps)

    def check(self, module: nn.Module) -> list[str]:
        return changed_weights(module, self.weights_sha256)

    def row_grids(self) -> dict[str, RowGrid]:
        return {path: RowGrid(steps, None) for path, steps in self.steps.items()}

    def graph(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
    ) -> nn.Module | None:
        """The converted PT2E graph.

        Raises `CheckpointError` when the network's graph is not the one that was quantized.
        """
        from attar.quantize.pt2e import convert

        return convert(self.prepared(module, example, dynamic_shapes))

    def prepared(
        self,
        module: nn.Module,
        example: tuple[Any, ...],
        dynamic_shapes: tuple[dict[int, Any], ...],
        *,
        corrected: bool = True,
    ) -> GraphModule:
        """The graph before its conversion, its observers holding the grids; without `biases` where
        it isn't to be `corrected`. Raises as `graph`."""
        from attar.quantize.pt2e import grids_of, prepare

        biases = self.biases if corrected else {}
        prepared = prepare(module, example, dynamic_shapes, self.scheme, biases)
        grids = grids_of(prepared)
        if missing := grids.keys() ^ self.grids.keys():
            raise CheckpointError(
                f"the network's graph is not the one that was quantized: {min(missing)} is in one "
                "of them only; quantize the student again with the versions installed now"
            )
        for key, grid in grids.items():
            grid.fix(*self.grids[key])
        return prepared

    def summary(self) -> str:
        if self.scheme.all_float:
            return "computes in float, where int8 is not faster; weights rounded to 8 bits"
        kept = len(self.scheme.float_layers)
        bits = self.scheme.weight_bits
        text = f"int8, {bits}-bit weights (safe on {safe_on(bits)})"
        return text + (f", {kept} layers stay float" if kept else "")


def quantized_reference(
    edits: Collection[Edit],
    module: nn.Module,
    example: tuple[Any, ...],
    dynamic_shapes: tuple[dict[int, Any], ...],
) -> nn.Module | None:
    """The graph that a quantized student's export must answer like, in PyTorch; `None` for a
    student that isn't quantized."""
    graph = None
    for edit in edits:
        graph = edit.graph(graph or module, example, dynamic_shapes) or graph
    return graph
