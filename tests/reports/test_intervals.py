"""Paired differences and their 95 % intervals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trol.reports.pages import compare

ACCURACY = st.floats(0, 1, allow_subnormal=False)


def test_one_seed_has_no_interval() -> None:
    one = compare([0.9], [0.1])
    assert (one.low, one.high, one.text()) == (None, None, "+0.800")


def test_the_interval_is_students() -> None:
    one = compare([0.03, 0.01, 0.02], [0.0, 0.0, 0.0])
    assert one.mean == pytest.approx(0.02)
    assert one.high == pytest.approx(0.02 + 4.3027 * 0.01 / 3**0.5, abs=1e-4)
    assert one.text() == "+0.020 [−0.005, +0.045]"
    assert one.text(100, 1) == "+2.0 [−0.5, +4.5]"


@given(st.lists(st.tuples(ACCURACY, ACCURACY), min_size=2, max_size=8))
def test_swapping_the_two_turns_the_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(values) for values in zip(*pairs, strict=True))
    there, back = compare(a, b), compare(b, a)
    assert there.low is not None
    assert back.high is not None
    assert there.low == pytest.approx(-back.high)
    assert there.mean == pytest.approx(-back.mean)


def test_seeds_must_pair() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([0.1, 0.2], [0.1])
