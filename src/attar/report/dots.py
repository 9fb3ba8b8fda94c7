"""A dot plot: names down, values across, every single value beside its mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from attar.report.drawing import TEXT, Axis, Box, circle, linear_ticks, segment, svg, text, x_ticks

ROW, ROW_UNDER_NAME = 38, 46
"""A row's height where names stand beside the plot, and where they stand above their row."""
SMALL = 6.0
"""A character's mean width at the type of details."""


@dataclass(frozen=True)
class DotRow:
    """One name with its values. spread: what the bar reaches to either side of the mean.

    detail: more of the name, in small type. role: `final`, `baseline` or `stage`, which says how it
    is drawn.
    """

    name: str
    values: Sequence[float]
    mean: float
    spread: float
    detail: str = ""
    role: str = "stage"


@dataclass(frozen=True)
class Mark:
    """A value that rows are held against, drawn as a line down the plot."""

    name: str
    value: float
    kind: str


def dots(
    rows: Sequence[DotRow],
    marks: Sequence[Mark],
    *,
    title: str,
    x_label: str,
    show: Callable[[float], str],
    width: int,
) -> Markup:
    """The rows in the order given. A mark far from all rows is drawn at the edge, with an arrow and
    its value, so that it doesn't press the rows together."""
    names = max(max(len(row.name) * TEXT, len(row.detail) * SMALL) for row in rows) + 16
    beside = names < 0.4 * width
    high = ROW if beside else ROW_UNDER_NAME
    top = 14 + 16 * len(marks)
    frame = Box(names if beside else 8, top, width - 16, top + high * len(rows))
    x = _axis(rows, marks, frame)
    ticks = linear_ticks(x.low, x.high, int((frame.right - frame.left) / 84))
    parts = [x_ticks(x, frame, show, ticks)]
    parts += [_mark(mark, x, frame, 12 + 16 * i, show) for i, mark in enumerate(marks)]
    for i, row in enumerate(rows):
        middle = frame.top + high * (i + (0.5 if beside else 0.66))
        parts.append(_row(row, x, frame, middle, beside, show))
    bottom = frame.bottom + 38
    parts.append(text((frame.left + frame.right) / 2, bottom - 2, x_label, "axis", "middle"))
    return svg(width, round(bottom + 6), title, parts)


def _axis(rows: Sequence[DotRow], marks: Sequence[Mark], frame: Box) -> Axis:
    ends = [v for row in rows for v in (*row.values, row.mean - row.spread, row.mean + row.spread)]
    low, high = min(ends), max(ends)
    span = (high - low) or 0.01
    near = [m.value for m in marks if low - span <= m.value <= high + span]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.06 * (high - low) or 0.005
    return Axis(low - pad, high + pad, frame.left, frame.right)


def _mark(mark: Mark, x: Axis, frame: Box, y: float, show: Callable[[float], str]) -> Markup:
    place = x(min(max(mark.value, x.low), x.high))
    name = mark.name
    if mark.value > x.high:
        name = f"{mark.name} {show(mark.value)} →"
    elif mark.value < x.low:
        name = f"← {mark.name} {show(mark.value)}"
    left = place + len(name) * TEXT + 6 > frame.right + 12
    line = segment(place, y - 9, place, frame.bottom, f"against {mark.kind}")
    shift, anchor = (-5, "end") if left else (5, "start")
    return line + text(place + shift, y, name, f"against-text {mark.kind}", anchor)


def _row(
    row: DotRow, x: Axis, frame: Box, y: float, beside: bool, show: Callable[[float], str]
) -> Markup:
    ends = x(row.mean - row.spread), x(row.mean + row.spread)
    tip = f"{row.name} {row.detail}".rstrip() + ": " + ", ".join(map(show, row.values))
    drawn = [
        segment(frame.left, y, frame.right, y, "grid"),
        *(circle(x(value), y + 7, 2.6, "single") for value in row.values),
        segment(ends[0], y - 3, ends[1], y - 3, "bar thick"),
        circle(x(row.mean), y - 3, 5, f"point {row.role}"),
        Markup("<title>{}</title>").format(tip),
    ]
    return _name(row, frame, y, beside) + Markup('<g class="mark {}">{}</g>').format(
        row.role, Markup("").join(drawn)
    )


def _name(row: DotRow, frame: Box, y: float, beside: bool) -> Markup:
    kind = f"label {row.role}"
    if beside:
        right, low = frame.left - 12, y + (0 if row.detail else 4)
        name = text(right, low, row.name, kind, "end")
        return name + (text(right, y + 13, row.detail, "tick", "end") if row.detail else Markup(""))
    after = frame.left + len(row.name) * TEXT + 12
    fitting = int((frame.right - after) / SMALL)
    cut = row.detail if len(row.detail) <= fitting else row.detail[: fitting - 1] + "…"
    return text(frame.left, y - 15, row.name, kind) + text(after, y - 15, cut, "tick")
