"""What is removed of which layers and why, in a file that can be read, edited and replayed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attar.errors import UsageError
from attar.prune.blocks import residual_blocks, without_blocks
from attar.prune.channels import Prunable, Pruned
from attar.prune.groups import ChannelGraph
from attar.prune.selection import Selection
from attar.registry import near
from attar.student import Student

SCHEMA = 1
_NUMBERS = re.compile(r"\[[\s\d,]+\]")


@dataclass(frozen=True)
class Part:
    """Layers that lose channels together.

    removed: by layer, the channels that go, as they are numbered before. widths: by layer, how many
    there are before and after. lost: how much the network is taken to lose by it. saves: what share
    of the whole network's cost it alone saves, by the model of costs.
    """

    layers: list[str]
    widths: dict[str, tuple[int, int]]
    removed: dict[str, list[int]]
    lost: float
    saves: float


@dataclass(frozen=True)
class Block:
    """A residual block that goes whole. lost, saves: as of `Part`."""

    path: str
    lost: float
    saves: float


@dataclass(frozen=True)
class Plan:
    """A choice of channels and blocks to remove, for a budget.

    unit, limit: the budget. before, after: what the network costs, measured. criterion: by which
    channels were ranked. losses: what `lost` counts. kept: layers that can't be narrowed, and why.
    blocks: residual blocks that go; none of the parts' layers is within one. costs: what each layer
    costs before and after, by the model of costs: multiply-accumulates, parameters (of each tensor,
    where the budget is of these or of bytes), or microseconds measured in the runtime.
    """

    unit: str
    limit: float
    before: float
    after: float
    criterion: str
    losses: str
    parts: list[Part]
    kept: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` has it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Plan:
        """From a file. Raises `UsageError` for one that isn't a plan."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UsageError(f"the plan {path} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no plan of channels to remove: {error!r}") from None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no plan."""
        if record["schema"] != SCHEMA:
            raise ValueError(f"schema {record['schema']} is not {SCHEMA}")
        parts = [
            Part(
                [str(layer) for layer in part["layers"]],
                {str(k): (int(v[0]), int(v[1])) for k, v in part["widths"].items()},
                {str(k): [int(i) for i in v] for k, v in part["removed"].items()},
                float(part["lost"]),
                float(part["saves"]),
            )
            for part in record["parts"]
        ]
        return cls(
            unit=str(record["unit"]),
            limit=float(record["limit"]),
            before=float(record["before"]),
            after=float(record["after"]),
            criterion=str(record["criterion"]),
            losses=str(record["losses"]),
            parts=parts,
            kept={str(k): str(v) for k, v in record["kept"].items()},
            blocks=[
                Block(str(b["path"]), float(b["lost"]), float(b["saves"]))
                for b in record.get("blocks", [])
            ],
            costs={str(k): (float(v[0]), float(v[1])) for k, v in record.get("costs", {}).items()},
        )

    def selection(self, graph: ChannelGraph) -> Selection:
        """The atoms to remove from a network. Raises `UsageError` where they don't fit it."""
        places = {place.layer: place for place in graph.producers}
        atoms = [np.empty(0, np.int64)]
        for layer, channels in ((k, v) for part in self.parts for k, v in part.removed.items()):
            place = places.get(layer)
            if place is None:
                raise UsageError(f"the plan removes channels of {layer}, which the network lacks")
            if channels and not 0 <= min(channels) <= max(channels) < len(place.atoms):
                raise UsageError(
                    f"the plan removes channel {max(channels)} of {layer}, which has "
                    f"{len(place.atoms)}, numbered from 0"
                )
            atoms.append(place.atoms[channels])
            for atom in atoms[-1]:
                if int(atom) in graph.frozen:
                    raise UsageError(
                        f"the plan removes channels of {layer} that must stay: "
                        f"{graph.frozen[int(atom)]}"
                    )
        gone = np.unique(np.concatenate(atoms))
        for place in graph.producers:
            if np.isin(place.atoms, gone).all():
                raise UsageError(f"the plan leaves no channel of {place.layer}")
        return Selection(gone)


def readable(record: Mapping[str, Any]) -> str:
    """A plan's JSON for people: a line for each layer's channels."""
    text = json.dumps(record, indent=2)
    return (
        _NUMBERS.sub(
            lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text
        )
        + "\n"
    )


def prune_by_plan(
    student: Student, example: tuple[Any, ...], plan: Plan, exclude: Sequence[str] = ()
) -> tuple[Student, Pruned]:
    """A student without the channels and blocks that a plan names, proven as every removal is.

    A channel takes along what is tied to it, whether or not the plan names that too. Raises
    `UsageError` for a plan of another network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> part = Part(["0"], {"0": (8, 6)}, {"0": [1, 5]}, 0.0, 0.0)
        >>> plan = Plan("parameters", 60, 58, 44, "by hand", "", [part])
        >>> narrow, _ = prune_by_plan(Student(net), (torch.randn(1, 4),), plan)
        >>> narrow.module[0].out_features
        6
    """
    network = Prunable(student, example, exclude)
    blocks = {}
    if plan.blocks:
        found = residual_blocks(network.module, example, network.graph.program)
        blocks = {b.path: _known(b.path, found) for b in plan.blocks}
    narrow, said = network.prune(lambda: plan.selection(network.graph))
    return without_blocks(narrow, blocks), said.without(blocks)


def _known(path: str, blocks: Mapping[str, bool]) -> bool:
    if path not in blocks:
        raise UsageError(
            f"the plan takes out {path}, which is no residual block of the network"
            f"{near(path, list(blocks))}"
        )
    return blocks[path]
