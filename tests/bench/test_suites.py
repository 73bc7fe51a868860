"""The suites run on tiny hosts and say what they must; their bounds are not tested here."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trol.bench import SUITES, Setting, run
from trol.bench import setting as built
from trol.bench.cases import Case, figure, visits
from trol.bench.operators import Drawn, counted
from trol.bench.setting import SIZES, TINY
from trol.depth import Visit
from trol.depth.roles import Context
from trol.errors import HostError, UsageError
from trol.evaluation.timing import ratio_and_spread
from trol.family import memory

KEYS = {"case", "baseline_ms", "measured_ms", "limit_ms", "ratio", "spread", "must"}
SETTING = Setting(replace(TINY, layers=2, prompt=16, new_tokens=3), rounds=2)


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_gives_rows_of_the_promised_form(suite: str) -> None:
    threads = torch.get_num_threads()
    result = run(suite, SETTING)
    assert result["rows"]
    assert (result["suite"], result["size"], result["rounds"]) == (suite, "tiny", 2)
    for one in result["rows"]:
        assert one.keys() >= {*KEYS, "limit", "noisy"}
        assert one["limit"]
    cases = [one["case"] for one in result["rows"]]
    assert len(set(cases)) == len(cases)  # rows are compared by their cases
    exact = {r["case"]: r["ratio"] for r in result["rows"] if r["must"] in {0.0, 1.0}}
    assert all(ratio <= 1.0 for ratio in exact.values())
    assert all(ratio == 0.0 for case, ratio in exact.items() if "unlike" in case)
    assert torch.get_num_threads() == threads


def test_bounds_are_promised_for_the_default_alone() -> None:
    assert Setting().must(1.05) == 1.05
    for other in (
        Setting(SIZES["1.8b"]),
        Setting(dtype="bf16"),
        Setting(device="cuda"),
        Setting(threads=2),
    ):
        assert other.must(1.05) is None
    assert Setting(rounds=3).must(1.05) == 1.05


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'overhead'"):
        run("overheads")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(dtype="bf1"), "Did you mean 'bf16'"),
        (Setting(device="gpu"), "unknown device"),
        (Setting(rounds=1), "at least 2"),
        (Setting(threads=0), "at least 1"),
    ],
)
def test_a_setting_that_cannot_be_measured_is_refused(setting: Setting, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run("train", setting)


def test_training_on_weights_of_four_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="no gradients"):
        run("train", Setting(TINY, dtype="nf4", rounds=2))


def test_a_limit_is_the_fixed_part_and_a_layers_time_for_each_visit() -> None:
    times = {"bare 8": [10.0], "fixed 8": [2.0], "bare 4": [5.0], "fixed 4": [1.0]}
    assert visits(8, {8: 4}, 4)(times) == [10.0]  # the host's own visits: the host's own time
    assert visits(8, {}, 4)(times) == [2.0]
    assert visits(8, {8: 2, 4: 2}, 4)(times) == [2.0 + 2 * 2.0 + 2 * 1.0]


def test_a_hiccup_of_the_fixed_part_makes_no_layer_cheaper_than_nothing() -> None:
    assert visits(1, {1: 4}, 2)({"bare 1": [1.0], "fixed 1": [3.0]}) == [3.0]


@pytest.mark.parametrize("kept", range(5))
def test_the_limit_of_skipping_lies_between_no_layers_and_all(kept: int) -> None:
    times = {"bare 1": [10.0, 12.0], "fixed 1": [2.0, 3.0]}
    limits = visits(1, {1: kept}, 4)(times)
    assert limits == [2.0 + 2.0 * kept, 3.0 + 2.25 * kept]
    triples = zip(times["fixed 1"], limits, times["bare 1"], strict=True)
    assert all(nothing <= limit <= everything for nothing, limit, everything in triples)


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    assert ratio_and_spread([1.0, 2.0, 4.0], [2.0, 4.0, 4.0])[0] == 2.0


def test_a_row_is_noisy_where_its_rounds_disagree() -> None:
    def of(measured: list[float]) -> dict[str, Any]:
        times = {"own": measured, "bare": [1.0] * 5}
        return Case("a", "own", "two", 2, baseline="bare").row(times, Setting())

    assert not of([2.0, 2.0, 2.1, 2.1, 2.0])["noisy"]
    assert of([2.0, 3.0, 1.0, 4.0, 2.0])["noisy"]
    assert not figure("a", 0.5, "all", 1.0)["noisy"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(2, [2.0, 4.0]), ("other", [5.0, 5.0]), (lambda times: [1.0, 1.0], [1, 1])],
)
def test_a_limit_is_a_multiple_another_run_or_worked_out(limit: Any, expected: list[float]) -> None:
    times = {"own prefill": [1.0, 2.0], "bare prefill": [1.0, 2.0], "other": [5.0, 5.0]}
    row = Case("a", "own prefill", "words", limit, 1.5, speed=True).row(times, Setting(), (2, 8))
    assert (row["case"], row["must"]) == ("a b2 t8", 1.5)
    assert row["limit_ms"] == sum(expected) / 2
    assert row["measured_ms"] == row["baseline_ms"] == 1.5


def test_a_host_too_large_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * 2**30)
    monkeypatch.setattr(built.LlamaForCausalLM, "_from_config", None)  # calling it would fail
    with pytest.raises(HostError, match=r"7\.0 GiB .* 3\.0 GiB .* 4\.0 GiB are missing"):
        run("traverse", Setting(SIZES["1.8b"]))
    with pytest.raises(HostError, match=r"3\.5 GiB"):
        run("traverse", Setting(SIZES["1.8b"], dtype="bf16"))


def test_what_a_host_needs_is_what_its_weights_take() -> None:
    model = built.host(SETTING)
    taken = sum(parameter.nbytes for parameter in model.parameters())
    assert built.needed_bytes(SETTING, model.config) == taken
    assert built.needed_bytes(SETTING, model.config, training=True) == 2 * taken


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_as_many_tokens_are_drawn_as_are_asked_for(share):
    state = torch.zeros(2, 500, 1)
    drawn = Drawn(share).again(Visit(0, 1, state, None, Context()))
    assert drawn.mean().item() == pytest.approx(share, abs=0.05)


def test_a_visit_launches_no_operator_too_many():
    """Operator counts are exact, so the bounds of the suite hold on any machine."""
    result = {row["case"]: row for row in counted(Setting())}
    assert all(row["ratio"] <= row["must"] for row in result.values()), result
    assert result["question, operators"]["ratio"] > 2
    assert result["half of the tokens again, looks"]["ratio"] == 1
