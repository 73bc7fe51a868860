"""The suites run and say what they must; their bounds are not tested here."""

import pytest

from trol.errors import UsageError
from trol.evaluation import bench, bench_skip
from trol.evaluation.timing import ratio_and_spread


@pytest.mark.parametrize("suite", bench.SUITES)
def test_a_suite_gives_rows_of_the_promised_form(
    suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = bench.llama
    for module in (bench, bench_skip):
        monkeypatch.setattr(module, "llama", lambda **_: small(hidden=64, layers=2))
        monkeypatch.setattr(module, "PROMPTS", (8,))
        monkeypatch.setattr(module, "BATCHES", (1,))
    found = bench.run(suite, rounds=2)
    keys = {"case", "baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must"}
    assert all(set(row) == keys for row in found["rows"])
    assert found["rows"]
    exact = {row["case"]: row["ratio"] for row in found["rows"] if row["baseline_ms"] is None}
    assert set(exact.values()) <= {1.0}  # memory as the bare host's, tokens as recomputed


def test_an_unknown_suite_is_told() -> None:
    with pytest.raises(UsageError, match="Did you mean 'overhead'"):
        bench.run("overheads")


def test_the_limit_of_skipping_lies_between_no_layers_and_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_skip, "HIDDEN", 64)
    monkeypatch.setattr(bench_skip, "LAYERS", 4)
    monkeypatch.setattr(bench_skip, "PROMPTS", (8,))
    monkeypatch.setattr(bench_skip, "BATCHES", (2,))
    rows = {row["case"]: row for row in bench.run("skip", rounds=2)["rows"]}
    assert list(rows) == ["all prefill b2 t8", "all decode b2 t8", "answer decode b2 t8"]
    assert all(row["limit_ms"] < row["baseline_ms"] for row in rows.values())
    half, still = (rows[f"{scope} decode b2 t8"]["limit_ms"] for scope in ("all", "answer"))
    assert half < still  # answers that skip a layer still leave their keys and values there


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    assert ratio_and_spread([1.0, 2.0, 4.0], [2.0, 4.0, 4.0])[0] == 2.0
