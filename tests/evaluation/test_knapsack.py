"""The multiple-choice knapsack: exact at every budget."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from trol.errors import UsageError
from trol.evaluation.knapsack import solve, undominated


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    sequences, levels = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    step = draw(st.sampled_from([1, 3]))
    count = sequences * levels
    costs = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    # Few values, so that ties and dominated levels are common.
    values = draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))
    shape = (sequences, levels)
    return step * np.array(costs).reshape(shape), np.array(values, float).reshape(shape) / 4


@given(problems())
def test_equals_trying_everything(problem: tuple[np.ndarray, np.ndarray]) -> None:
    costs, values = problem
    rows = np.arange(len(costs))
    every = [np.array(choice) for choice in product(range(costs.shape[1]), repeat=len(costs))]
    totals = [(int(costs[rows, c].sum()), float(values[rows, c].sum())) for c in every]
    knapsack = solve(costs, values)
    assert knapsack.least == min(cost for cost, _ in totals)
    for budget in range(knapsack.least, int(costs.max(axis=1).sum()) + 3):
        best = max(value for cost, value in totals if cost <= budget)
        choices = knapsack.choices(budget)
        assert knapsack.value(budget) == pytest.approx(best)
        assert values[rows, choices].sum() == pytest.approx(best)
        assert costs[rows, choices].sum() <= budget
        cheapest = min(cost for cost, value in totals if value >= best - 1e-12)
        assert knapsack.cheapest(best) == cheapest


def test_equals_an_integer_program() -> None:
    source = np.random.default_rng(3)
    costs, values = np.array([2, 3, 5, 8, 12]), source.random((40, 5))
    knapsack = solve(costs, values)
    one_each = LinearConstraint(np.kron(np.eye(40), np.ones(5)), 1, 1)
    for budget in (81, 130, 200, 333, 480):
        within = LinearConstraint(np.tile(costs, 40), 0, budget)
        best = milp(
            -values.ravel(),
            constraints=[one_each, within],
            integrality=np.ones(200),
            bounds=(0, 1),
            options={"mip_rel_gap": 0},
        )
        assert knapsack.value(budget) == pytest.approx(-best.fun)
        choices = knapsack.choices(budget)
        assert costs[choices].sum() <= budget


def test_more_budget_never_buys_less() -> None:
    values = np.random.default_rng(0).random((30, 6))
    best = solve(range(1, 7), values).values
    assert (np.diff(best) >= 0).all()
    assert best[-1] == pytest.approx(values.max(axis=1).sum())


def test_common_factors_shrink_the_table_and_change_nothing() -> None:
    values = np.random.default_rng(1).random((10, 3))
    small, large = solve([1, 2, 4], values), solve([7, 14, 28], values)
    assert len(small.values) == len(large.values)
    assert large.budgets.tolist() == [7 * budget for budget in small.budgets]
    assert large.value(7 * 20 + 6) == small.value(20)


def test_levels_that_are_never_worth_it_are_left_out() -> None:
    costs, values = np.array([3, 1, 2, 2, 5]), np.array([0.5, 0.4, 0.3, 0.6, 0.6])
    assert undominated(costs, values) == [1, 3]


@pytest.mark.parametrize(
    ("costs", "values", "said"),
    [
        ([1.5, 2], [[0, 1]], "whole numbers"),
        ([-1, 2], [[0, 1]], "at least 0"),
        ([1, 2, 3], [[0, 1]], "one cost per level"),
        ([1, 2], [[0, float("nan")]], "not finite"),
        ([1, 2], np.empty((0, 2)), "at least one of each"),
    ],
)
def test_bad_input_is_refused(costs: list[float], values: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        solve(costs, values)


def test_a_budget_or_a_value_out_of_reach_is_refused() -> None:
    knapsack = solve([2, 3], [[0.1, 0.2], [0.3, 0.1]])
    with pytest.raises(UsageError, match="give 4 or more"):
        knapsack.choices(3)
    with pytest.raises(UsageError, match=r"ask for 0\.5"):
        knapsack.cheapest(0.6)
