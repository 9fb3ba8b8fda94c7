"""Figures as people read them: the ledger's fractions in %, bytes in KB, times in ms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

ABSENT = "–"
Interval = Mapping[str, Any]
"""`value`, and where known `low`, `high` and `unit`: a ledger's `metric` or `drop`."""


def known(value: object) -> TypeGuard[float]:
    """Whether this is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric(value: float | None, unit: str = "fraction") -> str:
    """A metric's value: `99.12 %` for a fraction, else four digits."""
    if value is None or not known(value):
        return ABSENT
    return f"{100 * value:.2f} %" if unit == "fraction" else f"{value:.4g}"


def difference(value: float | None, unit: str = "fraction") -> str:
    """A difference of metrics, in points for a fraction: `0.08`; a minus sign where it gained."""
    if value is None or not known(value):
        return ABSENT
    text = f"{100 * value:.2f}" if unit == "fraction" else f"{value:.4g}"
    return text.replace("-0.00", "0.00").replace("-", "−")


def points(unit: str) -> str:
    """What a difference counts, to be written after it."""
    return " points" if unit == "fraction" else ""


def span(interval: Interval, show: Any, unit: str = "fraction") -> str:
    """`98.91 – 99.29 %`: an interval's bounds, its unit once; empty where they are unknown."""
    low, high = interval.get("low"), interval.get("high")
    if not known(low) or not known(high):
        return ""
    return f"{show(low, unit).removesuffix(' %')} to {show(high, unit)}"


def tick(value: float, unit: str = "fraction") -> str:
    """A metric on an axis: as few digits as it needs."""
    return f"{100 * value:.4g} %" if unit == "fraction" else f"{value:.4g}"


def share(value: float) -> str:
    """A share of a whole: `25 %`, `12.5 %`."""
    return f"{100 * value:.4g} %"


def size(count: float | None) -> str:
    """Bytes: `21.8 KB`. (Not `units.readable`: a page must not wait for torch's import.)"""
    if count is None or not known(count):
        return ABSENT
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"


def count(number: float | None) -> str:
    """A count: `12,345`, and from a million on `4.28 M`."""
    if number is None or not known(number):
        return ABSENT
    for limit, letter in ((1e9, " G"), (1e6, " M")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:,.0f}"


def milliseconds(value: float | None) -> str:
    """A time: `0.061 ms`."""
    return ABSENT if value is None or not known(value) else f"{_digits(value)} ms"


def megabytes(value: float | None) -> str:
    """`11.8 MB`."""
    return ABSENT if value is None or not known(value) else f"{_digits(value)} MB"


def times(value: float | None) -> str:
    """A ratio: `12.3×`."""
    return ABSENT if value is None or not known(value) else f"{_digits(value)}×"


def seconds(value: float | None) -> str:
    """A duration: `41 s`, `3 min 20 s`, `2 h 5 min`."""
    if value is None or not known(value):
        return ABSENT
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def tiny(value: float | None) -> str:
    """A small difference: `3.0e-04`; empty where unknown."""
    return f"{value:.1e}" if known(value) else ""


def compared(before: float | None, after: float | None, better: str, worse: str) -> str:
    """How much smaller or faster: `12.3× faster`; empty where unknown or as good as equal."""
    factor = ratio(before, after)
    if factor is None or abs(factor - 1) < 0.005:
        return ""
    return f"{times(factor)} {better}" if factor > 1 else f"{times(1 / factor)} {worse}"


def ratio(of: float | None, to: float | None) -> float | None:
    """`of / to`, where both are known and positive."""
    if of is None or to is None or not (known(of) and known(to)) or of <= 0 or to <= 0:
        return None
    return of / to


def _digits(value: float) -> str:
    """Three significant digits but, from 0.01 on, no more than three decimals."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 3 if abs(value) >= 0.01 else 6)}f}"
