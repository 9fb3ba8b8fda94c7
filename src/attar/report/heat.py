"""A heat map: names down, settings across, each cell's figure in it and its colour behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from attar.report.drawing import TEXT, Box, svg, text

ROW, ROW_UNDER_NAME = 40, 54
"""A row's height where names stand beside the map, and where they stand above their row."""
SMALL = 6.0
"""A character's mean width at the type of details."""
FAINT, STRONG = 0.14, 0.56
"""How much of its colour a cell shows: at strength 0, and at 1, where text can still be read."""

Tone = Literal["kept", "lost", "empty"]


@dataclass(frozen=True)
class HeatCell:
    """A figure. tone: its colour; strength: how much of it, 0 to 1. tip: what more there is."""

    figure: str
    tone: Tone
    strength: float = 0.0
    tip: str = ""


@dataclass(frozen=True)
class HeatRow:
    """One name, more of it in small type, and a cell for each column."""

    name: str
    detail: str
    cells: Sequence[HeatCell]


def heat(
    rows: Sequence[HeatRow], columns: Sequence[str], *, title: str, x_label: str, width: int
) -> Markup:
    """The rows in the order given. Names stand beside the map where they leave it room enough, else
    above their row; what is too long is cut, and whole in the row's tip."""
    names = max(max(len(row.name) * TEXT, len(row.detail) * SMALL) for row in rows) + 16
    beside = width >= 560
    left = min(names, 0.4 * width) if beside else 0
    high = ROW if beside else ROW_UNDER_NAME
    frame = Box(left, 40, width, 40 + high * len(rows))
    step = (frame.right - frame.left) / len(columns)
    parts = [text((frame.left + frame.right) / 2, 14, x_label, "axis", "middle")]
    for i, column in enumerate(columns):
        parts.append(text(frame.left + step * (i + 0.5), 33, column, "tick", "middle"))
    for i, row in enumerate(rows):
        top = frame.top + high * i
        parts.append(_name(row, frame, top, beside))
        place = Box(0, top + (0 if beside else 18), 0, top + high - 2)
        for k, cell in enumerate(row.cells):
            start = frame.left + step * k
            parts.append(_cell(cell, Box(start, place.top, start + step - 2, place.bottom)))
    return svg(width, round(frame.bottom), title, parts)


def swatch(tone: Tone, strength: float = 0.0) -> Markup:
    """A colour's sign for a legend."""
    drawn = _rectangle(HeatCell("", tone, strength), Box(0, 0, 28, 14))
    form = '<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{}</svg>'
    return Markup(form).format(drawn)


def _cell(cell: HeatCell, box: Box) -> Markup:
    middle = (box.left + box.right) / 2, (box.top + box.bottom) / 2 + 4
    drawn = _rectangle(cell, box) + text(*middle, cell.figure, "heat-figure", "middle")
    return Markup("<g>{}<title>{}</title></g>").format(drawn, cell.tip)


def _rectangle(cell: HeatCell, box: Box) -> Markup:
    form = '<rect x="{}" y="{}" width="{}" height="{}" rx="3" class="heat {}" fill-opacity="{}"/>'
    sizes = (box.left, box.top, box.right - box.left, box.bottom - box.top)
    shown = FAINT + (STRONG - FAINT) * cell.strength
    return Markup(form).format(*(f"{size:.1f}" for size in sizes), cell.tone, f"{shown:.2f}")


def _name(row: HeatRow, frame: Box, top: float, beside: bool) -> Markup:
    if beside:
        room, right = frame.left - 12, frame.left - 10
        drawn = text(right, top + 17, _cut(row.name, room, TEXT), "label", "end")
        drawn += text(right, top + 30, _cut(row.detail, room, SMALL), "tick", "end")
    else:
        room = frame.right - len(row.detail) * SMALL - 12
        drawn = text(0, top + 12, _cut(row.name, room, TEXT), "label")
        drawn += text(frame.right - 2, top + 12, row.detail, "tick", "end")
    return Markup("<g>{}<title>{}</title></g>").format(drawn, row.name)


def _cut(words: str, room: float, each: float) -> str:
    fitting = int(room / each)
    return words if len(words) <= fitting else words[: fitting - 1] + "…"
