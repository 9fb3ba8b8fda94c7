"""The commands that pack a student into one file, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attar.cli.commands import Json, app
from attar.cli.printing import print_json, print_lines

if TYPE_CHECKING:
    from attar.student import Student
    from attar.student.packed import Packed


@app.command()
def pack(
    run_or_student: Annotated[
        Path, typer.Argument(metavar="RUN_OR_STUDENT", help="A run's folder, or a student's.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write.", show_default="FOLDER.attar"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a student into one small file, its weights coded at their entropy.

    Examples:

        attar pack runs/digits
        attar pack runs/digits/stages/02-share --out small.attar

    `attar.load("small.attar")` is the network again, bit for bit; docs/packed-format.md says how
    another program reads it.
    """
    from attar.api import load_student
    from attar.student.packed import save_packed

    student = load_student(run_or_student)
    path = out or run_or_student.with_name(f"{run_or_student.resolve().name}.attar")
    found = _summary(student, save_packed(student, path), path)
    print_json(found) if as_json else _print_packed(found)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `attar pack` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The student's folder.", show_default="FILE's name"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a packed student out into a folder: its record as JSON, its weights as safetensors.

    Examples:

        attar unpack small.attar
        attar unpack small.attar --out student

    A folder that holds something is left alone.
    """
    from attar.api import load_student
    from attar.errors import UsageError
    from attar.student import save_student

    folder = out or file.with_suffix("")
    if folder == file or (folder.exists() and (folder.is_file() or any(folder.iterdir()))):
        raise UsageError(f"{folder} is there already: choose another folder with --out")
    if not file.is_file():
        raise UsageError(f"there is no packed student at {file}")
    student = load_student(file)
    save_student(student, folder)
    edits = [edit.summary() for edit in student.edits]
    if as_json:
        print_json({"folder": str(folder), "edits": edits})
    else:
        print_lines([f"student: {folder}", *edits])


def _summary(student: Student, packed: Packed, path: Path) -> dict[str, Any]:
    """What a packed student came to. The ratio is to its weights as 32-bit floats."""
    from attar.measure.cost import parameters

    return {
        "file": str(path),
        "bytes": len(packed.data),
        "ratio": round(4 * parameters(student.module) / len(packed.data), 2),
        "tensors": [
            {
                "name": name,
                "shape": list(stored.shape),
                "form": stored.form,
                "bits_per_weight": round(stored.bits / max(stored.elements, 1), 3),
                "bytes": round(stored.bits / 8, 1),
            }
            for name, stored in packed.tensors.items()
        ],
    }


def _print_packed(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("tensor", overflow="fold")
    shown.add_column("form")
    for name in ("shape", "bits a weight", "bytes"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in found["tensors"]:
        shape = "×".join(map(str, one["shape"])) or "1"
        figures = (shape, f"{one['bits_per_weight']:.3f}", f"{one['bytes']:,.1f}")
        shown.add_row(Text(one["name"]), one["form"], *figures)
    Console(highlight=False).print(shown)
    print_lines(
        [
            "",
            f"packed: {found['file']}, {found['bytes']:,} bytes, {found['ratio']:g} times smaller "
            "than the weights as 32-bit floats",
        ]
    )
