"""Parts by name: how they are described to whoever looks for one."""

from __future__ import annotations

import pytest

from attar.cli.catalog import REGISTRIES, described
from attar.registry import first_sentence


@pytest.mark.parametrize(
    ("docstring", "shown"),
    [
        ("Keeps what matters.\n\nAt length.", "Keeps what matters."),
        ("Removes channels,\nor zeroes weights. More.", "Removes channels, or zeroes weights."),
        ("As in Han et al. 2016,\nat 0.5. Then some.", "As in Han et al. 2016, at 0.5."),
        ("No full stop\n\nMore.", "No full stop"),
        ("", ""),
    ],
)
def test_a_part_is_described_by_its_first_sentence(docstring: str, shown: str) -> None:
    assert first_sentence(docstring) == shown


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_part_is_described_by_a_whole_sentence(kind: str) -> None:
    for name, text in described(kind).items():
        assert text.endswith("."), (name, text)
        assert "\n" not in text
