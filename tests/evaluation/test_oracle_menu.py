"""The menu: from cheap to dear, the full model on it."""

from inspect import signature

import pytest

from trol.cli.oracle import oracle as command
from trol.depth import Plan
from trol.errors import UsageError
from trol.evaluation.oracle import DEFAULT_MENU, menu_of, read_menu
from trol.evaluation.plan_search import ChosenPlan
from trol.policies.planned import Planned, static_plan


def test_eight_levels_are_evenly_spaced() -> None:
    menu = read_menu("uniform:8", 12)
    assert menu.costs == [2, 3, 4, 6, 8, 9, 10, 12]
    assert menu.levels[menu.full].text == "0-11"
    assert read_menu("exit:4", 12).levels[1].text == "0-5"


@pytest.mark.parametrize("layers", range(2, 34))
def test_levels_of_a_series_all_differ(layers: int) -> None:
    for levels in range(2, layers + 1):
        assert len(set(read_menu(f"exit:{levels}", layers).costs)) == levels


def test_a_measured_series_goes_from_half_of_the_layers_to_all() -> None:
    asked: list[tuple[str, float]] = []

    def choose(method: str, share: float) -> ChosenPlan:
        asked.append((method, share))
        return ChosenPlan(static_plan("middle", 12, share), keep_first=int(share < 0.7))

    menu = read_menu("influence:4", 12, choose=choose)
    assert asked == [("influence", pytest.approx(share)) for share in (1 / 2, 2 / 3, 5 / 6)]
    assert menu.costs == [6, 8, 10, 12]
    assert [level.keep_first for level in menu.levels] == [1, 1, 0, 0]
    assert menu.levels[0].text == "0-2 9-11, keep_first=1"
    assert menu.levels[0].policy("all") == Planned("0-2 9-11", scope="all", keep_first=1)
    assert read_menu("greedy:8", 12, choose=choose).costs == [6, 7, 8, 9, 10, 11, 12]
    with pytest.raises(UsageError, match="measures a model"):
        read_menu("influence:4", 12)


def test_the_commands_menu_is_the_one_that_errors_name() -> None:
    assert signature(command).parameters["menu"].default == DEFAULT_MENU


def test_series_and_plans_mix_and_the_same_plan_is_one_level() -> None:
    menu = read_menu("uniform:2, exit:2, all, 0-1:2", 4)
    assert [level.text for level in menu.levels] == ["0 3", "0-1", "0-1:2", "0-3"]
    assert menu.costs == [2, 2, 4, 4]
    assert menu.full == 3


def test_plan_files_are_read_by_whoever_can() -> None:
    menu = read_menu(
        "half.json,all", 4, read=lambda name: Plan({"half.json": "0-1"}.get(name, name))
    )
    assert menu.costs == [2, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0-1,0-2", "lacks the full model.*add 'all'"),
        ("all:2,0", "lacks the full model"),
        ("", "lacks the full model"),
        ("all", "one level"),
        ("all,0-3", "one level"),
        ("all,0-9", "this stack has 4 layers"),
        ("uniform:8", "give 2 to 4"),
        ("uniform:1", "give 2 to 4"),
        ("unform:4", "Did you mean 'uniform'"),
        ("all,half", "is no segment"),
    ],
)
def test_bad_menus_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_menu(text, 4)


def test_an_empty_plan_is_a_level() -> None:
    assert menu_of([Plan("exit@0"), Plan("all")], 3).costs == [0, 3]
