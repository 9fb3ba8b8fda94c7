"""The units a budget is written in: `0.5%`, `50KB`."""

from __future__ import annotations

import re

BYTES = {
    "B": 1,
    "KB": 1000, "MB": 1000**2, "GB": 1000**3,
    "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3,
}  # fmt: skip

LARGEST_PLAIN_SHARE = 0.1
"""A share above this must be written in %: whoever writes `0.5` most likely means 0.5 %."""

_NUMBER = r"\s*(\d+(?:\.\d*)?|\.\d+)\s*"


def parse_share(value: object) -> float:
    """A fraction from `0.5%` or `0.005`. Raises `ValueError`.

    Example:
        >>> parse_share("0.5%")
        0.005
    """
    if isinstance(value, str) and (match := re.fullmatch(_NUMBER + r"%\s*", value)):
        percent = float(match[1])
        if percent > 100:
            raise ValueError(f"{value.strip()} is more than everything: write a share up to 100%")
        return round(percent / 100, 12)
    number = _plain(value)
    if number is None or number < 0:
        raise ValueError(f"{value!r} is not a share: write it as 0.5% or 0.005")
    if number > LARGEST_PLAIN_SHARE:
        raise ValueError(
            f"{number:g} without a % would be {number:.0%} of all answers: write {number:g}% "
            f"or, if that is what you mean, {number * 100:g}%"
        )
    return number


def parse_size(value: object) -> int:
    """Bytes from `50KB`, `1.5 MiB` or a plain number of bytes. Raises `ValueError`.

    Example:
        >>> parse_size("50KB"), parse_size("1KiB")
        (50000, 1024)
    """
    number = _plain(value)
    if isinstance(value, str) and (
        match := re.fullmatch(_NUMBER + r"([KMG]?I?B)\s*", value.upper())
    ):
        number = float(match[1]) * BYTES[match[2]] if match[2] in BYTES else None
    if number is None or number < 1:
        raise ValueError(f"{value!r} is not a size: write it as 50KB, 2MB or 1MiB")
    return round(number)


def readable(count: int) -> str:
    """Bytes for people: `50 KB`.

    Example:
        >>> readable(50_000), readable(1_234_567)
        ('50 KB', '1.23 MB')
    """
    if count < 1000:
        return f"{count} B"
    for unit in ("KB", "MB", "GB"):
        number = count / BYTES[unit]
        if number < 999.5:
            break
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"


def parse_amount(value: object) -> float | str:
    """A positive number, or a share of what there is: `50%`. Raises `ValueError`."""
    if isinstance(value, str) and (share := re.fullmatch(r"\s*([\d.]+)\s*%\s*", value)):
        if not 0 < float(share[1]) < 100:
            raise ValueError(f"{value.strip()} is no share to keep: it lies between 0% and 100%")
        return f"{float(share[1]):g}%"
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{value!r} is no amount: write a number, or a share to keep, as in 50%")
    return float(value)


def parse_bytes(value: object) -> float | str:
    """As `parse_amount`, of bytes: `50KB`."""
    if isinstance(value, str) and not value.strip().endswith("%"):
        return float(parse_size(value))
    return parse_amount(value)


def _plain(value: object) -> float | None:
    """A number, or a string that is nothing but one (as `--set` may hand over)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.fullmatch(_NUMBER, value):
        return float(value)
    return None
