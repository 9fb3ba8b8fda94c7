"""Did the teacher help? What each distillation's diagnosis saw, with the figures behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attar import numbers
from attar.report.record import RunRecord

TONES = {"helped": "kept", "no-difference": "likely", "harmed": "missed"}
"""How a verdict is coloured; what may be its causes is not."""
WHO = {"teacher": "teacher", "student": "student", "alone": "student alone"}


def is_diagnosis(value: object) -> bool:
    """Whether this is what `distill` found out about its teacher."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("findings"), list)
        and isinstance(value.get("measured"), Mapping)
    )


def diagnoses(run: RunRecord) -> list[dict[str, Any]]:
    """A section for each distillation: its findings, then tables of what was measured. The stage's
    name is its title where there are several."""
    found = run.details.get("found") or {}
    held = {
        str(place): values["diagnosis"]
        for place, values in found.items()
        if isinstance(values, Mapping) and is_diagnosis(values.get("diagnosis"))
    }
    return [
        {
            "title": place if len(held) > 1 else "",
            "findings": [_finding(one) for one in _mappings(value["findings"])],
            "compared": isinstance(value["measured"].get("gain"), Mapping),
            "blocks": list(_tables(value["measured"])),
        }
        for place, value in held.items()
    ]


def told(sections: list[dict[str, Any]]) -> set[str]:
    """The notes that say no more than these sections do."""
    findings = [one for section in sections for one in section["findings"]]
    return {f"{one['says']} {one['try']}".strip() for one in findings}


def _finding(one: Mapping[str, Any]) -> dict[str, str]:
    return {
        "tone": TONES.get(str(one.get("kind")), ""),
        "says": str(one.get("says", "")),
        "try": str(one.get("try", "")),
    }


def _tables(measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield _answers(measured)
    softened = list(_mappings(measured.get("softened")))
    if softened:
        yield _table(
            "The teacher’s targets on training examples",
            ["criterion", "T", "top class", "all others", "entropy of largest"],
            [
                [
                    str(one.get("term", "")),
                    _plain(one.get("temperature")),
                    *(_percent(one.get(key)) for key in ("top", "off_top", "evenness")),
                ]
                for one in softened
            ],
        )


def _answers(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Who is how often right, and how often as the teacher says, on examples learnt from and new
    ones."""
    metric, unit = str(measured.get("metric", "metric")), str(measured.get("unit", "fraction"))
    examples = _mapping(measured.get("examples"))
    rows = []
    for key, name in WHO.items():
        of = _mapping(measured.get(key))
        values = [numbers.metric(of.get(split), unit) for split in ("train", "validation")]
        if set(values) != {numbers.ABSENT}:
            rows.append([name, *values])
    agreement = _mapping(measured.get("agreement"))
    same = [numbers.metric(agreement.get(split)) for split in ("train", "validation")]
    if set(same) != {numbers.ABSENT}:
        rows.append(["same answers", *same])
    columns = [
        _counted(examples.get("train"), "training"),
        _counted(examples.get("validation"), "validation"),
    ]
    return _table(
        f"{metric.capitalize()}, and how often student and teacher answer the same",
        ["", *columns],
        rows,
    )


def _table(name: str, columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """As `parts.blocks` shows it."""
    numeric = [False, *(True for _ in columns[1:])]
    return {"kind": "table", "name": name, "columns": columns, "numeric": numeric, "rows": rows}


def _counted(count: Any, split: str) -> str:
    return f"{numbers.count(count)} {split}" if numbers.known(count) else split


def _percent(value: Any) -> str:
    """A share, with digits for small ones: 0.02 % is not 0."""
    return f"{100 * value:.3g} %" if numbers.known(value) else numbers.ABSENT


def _plain(value: Any) -> str:
    return f"{value:g}" if numbers.known(value) else numbers.ABSENT


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(values: Any) -> Iterator[Mapping[str, Any]]:
    for value in values if isinstance(values, list) else ():
        if isinstance(value, Mapping):
            yield value
