"""Plans that are chosen by measuring a model: which layers it misses least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from trol.depth import Plan, Scope, depth
from trol.errors import UsageError, unknown
from trol.evaluation.hidden_states import influences
from trol.evaluation.kept import Measurements
from trol.evaluation.metrics import losses
from trol.evaluation.removing import measurements, removed
from trol.evaluation.tasks import Item
from trol.host.layers import find_decoder, layer_list
from trol.policies.planned import Planned
from trol.policies.static_plans import kept_count, plan_of

Progress = Callable[[int, int], None]
"""(measurements made, measurements to make)."""

CHOSEN = {
    "influence": "trol.evaluation.chosen_plans:influence",
    "greedy": "trol.evaluation.chosen_plans:greedy",
    "draft": "trol.evaluation.draft_plans:draft",
}
"""Method -> where its function is, which takes what `chosen_plan` does."""


def chosen_plan(
    method: str,
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope = "answer",
    progress: Progress = lambda done, of: None,
    measured: Measurements | None = None,
) -> Plan:
    """The plan of max(1, round(keep * L)) layers that `method` finds best on `items`.

    Args:
        method: `influence` (measures once), `greedy` (once for each layer that may go, then for
            the most promising ones at every step) or `draft`.
        model: a model, plain or attached; a policy that it carries is out of force meanwhile.
        processor: what prepares its inputs.
        items: questions with answers, of a split that the plan is not judged by.
        keep: the share of layers that stay.
        scope: whose tokens will skip: the paper's kind is `answer`.
        progress: called before the first measurement, and after each.
        measured: keeps what is measured, and has what was measured before.

    Raises:
        UsageError: the method is unknown, `keep` is outside (0, 1], or no items are given.
    """
    if method not in CHOSEN:
        raise unknown("method", method, CHOSEN)
    kept_count(_count(model), keep)
    if not items:
        raise UsageError(f"{method} measures on questions, but got none; give at least one.")
    module, _, name = CHOSEN[method].partition(":")
    choose = getattr(import_module(module), name)
    measured = measured or Measurements()
    return choose(model, processor, items, keep, scope=scope, progress=progress, measured=measured)


def influence(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope,
    progress: Progress,
    measured: Measurements,
) -> Plan:
    """The layers of greatest block influence, measured once; of equal ones the earlier stays.

    ShortGPT (https://arxiv.org/abs/2403.03853, section 3.3).
    """
    progress(len(measured.found), 1)
    found = measured.value("influences", lambda: influences(model, processor, items, scope))
    progress(1, 1)
    ranked = sorted(range(len(found)), key=lambda layer: (-found[layer], layer))
    return plan_of(ranked[: kept_count(len(found), keep)], len(found))


def greedy(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope,
    progress: Progress,
    measured: Measurements,
) -> Plan:
    """Layers taken away one by one, each time the one without which the answers' loss is least.

    After the first step only the most promising layers are measured again (`removing`). Of equal
    losses the earliest layer goes. No layer is kept for its place.
    """
    layers = _count(model)
    count = layers - kept_count(layers, keep)
    of = measurements(layers, count)

    def loss(stays: tuple[int, ...]) -> float:
        plan = plan_of(stays, layers)
        before = len(measured.found)
        found = measured.value(str(plan), lambda: plan_loss(model, processor, items, plan, scope))
        if len(measured.found) > before:
            progress(len(measured.found), of)
        return found

    progress(min(len(measured.found), of), of)
    gone = list(removed(range(layers), count, loss))
    return plan_of(set(range(layers)).difference(gone), layers)


def plan_loss(model: Any, processor: Any, items: Sequence[Item], plan: Plan, scope: Scope) -> float:
    """Mean over items of the answers' loss under a plan; what is no number counts as infinite."""
    with depth(model, Planned(plan, scope=scope)):
        found = losses(model, processor, items)
    mean = sum(found) / len(found)
    return math.inf if math.isnan(mean) else mean


def _count(model: Any) -> int:
    layers = layer_list(find_decoder(model))
    assert layers is not None  # or find_decoder had raised
    return len(layers)
