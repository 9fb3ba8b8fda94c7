"""A student on disk: `student.json` (spec and edits) and `weights.safetensors`. No pickle.

`edits.safetensors` holds the edits' tensors, keyed `<edit's place>/<name>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attar.errors import CheckpointError
from attar.models.base import ModelSpec
from attar.models.weights import load_weights
from attar.store import full_disk_as_error, write_whole
from attar.student.edits import Edit, edit_from
from attar.student.student import Student

SCHEMA = 1


def save_student(student: Student, folder: Path) -> None:
    """Writes the student into `folder`, which is made. Tensors that share memory (tied weights)
    are stored once each under every name, so that loading needs to know nothing of ties. Raises
    `StorageError` when the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": SCHEMA,
        "spec": student.spec.model_dump(exclude_none=True) if student.spec else None,
        "edits": [record_of(edit) for edit in student.edits],
    }
    tensors = {
        f"{i}/{name}": _own(tensor)
        for i, edit in enumerate(student.edits)
        for name, tensor in edit.tensors().items()
    }
    weights = {name: _own(tensor) for name, tensor in student.module.state_dict().items()}
    with full_disk_as_error(folder):
        save_file(weights, folder / "weights.safetensors")
        if tensors:
            save_file(tensors, folder / "edits.safetensors")
        else:
            (folder / "edits.safetensors").unlink(missing_ok=True)
        write_whole(folder / "student.json", json.dumps(record, indent=1) + "\n")


def record_of(edit: Edit) -> dict[str, Any]:
    """An edit as JSON, with its kind."""
    return {"kind": edit.kind, **edit.to_json()}


def _own(tensor: Tensor) -> Tensor:
    """A copy that shares its memory with no other, as safetensors wants it."""
    return tensor.detach().cpu().contiguous().clone()


def load_student(
    folder: Path,
    *,
    build: Callable[[ModelSpec], nn.Module],
    module: nn.Module | None = None,
) -> Student:
    """The student saved in `folder`: network built anew, edits replayed, weights loaded.

    build: makes a spec's network, as `attar.models.build` does. module: a fresh network of the
    person's, for a student without a spec; it is changed in place. Raises `CheckpointError`.
    """
    record = _record(folder)
    spec = spec_from(record["spec"], folder / "student.json")
    network = fresh_network(spec, folder, build, module)
    edits = _edits(record["edits"], _tensors(folder / "edits.safetensors", required=False))
    return assembled(network, spec, edits, _tensors(folder / "weights.safetensors"), folder)


def fresh_network(
    spec: ModelSpec | None,
    place: Path | str,
    build: Callable[[ModelSpec], nn.Module],
    module: nn.Module | None,
) -> nn.Module:
    """The network without its edits: the person's, or a spec's. place: what messages call it.

    Raises `CheckpointError` where there is neither.
    """
    if module is not None:
        return module
    if spec is None:
        raise CheckpointError(
            f"{place} was made from a module handed in from Python, so its code isn't known: "
            "hand in a fresh one, attar.load(run, model=MyNetwork())"
        )
    return build(spec)


def assembled(
    module: nn.Module,
    spec: ModelSpec | None,
    edits: list[Edit],
    weights: Mapping[str, Tensor],
    place: Path | str,
) -> Student:
    """The student of a fresh network: edits replayed, weights loaded, promises checked."""
    for edit in edits:
        edit.replay(module)
    _load_weights(module, weights, place)
    student = Student(module.eval(), spec, edits)
    student.check()
    return student


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "student.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no student in {folder}: student.json is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise CheckpointError(f"{path} is not a student's record: it has no schema number")
    if record["schema"] > SCHEMA:
        raise CheckpointError(
            f"{path} has schema {record['schema']}; this Attar reads up to {SCHEMA}: upgrade attar"
        )
    if "spec" not in record or not isinstance(record.get("edits"), list):
        raise CheckpointError(f"{path} is damaged: it lacks the student's spec or its edits")
    return record


def spec_from(record: Any, place: Path | str) -> ModelSpec | None:
    """A spec's JSON as a spec. Raises `CheckpointError` for a damaged one."""
    try:
        return None if record is None else ModelSpec.model_validate(record)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, e["loc"])) or e["msg"] for e in error.errors())
        raise CheckpointError(f"{place}: the spec is damaged: {wrong}") from None


def _tensors(path: Path, *, required: bool = True) -> dict[str, Tensor]:
    if not path.exists():
        if required:
            raise CheckpointError(f"{path} is missing")
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _edits(records: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Edit]:
    def own(i: int) -> dict[str, Tensor]:
        prefix = f"{i}/"
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return [edit_from(record, own(i)) for i, record in enumerate(records)]


def _load_weights(module: nn.Module, weights: Mapping[str, Tensor], place: Path | str) -> None:
    try:
        load_weights(module, weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise CheckpointError(
            f"the weights in {place} don't fit the network its spec builds: {' '.join(lines)}"
        ) from None
