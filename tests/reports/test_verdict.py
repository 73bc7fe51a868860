"""Verdicts never say more than the paired differences show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trol.reports.charts import compare, verdict

ACCURACY = st.floats(0, 1, allow_subnormal=False)


def words(a: list[float], b: list[float]) -> str:
    return verdict(a, b, this="this", that="that")


def test_one_seed_concludes_nothing() -> None:
    assert words([0.9], [0.1]).startswith("One seed, so no spread and no conclusion")


def test_a_mean_within_the_spread_is_no_difference() -> None:
    said = words([0.9, 0.7, 0.8], [0.8, 0.8, 0.78])
    assert said.startswith("No difference is shown between this and that")
    assert "ahead in 2 of 3" in said


def test_a_difference_is_told_with_its_interval_and_its_caution() -> None:
    said = words([0.8, 0.81, 0.82], [0.7, 0.71, 0.721])
    assert said.startswith("This scored higher than that")
    assert said.endswith("take it as a lead.")
    worse = words([0.7, 0.71, 0.72, 0.7, 0.7], [0.8, 0.8, 0.81, 0.79, 0.805])
    assert worse.startswith("This scored lower than that")
    assert "lead" not in worse


def test_the_interval_is_students() -> None:
    found = compare([0.03, 0.01, 0.02], [0.0, 0.0, 0.0])
    assert found.mean == pytest.approx(0.02)
    assert found.spread == pytest.approx(0.01)
    assert found.high == pytest.approx(0.02 + 4.3027 * 0.01 / 3**0.5, abs=1e-4)


@given(st.lists(st.tuples(ACCURACY, ACCURACY), min_size=2, max_size=8))
def test_swapping_the_two_never_turns_a_tie_into_a_win(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    there, back = compare(a, b), compare(b, a)
    assert there.shown == back.shown
    if there.shown:
        assert ("higher" in words(a, b)) == ("lower" in words(b, a))


def test_seeds_must_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([0.1, 0.2], [0.1])
