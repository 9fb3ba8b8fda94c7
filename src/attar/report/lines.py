"""A line plot: what is reached over a size, a line for each way, with bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from attar.report.drawing import Axis, Box, circle, named_axes, segment, svg, x_ticks, y_ticks

SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
    ((0, -5), (5, 0), (0, 5), (-5, 0)),
    ((0, -5), (4.6, 3.6), (-4.6, 3.6)),
)
"""Corners of each sign around its middle: a square, a diamond, a triangle; none is a circle."""
COLOURS = 6
"""How many the page's style has; further lines begin anew."""


@dataclass(frozen=True)
class Line:
    """One way, in points (x, mean, spread). colour: a number, or `None` for the page's ink.
    shape: a number; both begin anew where there are no more. dashed: what others are held against.
    """

    name: str
    points: Sequence[tuple[float, float, float]]
    colour: int | None = None
    shape: int = 0
    dashed: bool = False


def lines(
    series: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    width: int,
    height: int,
) -> Markup:
    """Lines over a logarithmic x, marked at the sizes that were tried; bars reach one spread to
    either side, and stand beside each other where lines meet."""
    frame = Box(58, 30, width - 22, height - 44)
    sizes = sorted({point[0] for line in series for point in line.points})
    ends = [mean + side * sd for line in series for _, mean, sd in line.points for side in (-1, 1)]
    pad = 0.06 * (max(ends) - min(ends)) or 0.005
    x = Axis(sizes[0] / 1.12, sizes[-1] * 1.12, frame.left, frame.right, log=True)
    y = Axis(min(ends) - pad, max(ends) + pad, frame.bottom, frame.top)
    middle = (len(series) - 1) / 2
    return svg(
        width,
        height,
        title,
        [
            y_ticks(y, frame, show_y, 5),
            x_ticks(x, frame, show_x, _apart(sizes, x)),
            named_axes(frame, x_label, y_label, height),
            *(_line(line, x, y, 3.0 * (i - middle)) for i, line in enumerate(series)),
        ],
    )


def swatch(line: Line) -> Markup:
    """A line's sign for a legend."""
    drawn = segment(1, 7, 27, 7, _class(line)) + _shape(14, 7, line.shape)
    form = '<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true"><g class="{}">{}</g></svg>'
    return Markup(form).format(_colour(line), drawn)


def _line(line: Line, x: Axis, y: Axis, aside: float) -> Markup:
    places = [(x(size) + aside, mean, sd) for size, mean, sd in sorted(line.points)]
    path = " ".join(f"{px:.1f},{y(mean):.1f}" for px, mean, _ in places)
    parts = [Markup('<polyline class="{}" points="{}"/>').format(_class(line), path)]
    for px, mean, sd in places:
        if sd:
            parts.append(segment(px, y(mean - sd), px, y(mean + sd), "bar"))
        parts.append(_shape(px, y(mean), line.shape))
    parts.append(Markup("<title>{}</title>").format(line.name))
    return Markup('<g class="{}">{}</g>').format(_colour(line), Markup("").join(parts))


def _class(line: Line) -> str:
    return "way dashed" if line.dashed else "way"


def _colour(line: Line) -> str:
    return "series plain" if line.colour is None else f"series c{line.colour % COLOURS}"


def _shape(x: float, y: float, shape: int) -> Markup:
    corners = SHAPES[shape % len(SHAPES)]
    if not corners:
        return circle(x, y, 4, "sign")
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return Markup('<polygon class="sign" points="{}"/>').format(points)


def _apart(sizes: Sequence[float], x: Axis) -> list[float]:
    """The sizes whose names don't run into each other, from the largest down."""
    kept: list[float] = []
    for size in reversed(sizes):
        if not kept or x(kept[-1]) - x(size) > 44:
            kept.append(size)
    return kept
