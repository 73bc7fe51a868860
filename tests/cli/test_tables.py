"""Tables and provenance."""

import pytest

from trol.cli import bench, eval, terminal
from trol.cli import terminal as provenance


def test_a_table_is_aligned() -> None:
    assert terminal.table([["type", "n"], ["hop1", "12"]]) == "type   n\nhop1  12"


def test_accuracy_stands_beside_chance() -> None:
    task = {"accuracy": 0.5, "n": 8, "by_type": {"digit": 0.5}, "chance_by_type": {"digit": 0.125}}
    text = eval._table({"tasks": {"boards": task}})
    assert text.splitlines()[1].split() == ["digit", "50.0", "12.5"]


def test_a_bench_row_without_a_bound() -> None:
    times = {"baseline_ms": 1.0, "measured_ms": 2.0, "limit_ms": 1.0}
    row = {"case": "a", **times, "ratio": 2.0, "spread": 0.1, "must": None, "noisy": False}
    cells = ["a", "1.000", "2.000", "1.000", "2.000", "0.100"]
    assert bench._table([row]).splitlines()[1].split() == cells


def test_bench_rows_that_are_noisy_or_above_their_bound_are_marked() -> None:
    row = {"ratio": 2.0, "must": 1.5, "noisy": True}
    assert bench._mark(row) == "!?"
    assert bench._mark({**row, "ratio": 1.5}) == "?"
    assert bench._mark({**row, "must": None, "noisy": False}) == ""


def test_the_run_record_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/trol", "chat", "--question", "is there a 7?"])
    record = provenance.run_record(3)
    assert record["command"] == "trol chat --question 'is there a 7?'"
    assert record["seed"] == 3
    assert record["versions"]["torch"].startswith("2.")
