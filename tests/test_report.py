"""The report: honest in words, true in figures, whole in one file, and harmless."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from attar import numbers
from attar.errors import AttarError, UsageError
from attar.report import compare_reports, ledger_html, ledger_table, write_report
from attar.report.charts import Point, scatter
from report_fixture import CLASSES, details, events, ledger, rows, write_run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects text, tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID and tag not in {"circle", "line", "polyline"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in {"circle", "line", "polyline"}:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "title"}:
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(w for w in self.words if w)).replace("\u200a", "")


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def with_drop(low: float, high: float) -> dict:
    changed = ledger()
    changed["rows"][-1]["drop"] |= {"value": (low + high) / 2, "low": low, "high": high}
    return changed


def test_the_page_is_one_file_that_needs_nothing_else(tmp_path):
    html = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"}
    outside = [v for n, v in page.attributes if n in {"src", "href", "srcset", "action", "data"}]
    assert outside and all(v.startswith("data:image/") for v in outside)
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html, "the page itself forbids loading anything"


def test_figures_on_the_page_are_the_ledgers(tmp_path):
    text = page_of(write_run(tmp_path)).text
    for shown in (
        "99.12 % 98.94 to 99.30 %",  # metric and its interval
        "0.08 −0.06 to 0.22",  # drop and its interval, in points
        "21.8 KB",
        "0.061 / 0.066",
        "0.083 passes off",
        "11.8 MB",
        "431,080",
        "215,540 not zero",
        "99.61 %",  # agreement
        "3.0e-04 100 % same",  # parity
        "12,345 6,172 not zero 210,000 MACs",
        "Further metrics: balanced accuracy, AUC",
        "deploy 0.9911 0.9993",
        "3.12× the runtime alone 3.05 to 3.18×",
        "3.95× compression",
        "79.9× smaller and 12.3× faster than the teacher.",
    ):
        assert shown in text, shown


@given(value=st.floats(0, 1), unit=st.just("fraction"))
def test_a_shown_fraction_is_the_value_to_a_hundredth_of_a_point(value, unit):
    assert float(numbers.metric(value, unit).removesuffix(" %")) == pytest.approx(
        100 * value, abs=0.005 + 1e-9
    )


@pytest.mark.parametrize(
    ("low", "high", "said", "unsaid"),
    [
        (-0.004, 0.0, "No loss: the whole 95 % interval", "neither shown"),
        (-0.001, 0.0022, "neither shown nor excluded: 10,000 test examples leave room", "No loss"),
        (0.001, 0.003, "A loss, and not by chance: at least 0.10 points", "No loss"),
    ],
)
def test_no_loss_is_said_only_where_the_interval_allows_it(tmp_path, low, high, said, unsaid):
    text = page_of(write_run(tmp_path, ledger=with_drop(low, high))).text
    assert said in text
    assert unsaid not in text


def test_the_budgets_verdict_distinguishes_met_from_certain(tmp_path):
    judged = ledger()
    assert "Budget met by the estimates, not for certain" in page_of(write_run(tmp_path)).text
    judged["budget"]["certain"] = True
    assert "Budget met " in page_of(write_run(tmp_path, ledger=judged)).text
    judged["budget"] |= {"met": False, "certain": False}
    judged["budget"]["figures"][1] |= {"value": 0.3, "met": False, "certain": False}
    assert "Budget not met: one answer" in page_of(write_run(tmp_path, ledger=judged)).text


def test_factors_that_were_estimated_apart_are_not_called_a_product(tmp_path):
    paired = page_of(write_run(tmp_path)).text
    assert "12.3× as fast as the teacher (12.1 to 12.5×)" in paired
    assert "they don’t multiply exactly" in paired
    alone = ledger()
    del alone["speedup"]
    text = page_of(write_run(tmp_path, ledger=alone)).text
    assert "That is 12.3× in all." in text and "paired" not in text


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"form": "original"}, "answers as it is"),
        (
            {"form": "original", "seconds": {"original": 0.02, "channels-last": 0.03}},
            "answers as it is, no slower than as channels-last",
        ),
        (
            {"form": "bfloat16", "seconds": {"original": 0.04, "bfloat16": 0.01}, "views": 1},
            "answers as bfloat16, 4.0× as fast as the original; one view of each example stored",
        ),
    ],
)
def test_how_the_teacher_answered_is_a_sentence(tmp_path, choice, said):
    told = details() | {"found": {"01-distill": {"teacher": choice}}}
    text = page_of(write_run(tmp_path, details=told)).text
    assert re.search(rf"distill teacher {re.escape(said)} (?!stored|;)", text)


def test_what_was_found_is_never_raw_json(tmp_path):
    page = page_of(write_run(tmp_path))
    section = page.text[page.text.index("What was adjusted") : page.text.index("Inside the")]
    assert "answers as channels-last, 1.3× as fast" in section
    assert "8 views of each example stored" in section
    assert "int8 over float ratio 0.81 tried float layers ratio none 1.12" in section
    assert not set('{}"') & set(section)


def test_a_larger_slower_model_is_called_so(tmp_path):
    changed = ledger()
    del changed["speedup"]
    changed["rows"][-1]["bundle"]["bytes"] = 3_491_224
    changed["rows"][-1]["latency"][0]["p50_ms"] = 1.504
    assert (
        "2.00× larger and 2.00× slower than the teacher."
        in page_of(write_run(tmp_path, ledger=changed)).text
    )


@pytest.mark.parametrize("missing", ["ledger", "events", "details", "recipe"])
def test_a_missing_part_leaves_its_sections_out(tmp_path, missing):
    page = page_of(write_run(tmp_path, **{missing: None}))
    section = {
        "ledger": "The ledger",
        "events": "Training",
        "details": "Class by class",
        "recipe": "The recipe",
    }
    for part, title in section.items():
        assert (title in page.text) == (part != missing), title


@pytest.mark.parametrize("count", range(len(rows())))
def test_a_run_interrupted_after_any_row_has_a_page(tmp_path, count):
    begun = ledger()
    begun["rows"] = begun["rows"][:count]
    begun["budget"] = {"max_drop": 0.005}
    del begun["speedup"]
    page = page_of(write_run(tmp_path, ledger=begun, details=None))
    assert ("Not finished" in page.text) == (count > 0)
    assert "Where the speed comes from" not in page.text


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_field_of_a_row_may_be_missing(tmp_path_factory, data):
    partial = ledger()
    for row in partial["rows"]:
        for key in data.draw(st.sets(st.sampled_from(sorted(set(row) - {"stage", "index"})))):
            del row[key]
    page_of(write_run(tmp_path_factory.mktemp("run"), ledger=partial))
    ledger_html(partial)
    ledger_table(partial)


def test_a_log_cut_by_a_kill_and_told_twice_is_read(tmp_path):
    folder = write_run(tmp_path, events=events() + events())
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"event": "epoch", "label": "recov')
    text = page_of(folder).text
    assert "10 epochs" in text and "20 epochs" not in text
    assert text.count("a tenth of train was set aside") == 1


HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>"


def hostile(value):
    """The same JSON with every string replaced, keys and kinds apart."""
    kept = {"accuracy", "fraction", "teacher", "exported", "deploy", "pytorch-eager"}
    if isinstance(value, dict):
        return {
            k: v if k in {"event", "stage", "unit"} else hostile(v) for k, v in value.items()
        } | ({HOSTILE: HOSTILE} if "found" in value or "cpu" in value else {})
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) and value not in kept else value


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    bad = hostile(ledger())
    bad["rows"][4]["stage"] = HOSTILE
    found = hostile(details())
    found["wrong"][0]["image"] = '"><script>alert(1)</script>'
    found["wrong"][1]["image"] = "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="
    folder = write_run(
        tmp_path, ledger=bad, events=hostile(events()), details=found, recipe=HOSTILE
    )
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert HOSTILE in " ".join(page.words)
    assert "svg+xml" not in html
    Page(compare_reports([folder, folder]))
    Page(ledger_html(bad))


def test_markup_in_a_stages_name_is_text_on_the_terminal():
    bad = ledger()
    bad["rows"][3]["stage"] = "[red]x[/red]"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(ledger_table(bad))
    assert "[red]x[/red]" in console.export_text()


def test_the_terminal_table_fits_eighty_columns_with_the_ledgers_figures():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ledger_table(ledger()))
    text = console.export_text()
    last = next(line for line in text.splitlines() if line.startswith("deploy"))
    figures = "99.12 % 98.94…99.30 0.08 −0.06…0.22 21.8 KB 0.061 0.066 11.8 MB"
    assert " ".join(last.split()) == f"deploy {figures}"


def test_the_notebooks_table_shows_every_row():
    page = Page(ledger_html(ledger()))
    for row in rows():
        assert row["stage"] in page.words


def test_classes_that_lost_most_come_first(tmp_path):
    text = page_of(write_run(tmp_path)).text
    section = text[text.index("Class by class") : text.index("From right to wrong")]
    order = re.findall("|".join(CLASSES), section)
    assert order[:3] == ["eight", "nine", "five"] and order[-1] in {"three", "seven"}
    assert "−0.60" in section and "98.50 %" in section


def test_what_was_tried_and_chosen_is_told(tmp_path):
    text = page_of(write_run(tmp_path)).text
    assert "bits = 3: the strongest of 3 tried" in text
    assert "within 0.50 points" in text
    assert "stayed float classifier.3" in text


def test_trials_of_an_interrupted_search_come_from_the_log(tmp_path):
    trial = {"event": "trial", "setting": "ratio", "value": 0.5, "metric": 0.9, "drop": 0.09}
    folder = write_run(tmp_path, details=None, events=[{**trial, "kept": False}])
    assert "None of 1 tried kept the drop" in page_of(folder).text


def test_runs_are_compared_by_their_last_rows(tmp_path):
    second = ledger()
    second["recipe"] = "mnist-large"
    second["environment"]["cpu"] = "another"
    second["rows"][-1]["bundle"]["bytes"] = 90_000
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", ledger=second),
        write_run(tmp_path / "c", ledger=None),
    ]
    page = Page(compare_reports(folders))
    assert "21.8 KB" in page.text and "90 KB" in page.text
    assert "different processors" in page.text
    assert "not measured yet" in page.text


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    text = Page(compare_reports([write_run(tmp_path / "a"), write_run(tmp_path / "b")])).text
    assert "mnist (a)" in text and "mnist (b)" in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no run in"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"not a run's folder: it has no ledger\.json"):
        write_report(tmp_path)


def test_a_damaged_or_newer_ledger_is_refused(tmp_path):
    folder = write_run(tmp_path)
    (folder / "ledger.json").write_text("{")
    with pytest.raises(AttarError, match="damaged"):
        write_report(folder)
    (folder / "ledger.json").write_text(json.dumps({**ledger(), "schema": 2}))
    with pytest.raises(AttarError, match="upgrade attar"):
        write_report(folder)


points = st.builds(
    Point,
    label=st.text(max_size=30),
    x=st.floats(1e-6, 1e12),
    y=st.floats(-1e6, 1e6),
    role=st.sampled_from(["teacher", "baseline", "stage", "final"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(points, min_size=1, max_size=12))
def test_any_points_make_a_picture_with_every_label_in_place(drawn):
    svg = scatter(drawn, title="t", x_label="x", y_label="y", show_x=str, show_y=str)
    Page(svg)
    places = [float(v) for v in re.findall(r'c[xy]="([^"]+)"', svg)]
    assert len(places) == 2 * len(drawn)
    assert all(0 <= v <= 560 for v in places), "every point lies on the picture"
    assert svg.count('class="label') == len(drawn)


INSIDE = {
    "runtime": "onnxruntime",
    "deployed": True,
    "sum_us": {"before": 50.0, "after": 40.0},
    "operators": [
        {"op": "QLinearConv", "precision": "int8", "count_before": 0, "us_before": 0.0,
         "count_after": 3, "us_after": 30.0},
    ],
    "conversions": {"count": 2, "us": 10.0},
    "float_inside": [
        {"node": "mid/Conv", "layer": "mid", "op": "Conv", "place": "inside", "avoidable": True,
         "why": "the recipe <b>says so</b>", "us": 6.0},
    ],
    "layers": [
        {"layer": "stem", "op": "conv2d", "us_before": 4.0, "us_after": 9.0, "own_snr_db": 31.0,
         "snr_db": 31.0},
        {"layer": "mid", "op": "conv2d", "us_before": 4.0, "us_after": 4.0, "own_snr_db": None,
         "snr_db": 28.0},
        {"layer": "head", "op": "linear", "us_before": 4.0, "us_after": 4.0, "own_snr_db": 44.0,
         "snr_db": 29.0},
    ],
}  # fmt: skip


def inside_page(folder, ratio=0.8, **changes) -> Page:
    told = details()
    place = {"ratio": ratio, "low": ratio - 0.02, "high": ratio + 0.02}
    told["found"] = {"01-quantize": {"int8_over_float": place, "inside": INSIDE | changes}}
    write_run(folder)
    (folder / "details.json").write_text(json.dumps(told))
    return page_of(folder)


def test_the_page_says_what_takes_time_inside_int8_and_where_noise_enters(tmp_path):
    text = inside_page(tmp_path).text
    for said in (
        "Inside the int8 file",
        "Int8 takes 0.80 of float’s time (0.78 to 0.82): 20% less.",
        "2 conversions between float and int8 take 25% of the operators’ time.",
        "Slower than in float: stem by 5 µs.",
        "1 operator between int8 ones computes in float where an int8 kernel exists.",
        "the recipe <b>says so</b>",  # as text: escaped in the page
        "Most noise of their own add stem (31 dB), head (44 dB).",
    ):
        assert said in text, said


def test_the_page_says_so_where_nothing_inside_is_left_float_or_int8_was_not_taken(tmp_path):
    text = inside_page(tmp_path, 1.2, float_inside=[], deployed=False).text
    assert "Inside the int8 file that was not taken" in text
    assert "20% more" in text
    assert "No operator inside computes in float where an int8 kernel exists." in text
    unknown = inside_page(tmp_path, operators=[], float_inside=[], sum_us={}).text
    assert "onnxruntime doesn’t tell what it runs." in unknown


BENCH = {
    "attar_bench": 1,
    "model_sha256": "a" * 64,
    "golden": {"agrees": True, "max_abs_diff": 0.0, "n": 8},
    "latency": {"runtime": "onnxruntime", "batch": 1, "threads": 1, "p50_ms": 0.122, "p90_ms": 0.2},
    "memory_mb": 9.3,
    "bytes": 1,
    "environment": {"cpu": "Small Core", "system": "Linux aarch64", "cores": 4, "packages": {}},
}


def test_benches_of_other_machines_stand_beside_the_build_machines(tmp_path):
    run, bench = write_run(tmp_path / "run"), tmp_path / "phone.json"
    bench.write_text(json.dumps(BENCH))
    text = Page(write_report(run, [bench]).read_text(encoding="utf-8")).text
    assert "On other machines" in text and "AMD EPYC 7B13" in text
    for said in ("Small Core", "0.122 / 0.200", "2.00× slower", "9.30 MB", "all 8 agree"):
        assert said in text, said
    bench.write_text(json.dumps(BENCH | {"golden": {"agrees": False, "max_abs_diff": 0.5, "n": 8}}))
    assert "differ by up to 5.0e-01" in write_report(run, [bench]).read_text(encoding="utf-8")
    assert "On other machines" not in page_of(run).text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't read"),
        ("{", "is damaged, or no JSON"),
        ("[]", "is not a bench"),
        ('{"golden": {}}', "is not a bench"),
        (json.dumps(BENCH | {"attar_bench": 2}), "has the form 2"),
        (json.dumps(BENCH | {"latency": 3}), "lacks latency"),
        (json.dumps(BENCH | {"model_sha256": "b" * 64}), "another model"),
    ],
)
def test_a_foreign_or_damaged_bench_is_refused_in_a_sentence(tmp_path, content, said):
    run, bench = write_run(tmp_path / "run"), tmp_path / "phone.json"
    (run / "bundle").mkdir(exist_ok=True)
    (run / "bundle" / "manifest.json").write_text(json.dumps({"files": [{"sha256": "a" * 64}]}))
    if content is not None:
        bench.write_text(content)
    with pytest.raises(UsageError, match=said):
        write_report(run, [bench])
