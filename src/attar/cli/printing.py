"""How commands print what they found: JSON for programs, aligned pairs for people."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer

UNITS = {"ms": "ms", "mb": "MB", "seconds": "s", "bytes": "B"}


def print_json(value: Any, indent: int | None = 1) -> None:
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def print_pairs(pairs: Mapping[str, Any]) -> None:
    """Name and value, a line each, names aligned; what is inside a mapping is indented."""
    print_lines(_lines(pairs))


def _lines(pairs: Mapping[str, Any], indent: int = 0) -> list[str]:
    width = max((len(str(name)) for name, value in pairs.items() if not _nested(value)), default=0)
    lines = []
    for name, value in pairs.items():
        head = " " * indent + str(name).replace("_", " ")
        if isinstance(value, Mapping) and value:
            lines += [head, *_lines(value, indent + 2)]
        elif _nested(value):
            lines += [head, *(f"{' ' * (indent + 2)}- {_shown(item)}" for item in value)]
        else:
            lines += _wrapped(f"{head:{indent + width}}  ", _shown(value, str(name)))
    return lines


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list) and bool(value)


def _shown(value: Any, name: str = "") -> str:
    """A value for people; a figure's unit is the last word of its name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        unit = name.rpartition("_")[2]
        if unit == "bytes" and value >= 1000:
            power = 3 if value >= 1e9 else 2 if value >= 1e6 else 1
            return f"{value / 1000**power:.3g} {' KMG'[power]}B"
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        return f"{shown} {UNITS[unit]}" if unit in UNITS else shown
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner, str(key))}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "unknown" if value is None else str(value)


def _wrapped(head: str, text: str) -> list[str]:
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    if len(head) + 20 > width:
        return [head + text]
    rest = " " * len(head)
    return textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]  # fmt: skip


def print_standings(comparison: Mapping[str, Any]) -> None:
    """Criteria side by side, in the order given; `comparison` is what `comparison.json` holds."""
    from rich.console import Console
    from rich.table import Table

    from attar import numbers

    metric, ranked = comparison["metric"], comparison["standings"]
    unit = metric["unit"]

    def spread(one: Mapping[str, Any], name: str, show: Callable[[float, str], str]) -> str:
        if one[name] is None:
            return ""
        mean, sd = show(one[name], unit), numbers.difference(one[f"{name}_sd"], unit)
        return f"{mean} ± {sd}" if one["seeds"] > 1 else mean

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    gain = f"gain,{numbers.points(unit)}".rstrip(",")
    columns = ["criterion", "seeds", f"validation {metric['name']}", f"test {metric['name']}", gain]
    if bounded := any(one["gain_low"] is not None for one in ranked):
        columns.append("95 % interval")
    if in_print := any(one["published"] for one in ranked):
        columns.append("published")
    shown.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        shown.add_column(name, justify="right", no_wrap=True)
    for one in ranked:
        bounds = {"low": one["gain_low"], "high": one["gain_high"]}
        figure = one["published"]
        shown.add_row(
            one["label"],
            str(one["seeds"]),
            spread(one, "validation", numbers.metric),
            spread(one, "test", numbers.metric),
            spread(one, "gain", numbers.difference),
            *([numbers.span(bounds, numbers.difference, unit)] if bounded else []),
            *([numbers.metric(figure["value"]) if figure else ""] if in_print else []),
        )
    Console(highlight=False).print(shown)


def print_sensitivity(record: Mapping[str, Any]) -> None:
    """What each layer loses at each ratio; `record` is what `sensitivity.json` holds."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from attar import numbers
    from attar.report.sensitivity import cautions, measured, sentences, tolerated

    unit, limit = record["metric"]["unit"], record["limit"]

    def drop(cell: Mapping[str, Any]) -> str:
        if not cell["removed"]:
            return numbers.ABSENT
        kept = cell["drop"] is not None and cell["drop"] <= limit
        return f"[{'green' if kept else 'red'}]{numbers.difference(cell['drop'], unit)}[/]"

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("layers", overflow="fold", ratio=1)
    columns = [f"{record['granularity']}s", *(numbers.share(r) for r in record["ratios"])]
    for name in (*columns, "can lose"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in record["rows"]:
        cells = [drop(cell) for cell in row["cells"]]
        shown.add_row(escape(row["name"]), f"{row['size']:,}", *cells, tolerated(row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    print_lines([f"{measured(record)}; drops{_counted(unit)} by the share removed:", ""])
    console.print(shown)
    print_lines(["", *sentences(record), *cautions(record)])
    if record["kept"]:
        print_lines(f"not pruned: {layer}: {why}" for layer, why in record["kept"].items())


def _counted(unit: str) -> str:
    """What drops are counted in, to be written after the word."""
    from attar import numbers

    counted = numbers.points(unit)
    return f" in{counted}" if counted else ""
