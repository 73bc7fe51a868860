"""Results against stored ones: what counts as slower."""

import json
from pathlib import Path
from typing import Any

import pytest

from trol.bench.cases import compare, read_stored
from trol.errors import DataError, UsageError

AT = {"size": "small", "dtype": "float32", "device": "cpu", "threads": 1}


def result(ratio: float, spread: float = 0.01, *, noisy: bool = False) -> dict[str, Any]:
    row = {"case": "a", "ratio": ratio, "spread": spread, "noisy": noisy}
    return {"suite": "skip", **AT, "rows": [row]}


def test_a_row_is_slower_beyond_both_spreads_and_the_floor() -> None:
    stored = result(1.0)
    assert compare(result(1.05), stored).slower == ["skip: a: 1.050 ± 0.010, was 1.000 ± 0.010"]
    for equal in (result(1.03), result(0.5), result(1.05, spread=0.03)):
        compared = compare(equal, stored)
        assert not compared.slower
        assert not compared.unsure


def test_noisy_rows_are_told_and_do_not_fail() -> None:
    for measured, stored in (
        (result(1.5, noisy=True), result(1.0)),
        (result(1.5), result(1.0, noisy=True)),
    ):
        compared = compare(measured, stored)
        assert compared.unsure
        assert not compared.slower


def test_another_suite_is_not_compared() -> None:
    """Where no row is alike, nothing would be slower."""
    with pytest.raises(UsageError, match="of the suite 'sparse', and these of 'skip'"):
        compare(result(1.0), {**result(1.0), "suite": "sparse"})


def test_rows_that_came_or_went_do_not_fail() -> None:
    stored, measured = result(1.0), result(1.0)
    measured["rows"][0]["case"] = "new"
    compared = compare(measured, stored)
    assert compared.lacking == ["skip: a"]
    assert not compared.slower


def test_results_of_other_hosts_are_not_compared() -> None:
    with pytest.raises(UsageError, match="'tiny'"):
        compare(result(1.0), {**result(1.0), "size": "tiny"})


def test_results_of_before_settings_were_stored_are_compared() -> None:
    old = {key: value for key, value in result(1.0).items() if key not in AT}
    del old["rows"][0]["noisy"]
    assert compare(result(2.0), old).slower


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    assert read_stored(tmp_path, "skip") is None
    file = tmp_path / "skip.json"
    file.write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        read_stored(tmp_path, "skip")
    file.write_text("{}")
    with pytest.raises(DataError, match="no result"):
        read_stored(file, "skip")
    file.write_text(json.dumps(result(1.0)))
    assert read_stored(tmp_path, "skip") == result(1.0)
