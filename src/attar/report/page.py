"""A run as one page: `report.html`, self-contained, for any screen, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attar.report import curves, diagnosis, found, inside, sections, sharing, verdict
from attar.report.benches import beside, read_bench
from attar.report.record import RunRecord, read_run
from attar.store import write_whole


def write_report(run_folder: Path, benches: Sequence[Path] = ()) -> Path:
    """Writes `report.html` into a run's folder from what is there: `ledger.json`, `log.jsonl`,
    `recipe.yaml`, `details.json`. What is missing is left out: an interrupted run has a page too.

    benches: files that `attar bench --out` wrote, shown beside the build machine's figures.

    Raises `UsageError` for a folder without a run, or a file that is no bench of its bundle,
    `StorageError` where the page can't be written.
    """
    folder = Path(run_folder)
    path = folder / "report.html"
    run = read_run(folder)
    html = render_run(run, [read_bench(bench, run) for bench in benches])
    write_whole(path, html)
    return path


def render_run(run: RunRecord, benches: Sequence[dict[str, Any]] = ()) -> str:
    """The page's HTML. benches: as `read_bench` returns them."""
    environment = run.ledger.get("environment") or {}
    diagnoses = diagnosis.diagnoses(run)
    said_there = diagnosis.told(diagnoses)
    return render(
        "report.html.j2",
        title=run.name,
        task=run.ledger.get("task"),
        seed=run.ledger.get("seed"),
        version=run.ledger.get("attar"),
        recipe=run.recipe,
        finished=run.finished,
        sentence=verdict.sentence(run),
        loss=verdict.loss_sentence(run),
        tiles=verdict.tiles(run),
        split=verdict.split(run),
        budget=verdict.budget(run),
        rows=sections.ledger(run),
        further=sections.further(run),
        pictures=sections.pictures(run),
        classes=sections.classes(run),
        wrong=sections.wrong(run),
        diagnoses=diagnoses,
        sharings=sharing.sharings(run),
        adjusted=found.adjusted(run),
        trainings=curves.trainings(run),
        insides=inside.insides(run),
        benches=beside(run, benches),
        operators=found.shown(run.details.get("operators") or {}),
        notes=[note for note in sections.notes(run) if note not in said_there],
        environment=found.shown(environment),
        place=_place(run.folder),
        has_bundle=(run.folder / "bundle").is_dir(),
        metric_name=verdict.metric_name(run),
        unit=verdict.unit_of(run.final),
    )


def render(template: str, **values: Any) -> str:
    """A template of this package, filled; every value is escaped unless it is our own markup."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    from attar import numbers

    environment = Environment(
        loader=PackageLoader("attar.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source, _, _ = PackageLoader("attar.report").get_source(environment, "style.css")
    environment.globals.update(numbers=numbers, style=Markup(source))
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return environment


def _place(folder: Path) -> str:
    """The run's folder as a person types it: relative to where they are, if it is below."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return folder.resolve().name
