"""Plans: text and JSON, parse == print, and what is no plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trol
from trol.depth import Plan
from trol.errors import UsageError
from trol.policies.planned import Planned

COUNTS = st.lists(st.integers(0, 4), max_size=40)


@given(COUNTS)
def test_parse_is_the_inverse_of_print(counts: list[int]) -> None:
    plan = Plan(counts)
    again = Plan(str(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert again.for_layers(40) == tuple(counts) + (0,) * (40 - len(counts))


@given(COUNTS, st.integers(0, 3))
def test_json_is_equal_to_text(counts: list[int], beyond: int) -> None:
    plan = Plan(counts, beyond=beyond)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.for_layers(50) == tuple(counts) + (beyond,) * (50 - len(counts))
    if not beyond:
        assert Plan.from_json(plan.to_json()) == Plan(str(plan))


@given(COUNTS, st.integers(0, 5))
def test_one_plan_has_one_form(counts: list[int], more: int) -> None:
    """Layers that are skipped at the end need no naming."""
    assert Plan(counts + [0] * more) == Plan(counts)
    assert str(Plan(counts + [0] * more)) == str(Plan(counts))


@given(st.integers(0, 30))
def test_exit_is_all_layers_before_it(layer: int) -> None:
    assert Plan(f"exit@{layer}") == Plan([1] * layer)
    assert Plan(f"exit@{layer}").for_layers(32) == (1,) * layer + (0,) * (32 - layer)


@given(st.text(alphabet="0123456789-: alexit@", max_size=14))
def test_any_text_is_a_plan_or_one_clear_error(text: str) -> None:
    text = text[:8]  # no ranges of millions of layers
    try:
        plan = Plan(text)
    except UsageError as refusal:
        error = refusal
    else:
        assert Plan(str(plan)) == plan
        return
    assert "plan" in str(error)


@pytest.mark.parametrize(
    ("text", "visits"),
    [
        ("0-7:2 8-23", (2,) * 8 + (1,) * 16),
        ("8-23 0-7:2", (2,) * 8 + (1,) * 16),
        ("0-3:2 4-11", (2,) * 4 + (1,) * 8),
        ("3", (0, 0, 0, 1)),
        ("0 2:3", (1, 0, 3)),
        ("0-5:2 6-21 exit@22", (2,) * 6 + (1,) * 16),
        ("0:0 1", (0, 1)),
        ("exit@2", (1, 1)),
        ("exit@0", ()),
        ("  0-1   2:2 ", (1, 1, 2)),
    ],
)
def test_plan_text(text: str, visits: tuple[int, ...]) -> None:
    assert Plan(text).visits == visits
    assert trol.Plan(text) == Plan(text)


def test_all_is_every_layer_of_any_stack() -> None:
    assert Plan("all").for_layers(3) == (1, 1, 1)
    assert Plan("all:2").for_layers(2) == (2, 2)
    assert [str(Plan(t)) for t in ("all", "all:1", "all:3", "exit@0")] == [
        "all",
        "all",
        "all:3",
        "exit@0",
    ]


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("", "write 'all'"),
        ("0-", "'0-' in plan '0-' is no segment"),
        ("0,1", "is no segment"),
        ("7-0", "write '0-7'"),
        ("0-3 2", "names layer 2 twice"),
        ("0-9 exit@5", "exits before layer 5; end its ranges at 4"),
        ("exit@1 exit@2", "name one exit"),
        ("all 3", "'all' in plan 'all 3' is no segment"),
        ("-1", "is no segment"),
        ("0:-1", "is no segment"),
    ],
)
def test_what_is_no_plan(text: str, cure: str) -> None:
    with pytest.raises(UsageError, match="plan") as caught:
        Plan(text)
    assert cure in str(caught.value)


def test_other_bad_plans() -> None:
    with pytest.raises(UsageError, match="a plan got visits"):
        Plan([1, -1])
    with pytest.raises(UsageError, match="has no text form"):
        str(Plan([2, 3], beyond=1))
    with pytest.raises(
        UsageError, match=r"of plan '0-40' \(which is exit@41\): this stack has 32 layers \(0-31\)"
    ):
        Plan("0-40").for_layers(32)
    with pytest.raises(UsageError, match=r"name no layer above 11 \(exit@12 at most\)\.$"):
        Plan("exit@20").for_layers(12)
    with pytest.raises(UsageError, match=r"of plan '0-3 20': .*name no layer above 11\.$"):
        Plan("0-3 20").for_layers(12)
    for data in ({}, {"visits": 3}, {"visits": [1], "more": 1}):
        with pytest.raises(UsageError, match="is no plan"):
            Plan.from_json(data)


@given(st.lists(COUNTS, min_size=1, max_size=3))
def test_plans_as_policies_come_back_from_their_settings(rows: list[list[int]]) -> None:
    policy = Planned([Plan(row) for row in rows], scope="answer", skipped_kv="hole")
    assert Planned(**policy.settings()) == policy
    assert policy.bounds(0) == (
        min([*row, 0][0] for row in rows),
        max([*row, 0][0] for row in rows),
    )


def test_plans_of_no_rows_and_of_numbers() -> None:
    with pytest.raises(UsageError, match="no plan given"):
        Planned([])
    for wrong in (None, 42, [1, 0], [["0"]], 1.5):
        with pytest.raises(UsageError, match=r"is no plan; write plan text .*Plan\(\[2, 1, 0\]\)"):
            Planned(wrong)
    for wrong in (None, 42, [["0"]], [1.5], {"0": 1}):
        with pytest.raises(UsageError, match="is no plan; write plan text"):
            Plan(wrong)
