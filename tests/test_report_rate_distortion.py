"""The report on weight sharing: the curve of bytes against the metric, and the layers."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

import report_fixture as fixture
from attar.report.page import write_report
from attar.report.rate_distortion import rate_distortion
from attar.report.record import read_run
from attar.report.sharing import sharings


def tried(setting: str, *points: tuple[float, int, float], chosen: int) -> list[dict[str, Any]]:
    """Points (value, bytes, accuracy) of a list, against a teacher of 0.992 that may lose 0.005."""
    return [
        {
            setting: value,
            "bytes": size,
            "metric": metric,
            "drop": 0.992 - metric,
            "kept": 0.992 - metric <= 0.005,
            "chosen": i == chosen,
        }
        for i, (value, size, metric) in enumerate(points)
    ]


RATES = tried("rate", (0.003, 5210, 0.991), (0.03, 3140, 0.9885), (0.3, 1720, 0.952), chosen=1)


def layer(weights: int, values: int = 16, **more: Any) -> dict[str, Any]:
    shared = {"values": values, "bits": 4, "weights": weights, "distortion": 0.0123}
    return {**shared, "codebooks": 1, "length": 1, "single": None, **more}


LAYERS = {"first.weight": layer(288, 8), "last.weight": layer(9216), "first.bias": layer(32, 5)}


def by_rate(**more: Any) -> dict[str, Any]:
    found = {"method": "rate", "rate": 0.03, "layers": LAYERS, "distortion": 0.0123}
    return {**found, "packed_bytes": 3140, "curve": RATES, "limit": 0.987, **more}


def folder_with(place: Path, found: dict[str, Any], **parts: Any) -> Path:
    """A run whose share stage found this."""
    details = fixture.details()
    details["found"]["03-share"] = found
    return fixture.write_run(place, details=details, **parts)


def section(place: Path, found: dict[str, Any], **parts: Any) -> dict[str, Any]:
    (only,) = sharings(read_run(folder_with(place, found, **parts)))
    return only


def page(place: Path, found: dict[str, Any], **parts: Any) -> str:
    return write_report(folder_with(place, found, **parts)).read_text()


def budget(**limits: Any) -> dict[str, Any]:
    return {"ledger": {**fixture.ledger(), "budget": limits}}


def test_the_sentence_says_which_was_chosen_and_why(tmp_path):
    said = section(tmp_path, by_rate())["curve"]["said"]
    assert said.startswith(
        "rate = 0.03: of 3 tried, the smallest file that kept the drop in accuracy within 0.50 "
        "points."
    )
    assert "on validation" in said


def test_where_none_keeps_the_budget_the_sentence_says_so(tmp_path):
    points = copy.deepcopy(RATES)
    for i, point in enumerate(points):
        point |= {"kept": False, "chosen": i == 0}
    said = section(tmp_path, by_rate(curve=points))["curve"]["said"]
    assert said.startswith(
        "None of 3 tried kept the drop in accuracy within 0.50 points: rate = 0.003, the best of "
        "them, was taken."
    )


def test_without_a_budget_the_best_was_taken(tmp_path):
    points = [{**p, "kept": None, "chosen": p["rate"] == 0.003} for p in RATES]
    found = by_rate(curve=points)
    del found["limit"]
    shown = section(tmp_path, found, **budget())
    assert shown["curve"]["said"].startswith("rate = 0.003: of 3 tried, the best accuracy; no bu")
    assert [row["verdict"] for row in shown["curve"]["rows"]] == ["", "", "chosen"]
    assert 'class="limit"' not in shown["curve"]["picture"]["svg"]["wide"]


def test_a_search_says_that_its_trials_were_shorter_and_hides_its_list(tmp_path):
    points = tried("bits", (4, 5100, 0.99), (2, 2900, 0.96), (3, 4020, 0.988), chosen=2)
    trials = [
        {"setting": "bits", "value": p["bits"], **{k: p[k] for k in ("metric", "drop", "kept")}}
        for p in points
    ]
    found = {"method": "kmeans", "bits": 3, "layers": LAYERS, "curve": points, "tried": trials}
    said = section(tmp_path, found)["curve"]["said"]
    assert said.startswith("bits = 3: of 3 tried") and "a third as long" in said
    assert "the strongest of 3" not in page(tmp_path, found)


def test_a_search_that_shared_nothing_has_its_curve(tmp_path):
    points = tried("bits", (4, 5100, 0.9), (6, 6900, 0.91), (8, 9020, 0.93), chosen=-1)
    shown = section(tmp_path, {"method": "kmeans", "curve": points, "tried": []})
    assert shown["curve"]["said"].startswith(
        "None of 3 tried kept the drop in accuracy within 0.50 points: nothing is shared."
    )
    assert shown["said"] == "" and shown["layers"] is None


def test_the_picture_has_every_setting_the_chosen_and_the_limit(tmp_path):
    drawn = section(tmp_path, by_rate())["curve"]["picture"]["svg"]
    for svg in drawn.values():
        labels = re.findall(r'class="label (\w+)"[^>]*>([^<]+)<', svg)
        assert {(role, text.partition(" ↓")[0]) for role, text in labels} == {
            ("final", "rate 0.03"),
            ("stage", "rate 0.003"),
            ("stage", "rate 0.3"),
        }
        assert svg.count('class="limit"') == 1
        assert "bytes of the packed file" in svg and "accuracy, on validation" in svg


def places(svg: str) -> dict[str, tuple[float, float]]:
    """Each point's place in px, by its role."""
    form = r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="point (\w+)"'
    return {role: (float(x), float(y)) for x, y, role in re.findall(form, svg)}


def test_fewer_bytes_are_further_left_by_their_logarithm(tmp_path):
    points = tried("bits", (1, 1000, 0.99), (3, 4000, 0.991), (2, 2000, 0.9905), chosen=2)
    found = {"method": "kmeans", "curve": points, "limit": 0.987, "layers": LAYERS}
    svg = section(tmp_path, found)["curve"]["picture"]["svg"]["wide"]
    circles = re.findall(r'<circle cx="([\d.]+)"', svg)
    left, middle, right = map(float, circles)
    assert middle - left == pytest.approx(right - middle, abs=0.3) and left < middle
    assert "1 bit<" in svg and "2 bits<" in svg


def test_the_limit_lies_between_what_keeps_it_and_what_does_not(tmp_path):
    points = tried("rate", (0.01, 4000, 0.99), (0.1, 2000, 0.98), chosen=0)
    svg = section(tmp_path, by_rate(curve=points))["curve"]["picture"]["svg"]["narrow"]
    (line,) = re.findall(r'y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" class="limit"', svg)
    drawn = places(svg)
    assert line[0] == line[1]
    assert drawn["final"][1] < float(line[0]) < drawn["stage"][1]


def test_what_breaks_the_limit_is_below_it_however_far(tmp_path):
    for svg in section(tmp_path, by_rate())["curve"]["picture"]["svg"].values():
        (line,) = re.findall(r'y1="([\d.]+)" x2="[\d.]+" y2="[\d.]+" class="limit"', svg)
        heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)]
        assert heights[0] > float(line) > heights[1] > heights[2]


def test_the_table_says_the_same_as_the_picture_smallest_file_first(tmp_path):
    rows = section(tmp_path, by_rate())["curve"]["rows"]
    shown = [(r["value"], r["size"], r["metric"], r["drop"], r["verdict"]) for r in rows]
    assert shown == [
        ("0.3", "1.72 KB", "95.20 %", "4.00", "broken"),
        ("0.03", "3.14 KB", "98.85 %", "0.35", "kept, chosen"),
        ("0.003", "5.21 KB", "99.10 %", "0.10", "kept"),
    ]


def test_one_point_is_a_table_without_a_picture(tmp_path):
    found = by_rate(curve=tried("rate", (0.1, 2000, 0.99), chosen=0))
    shown = section(tmp_path, found)["curve"]
    assert shown["picture"] is None and len(shown["rows"]) == 1
    assert "Bytes against accuracy" in page(tmp_path, found)


def test_a_metric_that_is_no_number_is_in_the_table_only(tmp_path):
    points = copy.deepcopy(RATES)
    points[2] |= {"metric": float("nan"), "drop": float("nan")}
    shown = section(tmp_path, by_rate(curve=points))["curve"]
    assert shown["rows"][0]["metric"] == "–"
    assert shown["picture"]["svg"]["wide"].count("<circle") == 2


def test_layers_are_the_largest_first_with_what_says_something(tmp_path):
    shown = section(tmp_path, by_rate())
    table = shown["layers"]["shown"]
    assert table["columns"] == ["layer", "weights", "values", "bits of an index", "distortion"]
    assert [row[0] for row in table["rows"]] == ["last.weight", "first.weight", "first.bias"]
    assert table["rows"][0] == ["last.weight", "9,216", "16", "4", "0.0123"]
    assert shown["layers"]["folded"] is None
    assert "9,536 weights in 3 layers, of 5 to 16 values" in shown["said"]


def test_codebooks_runs_and_reasons_have_columns_where_there_are_any(tmp_path):
    layers = {
        "a": layer(4096, 256, length=4, codebooks=0),
        "b": layer(90, single="its 9 inputs aren't a multiple of 4"),
    }
    table = section(tmp_path, {"method": "kmeans", "bits": 4, "layers": layers})["layers"]["shown"]
    a, b = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
    assert (a["weights an index"], a["codebooks"], a["why not in runs"]) == ("4", "in common", "")
    assert b["codebooks"] == "1" and b["why not in runs"].startswith("its 9 inputs")


def test_hashed_layers_have_weights_and_values(tmp_path):
    layers = {"a": {"weights": 9216, "values": 576}, "b": {"weights": 320, "values": 20}}
    shown = section(tmp_path, {"method": "hashed", "layers": layers})
    assert shown["layers"]["shown"]["columns"] == ["layer", "weights", "values"]
    assert "hash" in shown["said"] and shown["curve"] is None


def test_beyond_a_dozen_layers_are_folded_away(tmp_path):
    layers = {f"block{i}.weight": layer(100 + i) for i in range(15)}
    html = page(tmp_path, by_rate(layers=layers))
    before, _, after = html.partition("<summary>the other 3 layers</summary>")
    assert "block3.weight" in before and "block2.weight" not in before
    assert all(f"block{i}.weight" in after for i in range(3))


def test_what_the_section_shows_is_not_shown_again(tmp_path):
    html = page(tmp_path, by_rate(teacher={"form": "original"}))
    assert html.count("last.weight") == 1
    adjusted = html.partition("What was adjusted, and why")[2].partition("</section>")[0]
    assert "03-share" not in adjusted and "answers as it is" in adjusted


def test_each_of_several_share_stages_has_a_section(tmp_path):
    details = fixture.details()
    details["found"] = {"01-share": by_rate(), "03-share": by_rate()}
    run = read_run(fixture.write_run(tmp_path, details=details))
    titles = [one["title"] for one in sharings(run)]
    assert titles == ["What the weights share (01-share)", "What the weights share (03-share)"]


def test_a_run_from_before_there_were_methods_looks_as_it_did(tmp_path):
    run = read_run(fixture.write_run(tmp_path))
    assert sharings(run) == []
    html = write_report(tmp_path).read_text()
    assert "What the weights share" not in html and "packed" not in html.lower()
    assert "bits = 3: the strongest of 3 tried" in html and "features.2.weight" in html


@pytest.mark.parametrize("curve", [None, 3, [], [{"rate": 0.1}], ["x"], [{"rate": 1, "bytes": 0}]])
def test_a_damaged_curve_is_left_out(tmp_path, curve):
    run = read_run(folder_with(tmp_path, by_rate(curve=curve)))
    assert rate_distortion(run, run.details["found"]["03-share"]) is None
    assert write_report(tmp_path).exists()


def test_paths_are_escaped(tmp_path):
    html = page(tmp_path, by_rate(layers={"<script>alert(1)</script>": layer(10)}))
    assert "<script>alert" not in html


def test_a_list_that_is_still_being_tried_is_not_judged_yet(tmp_path):
    told = [{"event": "stage", "name": "share", "index": 3, "of": 5, "cached": False}]
    told += [{"event": "trial", "setting": "rate", "value": p["rate"], **p} for p in RATES[:2]]
    html = write_report(fixture.write_run(tmp_path, events=told, details=None)).read_text()
    assert "the strongest of" not in html


def test_packed_bytes_are_in_the_ledger_and_the_comparison(tmp_path):
    from attar.report.compare import compare_reports

    ledger = fixture.ledger()
    ledger["rows"][-1]["packed_bytes"] = 3140
    folder = folder_with(tmp_path / "a", by_rate(), ledger=ledger)
    assert "<small>3.14 KB packed</small>" in write_report(folder).read_text()
    old = fixture.write_run(tmp_path / "b")
    assert compare_reports([folder, old]).count("KB packed</small>") == 1
