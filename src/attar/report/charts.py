"""The report's pictures: rows as points (what each costs), and training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from attar import numbers
from attar.report.drawing import (
    TEXT,
    WIDTHS,
    Axis,
    Box,
    circle,
    log_ticks,
    named_axes,
    segment,
    svg,
    text,
    x_ticks,
    y_ticks,
)

LINE = 14


@dataclass(frozen=True)
class Point:
    """A row in a scatter plot.

    role: `teacher`, `baseline`, `stage` or `final`, which says how it is drawn. x_high, low, high:
    where known, the ends of its bars.
    """

    label: str
    x: float
    y: float
    role: str = "stage"
    low: float | None = None
    high: float | None = None
    x_high: float | None = None
    tip: str = ""


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
    limit: float | None = None,
    y_limit: float | None = None,
    joined: bool = False,
    width: int = 560,
    height: int = 380,
) -> Markup:
    """Points over a logarithmic x and a linear y, labelled, with their bars.

    limit, y_limit: an x and a y that the person set, drawn as lines. joined: by a line, in order
    of x. A point far below the others is drawn at the lower edge with an arrow and its value, so
    that it doesn't flatten the rest.
    """
    floor = _floor(points)
    if y_limit is not None:  # what breaks it is drawn beyond it
        floor = min(floor, y_limit - 0.15 * abs(max(p.y for p in points) - y_limit))
    frame = Box(52, 30, width - 14, height - 44)
    xs = [p.x for p in points] + [p.x_high or p.x for p in points] + ([limit] if limit else [])
    x = Axis(min(xs) / 1.35, max(xs) * 1.35, frame.left, frame.right, log=True)
    asked = [y_limit] if y_limit is not None else []
    lows = [max(floor, p.y if p.low is None else p.low) for p in points] + asked
    highs = [p.y if p.high is None else p.high for p in points] + asked
    pad = 0.08 * (max(highs) - min(lows)) or 0.01
    y = Axis(min(lows) - pad, max(highs) + pad, frame.bottom, frame.top)
    places = [(x(p.x), y(max(p.y, floor))) for p in points]
    labels = [p.label + ("" if p.y >= floor else f" ↓ {show_y(p.y)}") for p in points]
    marks = [_mark(p, place, x, y, floor) for p, place in zip(points, places, strict=True)]
    return svg(
        width,
        height,
        title,
        [
            _grid(x, y, frame, show_x, show_y),
            named_axes(frame, x_label, y_label, height),
            _limit_line(limit, x, frame),
            _y_limit_line(y_limit, y, frame),
            _path(places) if joined else Markup(""),
            *marks,
            *_labelled(points, labels, places, frame),
        ],
    )


def both_widths(
    points: Sequence[Point],
    title: str,
    x_label: str,
    y_label: str,
    show_x: Callable[[float], str],
    unit: str,
    limit: float | None = None,
    *,
    y_limit: float | None = None,
    joined: bool = False,
) -> dict[str, Markup]:
    """The same scatter plot for wide and for narrow screens. unit: of the metric, which y is."""
    return {
        kind: scatter(
            points,
            title=title,
            x_label=x_label,
            y_label=y_label,
            show_x=show_x,
            show_y=lambda v: numbers.tick(v, unit),
            limit=limit,
            y_limit=y_limit,
            joined=joined,
            width=width,
            height=height,
        )
        for kind, (width, height) in WIDTHS.items()
    }


def curve(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    title: str,
    show_y: Callable[[float], str],
    best: tuple[float, float] | None = None,
    width: int = 340,
    height: int = 132,
) -> Markup:
    """Lines over epochs, each a (CSS class, points); `best` is marked."""
    frame = Box(50, 10, width - 10, height - 20)
    everything = [point for _, line in series for point in line]
    epochs = [e for e, _ in everything]
    values = [v for _, v in everything]
    pad = 0.06 * (max(values) - min(values)) or 0.01
    first, last = min(epochs), max(epochs)
    x = Axis(first, last if last > first else first + 1, frame.left, frame.right)
    y = Axis(min(values) - pad, max(values) + pad, frame.bottom, frame.top)
    parts = [y_ticks(y, frame, show_y, 3), _epoch_ticks(x, frame, first, last)]
    for name, line in series:
        if len(line) == 1:
            parts.append(circle(x(line[0][0]), y(line[0][1]), 2.5, f"dot {name}"))
        path = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in line)
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(name, path))
    if best is not None:
        parts.append(circle(x(best[0]), y(best[1]), 3.5, "dot best"))
    return svg(width, height, title, parts)


def _floor(points: Sequence[Point]) -> float:
    """Below it a point is an outlier: three times further down than the others spread."""
    values = sorted((p.y for p in points), reverse=True)
    if len(values) < 3:
        return -math.inf
    upper = values[: max(2, (2 * len(values) + 2) // 3)]
    bars = [p.high - p.low for p in points if p.high is not None and p.low is not None]
    spread = max(upper[0] - upper[-1], *bars, 1e-9) if bars else max(upper[0] - upper[-1], 1e-9)
    inside = [v for v in values if v >= upper[0] - 3 * spread]
    return min(inside) - 0.5 * spread if len(inside) < len(values) else -math.inf


def _grid(
    x: Axis, y: Axis, frame: Box, show_x: Callable[[float], str], show_y: Callable[[float], str]
) -> Markup:
    ticks = log_ticks(x.low, x.high, int((frame.right - frame.left) / 62))
    return y_ticks(y, frame, show_y, 5) + x_ticks(x, frame, show_x, ticks)


def _epoch_ticks(x: Axis, frame: Box, first: float, last: float) -> Markup:
    ends = [(first, "start" if last > first else "middle"), (last, "end")]
    shown = ends if last > first else [(first, "start")]
    return Markup("").join(
        text(x(epoch), frame.bottom + 15, f"{epoch:g}", "tick", anchor) for epoch, anchor in shown
    )


def _limit_line(limit: float | None, x: Axis, frame: Box) -> Markup:
    if limit is None:
        return Markup("")
    line = segment(x(limit), frame.top, x(limit), frame.bottom, "limit")
    left = x(limit) > (frame.left + frame.right) / 2
    place = x(limit) + (-5 if left else 5)
    return line + text(place, frame.top + 10, "budget", "limit-text", "end" if left else "start")


def _y_limit_line(limit: float | None, y: Axis, frame: Box) -> Markup:
    if limit is None:
        return Markup("")
    line = segment(frame.left, y(limit), frame.right, y(limit), "limit")
    return line + text(frame.left + 4, y(limit) - 5, "budget", "limit-text")


def _path(places: Sequence[tuple[float, float]]) -> Markup:
    points = " ".join(f"{px:.1f},{py:.1f}" for px, py in sorted(places))
    return Markup('<polyline class="joined" points="{}"/>').format(points)


def _mark(point: Point, place: tuple[float, float], x: Axis, y: Axis, floor: float) -> Markup:
    px, py = place
    parts = []
    if point.y >= floor and point.low is not None and point.high is not None:
        parts.append(segment(px, y(max(point.low, y.low)), px, y(point.high), "bar"))
    if point.x_high is not None:
        parts.append(segment(px, py, x(point.x_high), py, "bar"))
    parts.append(circle(px, py, 6.5 if point.role == "final" else 5, f"point {point.role}"))
    tip = Markup("<title>{}</title>").format(point.tip or point.label)
    return (
        Markup('<g class="mark {}">').format(point.role)
        + Markup("").join(parts)
        + tip
        + Markup("</g>")
    )


def _labelled(
    points: Sequence[Point],
    labels: Sequence[str],
    places: Sequence[tuple[float, float]],
    frame: Box,
) -> list[Markup]:
    """Each label where it covers the least, the most important placed first; a line leads to those
    that had to move away."""
    taken = [Box(px - 7, py - 7, px + 7, py + 7) for px, py in places]
    rank = {"final": 0, "teacher": 1, "baseline": 2, "stage": 3}
    drawn: list[Markup] = []
    for i in sorted(range(len(points)), key=lambda i: rank.get(points[i].role, 3)):
        px, py = places[i]
        box = min(
            _candidates(px, py, len(labels[i]) * TEXT),
            key=lambda c: (
                sum(c.overlap(t) for t in taken)
                + 40 * c.outside(frame)
                + 0.8 * math.hypot((c.left + c.right) / 2 - px, (c.top + c.bottom) / 2 - py)
            ),
        )
        taken.append(box)
        middle = (box.left + box.right) / 2
        if abs((box.top + box.bottom) / 2 - py) > 22:
            edge = box.top if box.top > py else box.bottom
            near = min(max(px, box.left), box.right)
            drawn.append(segment(px, py, near, edge, "lead"))
        drawn.append(text(middle, box.bottom - 3, labels[i], f"label {points[i].role}", "middle"))
    return drawn


def _candidates(px: float, py: float, width: float) -> list[Box]:
    boxes = []
    for dy in (0, -17, 17, -32, 32, -47, 47, -62, 62):
        for dx in (0, 11, -11):
            if dy == 0 and dx == 0:
                continue
            left = px - width / 2 if dx == 0 else px + dx if dx > 0 else px + dx - width
            top = py + dy - LINE / 2
            boxes.append(Box(left, top, left + width, top + LINE))
    return boxes
