"""The menu of an oracle: plans from cheap to dear, the full model among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trol.depth import Plan
from trol.errors import UsageError, unknown
from trol.policies.static_plans import STATIC, static_plan

_SERIES = re.compile(r"(?P<method>[a-z]+):(?P<levels>\d+)")


@dataclass(frozen=True)
class Level:
    """One cost level: a plan, and what it costs."""

    plan: Plan
    text: str
    """The plan with every visited layer named, so that one plan has one text."""
    cost: int
    """Σ_l n_l, the layers that a token of the answer visits. Unit: layers."""


@dataclass(frozen=True)
class Menu:
    """The levels, cheapest first."""

    levels: tuple[Level, ...]
    layers: int
    """Layers of the stack."""

    @property
    def full(self) -> int:
        """Which level is the full model."""
        return next(i for i, one in enumerate(self.levels) if _is_full(one.plan, self.layers))

    @property
    def costs(self) -> list[int]:
        """What each level costs. Unit: layers."""
        return [level.cost for level in self.levels]


def read_menu(text: str, layers: int, *, seed: int = 0, read: Callable[[str], Plan] = Plan) -> Menu:
    """The menu that `text` names for a stack of `layers` layers.

    Args:
        text: plans with commas between; `uniform:8` and the like stand for eight plans of that
            static method, whose costs are evenly spaced.
        layers: of the stack.
        seed: of the method `random`.
        read: plan text, or the name of a plan file, -> plan.

    Raises:
        UsageError: a part is no plan, names layers that the stack lacks, or asks for more levels
            than it has layers; or the menu has one level, or lacks the full model.
    """
    plans: list[Plan] = []
    for part in parsed(text, read):
        plans += [part] if isinstance(part, Plan) else _series(*part, layers=layers, seed=seed)
    return menu_of(plans, layers)


def parsed(text: str, read: Callable[[str], Plan]) -> list[Plan | tuple[str, int]]:
    """The parts of a menu: plans, and series of so many levels; raises as `read_menu`."""
    found: list[Plan | tuple[str, int]] = []
    for part in filter(None, map(str.strip, text.split(","))):
        series = _SERIES.fullmatch(part)
        if series is None or series["method"] == "all":
            found.append(read(part))
            continue
        if series["method"] not in STATIC:
            raise unknown("series of plans", series["method"], STATIC)
        found.append((series["method"], int(series["levels"])))
    return found


def menu_of(plans: Sequence[Plan], layers: int) -> Menu:
    """The menu of these plans; the same plan twice is one level. Raises as `read_menu`."""
    levels = {str(level.plan): level for level in (_level(plan, layers) for plan in plans)}
    if not any(_is_full(level.plan, layers) for level in levels.values()):
        raise UsageError(
            f"the menu lacks the full model, which its levels are compared with; add 'all' to "
            f"--menu ({', '.join(levels) or 'it is empty'})."
        )
    if len(levels) < 2:
        raise UsageError(
            "the menu has one level, so there is nothing to choose; give more plans, such as "
            f"--menu 'uniform:{min(layers, 8)}'."
        )
    ordered = sorted(levels.values(), key=lambda level: (level.cost, level.text))
    return Menu(tuple(ordered), layers)


def _series(method: str, levels: int, *, layers: int, seed: int) -> list[Plan]:
    if not 2 <= levels <= layers:
        raise UsageError(
            f"'{method}:{levels}' asks for {levels} levels of a stack of {layers} layers; give 2 "
            f"to {layers}."
        )
    # level / levels as a share of the layers: evenly spaced costs, the last one the full model.
    return [static_plan(method, layers, level / levels, seed) for level in range(1, levels + 1)]


def _level(plan: Plan, layers: int) -> Level:
    visits = plan.for_layers(layers)
    named = Plan(visits)
    return Level(named, str(named), sum(visits))


def _is_full(plan: Plan, layers: int) -> bool:
    return plan.for_layers(layers) == (1,) * layers
