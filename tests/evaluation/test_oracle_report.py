"""The report: exact figures by hand, controls that know less never score more than they could."""

import json

import numpy as np
import pytest

from evaluation.oracle_standins import rows_of
from trol.depth import Plan
from trol.errors import UsageError
from trol.evaluation.knapsack import HeldOut, random_allocation
from trol.evaluation.oracle import menu_of
from trol.evaluation.oracle_report import report

MENU = menu_of([Plan("0"), Plan("0-1"), Plan("all")], 4)  # costs 1, 2, 4

SCORES = [
    [0.5, 0.5, 0.5],  # depth does not matter
    [0.0, 0.9, 0.6],  # shallower is better
    [0.1, 0.2, 0.9],  # depth matters
    [0.0, 0.0, 0.0],  # hopeless
]
"""Mean at full depth: 0.5."""


def test_the_figures_by_hand() -> None:
    result = report(rows_of(SCORES, MENU), MENU, "rougeL", ["rougeL"])
    assert result["full"] == pytest.approx(0.5)
    # 2.0 in all: 0.5 + 0.9 with 1 + 2 layers, 0.9 with 4, and 1 for the hopeless: 2.3 with 8.
    # Cheaper ones reach 1.6 at most, with 5 layers.
    assert result["equal_budget"] == pytest.approx({"layers": 2.0, "share": 0.5, "score": 0.575})
    assert result["per_sequence"] == pytest.approx({"layers": 2.0, "share": 0.5, "score": 0.575})
    assert result["best"]["score"] == pytest.approx(0.575)
    # Right are the first three, whose cheapest levels as good have 1, 2 and 4 layers.
    right, wrong = result["by_full"]["right"], result["by_full"]["wrong"]
    assert right == pytest.approx({"n": 3, "layers": 7 / 3, "share": 7 / 12, "score": 2.3 / 3})
    assert wrong == {"n": 1, "layers": 1.0, "share": 0.25, "score": 0.0}
    assert result["mix"] == [0.5, 0.25, 0.25]
    assert result["menu"][1]["mean"]["rougeL"] == pytest.approx(0.4)
    assert json.dumps(result, allow_nan=False)


def test_budget_and_per_sequence_definitions_differ() -> None:
    # One sequence far better when shallow pays for another that is a little worse.
    result = report(rows_of([[1.0, 0, 0.2], [0.3, 0.4, 0.5]], MENU), MENU, "rougeL", ["rougeL"])
    assert result["equal_budget"]["layers"] == 1.0
    assert result["per_sequence"]["layers"] == 2.5


def test_a_model_that_needs_its_layers_gets_no_fraction() -> None:
    scores = np.tile([0.1, 0.2, 0.9], (6, 1))
    result = report(rows_of(scores.tolist(), MENU), MENU, "rougeL", ["rougeL"])
    assert result["equal_budget"]["share"] == 1.0
    assert result["controls"]["reach_full"] == {"random": 1.0, "held_out": 1.0, "single": 1.0}


def test_the_oracle_is_above_every_control_at_every_budget() -> None:
    source = np.random.default_rng(0)
    scores = source.random((40, 3))
    types = [("a", "b")[i % 2] for i in range(40)]
    rows = rows_of(scores.tolist(), MENU, types=types)
    result = report(rows, MENU, "rougeL", ["rougeL"])
    for point in result["curve"]:
        for arm in ("random", "held_out", "single"):
            assert point["oracle"] >= point[arm] - 1e-9
    assert [point["layers"] for point in result["curve"]] == sorted(
        point["layers"] for point in result["curve"]
    )


def test_random_allocation_is_the_mean_over_all_of_them() -> None:
    from itertools import permutations

    scores = np.array(SCORES)
    choices = np.array([0, 1, 2, 0])
    dealt = [scores[np.arange(4), list(order)].mean() for order in permutations(choices)]
    mean, spread = random_allocation(scores, choices, 0)
    assert mean == pytest.approx(np.mean(dealt))
    assert spread == pytest.approx(np.std(dealt), rel=0.2)


def test_held_out_finds_what_types_tell_and_nothing_where_they_tell_nothing() -> None:
    types = ["easy", "hard"] * 30
    by_type = np.tile([[0.8, 0.8, 0.8], [0.0, 0.0, 0.9]], (30, 1))
    held_out = HeldOut(by_type, MENU.costs, types, 0)
    assert held_out.score(2.5) == pytest.approx(0.85, abs=0.02)  # 1 for easy, 4 for hard
    assert held_out.score(1) == pytest.approx(0.4)
    noise = np.random.default_rng(0).random((400, 3))
    blind = HeldOut(noise, MENU.costs, ["one"] * 400, 0).score(4)
    assert blind == pytest.approx(0.5, abs=0.06)  # an oracle has 0.75 here


def test_choosing_among_outputs_explains_a_gain_that_depth_does_not() -> None:
    source = np.random.default_rng(0)
    scores, drawn = source.random((200, 3)), source.random((200, 2))
    rows = rows_of(scores.tolist(), MENU, drawn=drawn.tolist())
    result = report(rows, MENU, "rougeL", ["rougeL"])
    outputs = result["controls"]["best_of_n"]
    wanted = np.maximum(scores[:, 2], drawn.max(axis=1)).mean()
    assert outputs["score"] == pytest.approx(wanted)
    assert outputs["by_n"][0] == pytest.approx(result["full"])
    assert outputs["share_of_gain"] == pytest.approx(1, abs=0.2)
    assert "choosing among outputs alone gives" in result["verdict"][1]


def test_a_loss_is_better_when_lower_and_has_no_outputs_to_choose_among() -> None:
    losses = [[3.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
    result = report(rows_of(losses, MENU, metric="loss"), MENU, "loss", ["loss"])
    assert result["full"] == -1.5
    assert result["equal_budget"]["layers"] == 1.5  # 2 and 1: as good as 1 and 2
    assert result["controls"]["best_of_n"] is None
    assert "was not measured" in result["verdict"][1]


def test_one_sequence_says_nothing() -> None:
    with pytest.raises(UsageError, match="2 or more"):
        report(rows_of(SCORES[:1], MENU), MENU, "rougeL", ["rougeL"])


def test_a_model_that_cannot_do_the_task_gets_no_fraction_in_words() -> None:
    result = report(rows_of([[0.0] * 3] * 4, MENU), MENU, "rougeL", ["rougeL"])
    assert "scores nothing by rougeL" in result["verdict"][0]
    assert "as good" not in result["verdict"][0]


def test_the_share_has_its_spread() -> None:
    source = np.random.default_rng(1)
    result = {}
    for count in (20, 200):
        scores = source.random((count, 3)) + np.array([0.0, 0.2, 0.6])
        result[count] = report(rows_of(scores.tolist(), MENU), MENU, "rougeL", ["rougeL"])
        low, high = result[count]["equal_shares"]
        assert 0.25 <= low <= result[count]["equal_budget"]["share"] <= high <= 1
    widths = [high - low for low, high in (result[n]["equal_shares"] for n in (20, 200))]
    assert widths[1] < widths[0]
    texts = [" ".join(result[count]["verdict"]) for count in (20, 200)]
    assert all("(95 % of resamples of these questions)" in one for one in texts)
    assert ["say little" in one for one in texts] == [True, False]


def test_resampling_agrees_with_the_exact_knapsack() -> None:
    """Sequences that are all alike leave nothing to chance but a step of one of them."""
    scores = np.tile([0.2, 0.7, 0.7], (100, 1))
    result = report(rows_of(scores.tolist(), MENU), MENU, "rougeL", ["rougeL"])
    assert result["equal_shares"] == pytest.approx([0.5, 0.5])
    assert result["equal_budget"]["share"] == 0.5


def test_a_loss_is_said_to_be_turned() -> None:
    for metric, said in (("loss", True), ("rougeL", False)):
        result = report(rows_of(SCORES, MENU, metric=metric), MENU, metric, [metric])
        assert ("its sign is turned" in " ".join(result["verdict"])) is said
