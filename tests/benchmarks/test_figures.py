"""What the table says of a target must be what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import (
    Row,
    at_least,
    at_most,
    percentile,
    quartiles,
    table,
    write_json,
)

ROWS = [
    Row("hop", "overhead", "ms", (0.9, 0.5, 0.6), at_most(0.7)),
    Row("decode", "16 sessions", "x", (2.0, 3.0), at_least(4)),
    Row("decode", "asyncio", "x", (), at_least(6)),
    Row("decode", "alone", "tok/s", (1234.5,)),
]


def test_the_median_is_judged() -> None:
    verdicts = [row.verdict for row in ROWS]
    assert verdicts == ["reached", "NOT reached", "not measured", ""]


@pytest.mark.parametrize("values", [(4.0,), (4.0, 4.0, 9.0)])
def test_a_target_that_is_just_met_is_reached(values: tuple[float, ...]) -> None:
    assert Row("", "", "", values, at_least(4)).verdict == "reached"
    assert Row("", "", "", values, at_most(4)).verdict == "reached"


def test_the_table_has_every_row_under_its_suite() -> None:
    lines = table(ROWS).splitlines()
    assert [line.split(",")[0].split("  ")[0] for line in lines if line] == [
        *("", "hop:", "overhead", "decode:", "16 sessions", "asyncio", "alone")
    ]
    assert "≤ 0.7" in lines[3]
    assert lines[3].endswith("reached")


def test_json_has_every_measurement(tmp_path: Path) -> None:
    write_json(tmp_path / "all.json", ROWS, {"cores": 2})
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["about"] == {"cores": 2}
    assert [row["values"] for row in found["rows"]] == [list(row.values) for row in ROWS]
    assert found["rows"][0]["median"] == 0.6
    assert found["rows"][0]["target"] == {"value": 0.7, "at_least": False}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_of_the_values(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values) - 1e-6


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_quartiles_are_in_order(values: list[float]) -> None:
    low, middle, high = quartiles(values)
    assert min(values) <= low <= middle <= high <= max(values)
