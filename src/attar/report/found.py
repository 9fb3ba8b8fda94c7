"""What the stages looked for and found, whatever it is: searches as such, all else by its shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attar import numbers
from attar.report.diagnosis import is_diagnosis
from attar.report.inside import is_inside
from attar.report.precision import is_precision, precision
from attar.report.record import RunRecord
from attar.report.sharing import shown_in_section
from attar.report.verdict import unit_of


def adjusted(run: RunRecord) -> list[dict[str, Any]]:
    """What each stage looked for and found."""
    sections = []
    found = run.details.get("found") or _found_in_log(run)
    for place, values in found.items():
        if not isinstance(values, dict) or not values:
            continue
        tried = values.get("tried")
        trials = _trials(tried, run) if isinstance(tried, list) else None
        shown_apart = {
            k
            for k, v in values.items()
            if is_diagnosis(v) or is_inside(v) or (k == "tried" and trials)
        }
        elsewhere = shown_in_section(values)
        if "tried" in elsewhere:
            trials = None
        unit = unit_of(run.final)
        rest = {k: _said(k, v, unit) for k, v in values.items() if k not in shown_apart | elsewhere}
        if not (rest or trials):
            continue
        number, _, stage = str(place).partition("-")
        title = stage if number.isdigit() and stage else str(place)
        sections.append({"title": title, "trials": trials, "values": shown(rest)})
    return sections


def shown(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Any JSON object as what a page can show: facts, lists, tables."""
    blocks: list[dict[str, Any]] = []
    facts = {k: v for k, v in values.items() if _scalar(v)}
    if facts:
        pairs = [(human(k), plain(v)) for k, v in facts.items()]
        blocks.append({"kind": "facts", "pairs": pairs})
    blocks += [_block(human(k), v) for k, v in values.items() if not _scalar(v) and v]
    return blocks


def plain(value: Any) -> str:
    """A JSON scalar as text."""
    if value is None:
        return numbers.ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def human(key: object) -> str:
    """A key as words."""
    return str(key).replace("_", " ")


def _found_in_log(run: RunRecord) -> dict[str, Any]:
    """The trials that the log tells of, for a run that wrote no details yet."""
    found: dict[str, dict[str, list[Any]]] = {}
    stage = "search"
    for event in run.events:
        if event["event"] == "stage":
            stage = str(event.get("name", stage))
        elif event["event"] == "trial" and "bytes" not in event:  # of a list, all are tried first
            found.setdefault(stage, {"tried": []})["tried"].append(event)
    return found


def _trials(tried: Iterable[Any], run: RunRecord) -> dict[str, Any] | None:
    trials = [t for t in tried if isinstance(t, dict) and "drop" in t]
    if not trials:
        return None
    unit = unit_of(run.final)
    kept = [t for t in trials if t.get("kept")]
    chosen = kept[-1].get("value") if kept else None
    setting = str(trials[0].get("setting", "value"))
    limit = (run.ledger.get("budget") or {}).get("max_drop")
    within = f" within {numbers.difference(limit, unit)}{numbers.points(unit)}" if limit else ""
    said = (
        f"{setting} = {plain(chosen)}: the strongest of {len(trials)} tried "
        f"whose drop on validation stayed{within or ' within the budget'}."
        if kept
        else f"None of {len(trials)} tried kept the drop on validation{within}: left as it was."
    )
    return {
        "setting": setting,
        "said": said,
        "rows": [
            {
                "value": plain(t.get("value")),
                "metric": numbers.metric(t.get("metric"), unit),
                "drop": numbers.difference(t.get("drop"), unit),
                "kept": bool(t.get("kept")),
                "chosen": bool(t.get("kept")) and t.get("value") == chosen,
            }
            for t in trials
        ],
    }


def _planned(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a plan: layers that lose channels together."""
    layers, (before, after) = part["layers"], part["widths"][part["layers"][0]]
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return {
        "layers": layers[0] + more,
        "channels": f"{before} → {after}",
        "loses": part["lost"],
        "saves": f"{part['saves']:.1%}",
    }


def _out(block: dict[str, Any]) -> dict[str, Any]:
    """A block that a plan takes out, as a row beside parts."""
    saves = f"{block['saves']:.1%}"
    gone = "taken out whole"
    return {"layers": block["path"], "channels": gone, "loses": block["lost"], "saves": saves}


def _said(key: str, value: Any, unit: str) -> Any:
    """The teacher's fastest form as a sentence, a plan of what to prune without the channels'
    numbers, a plan of layers' precision as tables; all else as it is. unit: of the metric."""
    if is_precision(value):
        return precision(value, unit)
    if key == "plan" and isinstance(value, dict) and "parts" in value:
        blocks = [_out(block) for block in value.get("blocks", [])]
        return [*blocks, *(_planned(part) for part in value["parts"])]
    if key != "teacher" or not isinstance(value, dict) or "form" not in value:
        return value
    if value["form"] == "nobody":
        return "was not asked: no criterion reads its answers"
    form, seconds, views = value["form"], value.get("seconds") or {}, value.get("views")
    factor = numbers.ratio(seconds.get("original"), seconds.get(form))
    said = "answers as it is" if form == "original" else f"answers as {form}"
    if form != "original" and factor is not None:
        said += f", {factor:.1f}× as fast as the original"
    elif len(seconds) > 1:
        said += f", no slower than as {' or '.join(k for k in seconds if k != 'original')}"
    return f"{said}; {_views(views)} stored" if isinstance(views, int) else said


def _views(count: int) -> str:
    return "one view of each example" if count == 1 else f"{count} views of each example"


def _block(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        rows = [{"": k, **v} for k, v in value.items() if isinstance(v, dict)]
        if len(rows) == len(value) and _flat(rows):
            return _table(name, rows)
        if all(_scalar(v) for v in value.values()):
            return {
                "kind": "facts",
                "name": name,
                "pairs": [(k, plain(v)) for k, v in value.items()],
            }
        return {"kind": "group", "name": name, "blocks": shown(value)}
    if isinstance(value, list):
        if all(_scalar(v) for v in value):
            return {"kind": "list", "name": name, "items": [plain(v) for v in value]}
        if all(isinstance(v, dict) for v in value) and _flat(value):
            return _table(name, value)
    return {"kind": "json", "name": name, "value": value}


def _flat(rows: list[dict[str, Any]]) -> bool:
    return all(_scalar(v) for row in rows for v in row.values())


def _table(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "kind": "table",
        "name": name,
        "columns": [human(key) for key in keys],
        "numeric": [all(numbers.known(row.get(key, 0)) for row in rows) for key in keys],
        "rows": [[plain(row.get(key)) for key in keys] for row in rows],
    }


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
