"""Static plans: as many layers as asked for, where their method says."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trol.depth import Plan
from trol.errors import UsageError
from trol.policies.planned import STATIC, kept_count, static_plan

METHODS = st.sampled_from(sorted(STATIC))
LAYERS = st.integers(1, 48)
KEEP = st.floats(0, 1, exclude_min=True)
SEEDS = st.integers(0, 2**31)


def kept(method: str, layers: int, keep: float, seed: int = 0) -> list[int]:
    visits = static_plan(method, layers, keep, seed).for_layers(layers)
    assert set(visits) <= {0, 1}
    return [layer for layer, count in enumerate(visits) if count]


@given(METHODS, LAYERS, KEEP, SEEDS)
def test_as_many_layers_stay_as_asked_for(method: str, layers: int, keep: float, seed: int) -> None:
    stays = kept(method, layers, keep, seed)
    assert len(stays) == max(1, round(keep * layers)) == kept_count(layers, keep)
    assert stays == kept(method, layers, keep, seed)


@given(st.sampled_from(["uniform", "random", "middle"]), st.integers(2, 48), KEEP, SEEDS)
def test_first_and_last_stay(method: str, layers: int, keep: float, seed: int) -> None:
    stays = kept(method, layers, keep, seed)
    assert stays[0] == 0
    assert stays[-1] == layers - 1 or len(stays) == 1


@given(st.sampled_from(["random", "exit", "middle"]), LAYERS, KEEP, KEEP, SEEDS)
def test_a_smaller_share_is_part_of_a_larger_one(
    method: str, layers: int, one: float, other: float, seed: int
) -> None:
    less, more = sorted((one, other))
    assert set(kept(method, layers, less, seed)) <= set(kept(method, layers, more, seed))


@given(st.integers(2, 48), KEEP)
def test_uniform_gaps_differ_by_one_at_most(layers: int, keep: float) -> None:
    stays = kept("uniform", layers, keep)
    gaps = {b - a for a, b in pairwise(stays)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(METHODS, LAYERS)
def test_all_of_them_is_the_plain_model(method: str, layers: int) -> None:
    assert static_plan(method, layers, 1.0) == Plan([1] * layers)


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        ("uniform", "0 2 4 7 9 11"),
        ("exit", "exit@6"),
        ("middle", "0-2 9-11"),
        ("random", "0 4-6 8 11"),
    ],
)
def test_half_of_twelve_layers(method: str, plan: str) -> None:
    """The seeded one is written down too: a plan of a seed is the same in every version."""
    assert static_plan(method, 12, 0.5) == Plan(plan)


def test_seeds_give_other_layers() -> None:
    assert len({static_plan("random", 24, 0.5, seed) for seed in range(20)}) == 20


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, math.nan, math.inf])
@pytest.mark.parametrize("method", STATIC)
def test_a_share_outside_0_to_1_is_refused(method: str, keep: float) -> None:
    with pytest.raises(UsageError, match=r"keep is .*; give a number above 0 and at most 1"):
        static_plan(method, 12, keep)


def test_other_refusals() -> None:
    with pytest.raises(UsageError, match="Did you mean 'uniform'"):
        static_plan("unifrom", 12, 0.5)
    with pytest.raises(UsageError, match="at least one layer"):
        static_plan("exit", 0, 0.5)
