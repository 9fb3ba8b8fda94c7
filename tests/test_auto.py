import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.tuning.auto import strongest


@given(st.lists(st.floats(-0.01, 0.2), min_size=1, max_size=40), st.floats(-0.02, 0.25))
def test_bisection_finds_what_a_linear_scan_finds(drops, limit):
    drops = sorted(drops)
    attempts = []

    def attempt(place):
        attempts.append(place)
        return drops[place]

    value, tried = strongest("bits", range(len(drops)), attempt, limit)
    kept = [place for place, drop in enumerate(drops) if drop <= limit]
    assert value == (kept[-1] if kept else None)
    assert len(attempts) == len(set(attempts)) <= math.ceil(math.log2(len(drops))) + 1
    assert [trial["value"] for trial in tried] == attempts


@given(st.lists(st.floats(-0.01, 0.2), min_size=1, max_size=40), st.floats(-0.02, 0.25))
def test_what_is_returned_kept_the_limit_even_where_drops_are_not_monotone(drops, limit):
    value, _ = strongest("ratio", range(len(drops)), lambda place: drops[place], limit)
    assert value is None or drops[value] <= limit


def test_every_trial_is_told():
    events = []
    drops = {8: 0.0, 4: 0.01, 2: 0.2}
    value, tried = strongest("bits", [8, 4, 2], drops.get, 0.02, events.append, baseline=0.9)
    assert value == 4
    assert events == [{"event": "trial", **trial} for trial in tried]
    assert events[0] == {
        "event": "trial",
        "setting": "bits",
        "value": 4,
        "metric": pytest.approx(0.89),
        "drop": 0.01,
        "kept": True,
    }


def test_a_lower_metric_that_is_better_rises_with_the_drop():
    _, tried = strongest("bits", [8], lambda _: 0.5, 1, baseline=3.0, higher_is_better=False)
    assert tried[0]["metric"] == 3.5
