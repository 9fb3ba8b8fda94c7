"""What `attar bench` measured elsewhere, beside the machine that built the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attar import numbers
from attar.errors import UsageError
from attar.report.record import RunRecord

SCHEMA = 1
FIELDS = {"golden": Mapping, "latency": Mapping, "environment": Mapping, "model_sha256": str}
"""What a bench must have, and as what."""


def read_bench(path: Path, run: RunRecord) -> dict[str, Any]:
    """A file that `attar bench --out` or a bundle's `predict.py --bench` wrote. Raises `UsageError`
    for one that can't be read, is no bench, or is of another bundle than the run's."""
    how = "write it with `attar bench BUNDLE --out FILE`"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{path} is damaged, or no JSON: {how}") from None
    if not isinstance(found, dict) or found.get("attar_bench") is None:
        raise UsageError(f"{path} is not a bench of a bundle: {how}")
    if found["attar_bench"] != SCHEMA:
        raise UsageError(
            f"{path} has the form {found['attar_bench']!r}; this Attar reads {SCHEMA}: bench again"
        )
    lacking = [name for name, kind in FIELDS.items() if not isinstance(found.get(name), kind)]
    if lacking:
        raise UsageError(f"{path} lacks {', '.join(lacking)}: bench again")
    expected = _model_sha256(run.folder / "bundle" / "manifest.json")
    if expected and found["model_sha256"] != expected:
        raise UsageError(f"{path} was measured on another model than {run.folder / 'bundle'} holds")
    return found


def beside(run: RunRecord, benches: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows for the page, the build machine first; none where there is nothing to compare."""
    final = run.final
    if not benches or final is None:
        return []
    latencies = [one for one in final.get("latency") or [] if isinstance(one, Mapping)]
    here = {
        "latency": latencies[0] if latencies else {},
        "memory_mb": final.get("memory_mb"),
        "environment": run.ledger.get("environment") or {},
    }
    rows = [{**_row(here, None), "answers": "made here", "tone": ""}]
    for bench in benches:
        latency = bench["latency"]
        same = [one for one in latencies if _asked(one) == _asked(latency)]
        rows.append(_row(bench, same[0] if same else None))
    return rows


def _asked(latency: Mapping[str, Any]) -> tuple[Any, Any]:
    return latency.get("batch"), latency.get("threads")


def _row(bench: Mapping[str, Any], against: Mapping[str, Any] | None) -> dict[str, str]:
    latency, environment = bench["latency"], bench["environment"]
    golden = bench.get("golden") or {}
    name = str(latency.get("runtime", ""))
    packages = environment.get("packages")
    release = packages.get(name, "") if isinstance(packages, Mapping) else ""
    agrees = bool(golden.get("agrees"))
    differ = f"differ by up to {numbers.tiny(golden.get('max_abs_diff'))}"
    p50 = latency.get("p50_ms")
    return {
        "machine": str(environment.get("cpu") or "unknown processor"),
        "system": f"{environment.get('system', '')}, {environment.get('cores', '?')} cores",
        "runtime": f"{name} {release}".strip(),
        "threads": str(latency.get("threads", numbers.ABSENT)),
        "batch": str(latency.get("batch", numbers.ABSENT)),
        "p50": numbers.milliseconds(p50).removesuffix(" ms"),
        "p90": numbers.milliseconds(latency.get("p90_ms")).removesuffix(" ms"),
        "ratio": numbers.compared(against.get("p50_ms"), p50, "faster", "slower")
        if against
        else "",
        "memory": numbers.megabytes(bench.get("memory_mb")),
        "answers": f"all {golden.get('n', '')} agree" if agrees else differ,
        "tone": "kept" if agrees else "missed",
    }


def _model_sha256(manifest: Path) -> str | None:
    """The checksum of the bundle's main file, where the bundle is there."""
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["files"][0]["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
