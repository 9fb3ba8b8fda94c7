"""What every picture is drawn with: boxes, axes, and SVG's few shapes.

Pictures take their colours and type from the page, so that they fit both themes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

TEXT = 6.4
"""A character's mean width at the charts' 11.5 px type."""
WIDTHS = {"wide": (560, 380), "narrow": (348, 330)}
"""Every picture that wants room is drawn twice; the page shows the one that fits."""


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in px."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def outside(self, frame: Box) -> float:
        """How much of it, in px, sticks out of `frame`."""
        over = (
            frame.left - self.left,
            self.right - frame.right,
            frame.top - self.top,
            self.bottom - frame.bottom,
        )
        return sum(max(0.0, o) for o in over)


@dataclass(frozen=True)
class Axis:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def svg(width: int, height: int, title: str, parts: Sequence[Markup]) -> Markup:
    """The whole picture; `title` is what a screen reader says of it."""
    head = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">'
    return Markup(head).format(width, height, title) + Markup("").join(parts) + Markup("</svg>")


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    """kind: the CSS class, here and in all that follow."""
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", kind, anchor, words
    )


def segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    form = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>'
    return Markup(form.format(x1, y1, x2, y2, escape(kind)))


def circle(x: float, y: float, radius: float, kind: str) -> Markup:
    form = '<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}"/>'
    return Markup(form.format(x, y, radius, escape(kind)))


def x_ticks(x: Axis, frame: Box, show: Callable[[float], str], ticks: Sequence[float]) -> Markup:
    """Grid lines down the frame at `ticks`, each with its value below."""
    parts = []
    for tick in ticks:
        parts.append(segment(x(tick), frame.top, x(tick), frame.bottom, "grid"))
        parts.append(text(x(tick), frame.bottom + 16, show(tick), "tick", "middle"))
    return Markup("").join(parts)


def y_ticks(y: Axis, frame: Box, show: Callable[[float], str], count: int) -> Markup:
    """About `count` grid lines across the frame, each with its value beside it."""
    parts = []
    for tick in linear_ticks(y.low, y.high, count):
        parts.append(segment(frame.left, y(tick), frame.right, y(tick), "grid"))
        parts.append(text(frame.left - 7, y(tick) + 4, show(tick), "tick", "end"))
    return Markup("").join(parts)


def named_axes(frame: Box, x_label: str, y_label: str, height: int) -> Markup:
    """What x counts, below the frame, and what y counts, above it."""
    middle = (frame.left + frame.right) / 2
    return text(4, 14, y_label, "axis") + text(middle, height - 8, x_label, "axis", "middle")


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values from `low` to `high`."""
    rough = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values from `low` to `high` (positive), spread by logarithms."""
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(ticks) <= most:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / most))]
