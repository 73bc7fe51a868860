"""A plan as a policy: skip, repeat and early exit, for all rows or each its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from trol.depth import AbstractPolicy, Answer, Bounds, Plan, Scope, Visit
from trol.depth.roles import expand_rows
from trol.errors import UsageError


class Planned(AbstractPolicy):
    """a_r = 1 while r < n_l, then 0: layer l is visited n_l times.

    Skipping a layer is n_l = 0, early exit at e is n_l = 0 for all l >= e.

    Args:
        plan: one plan, plan text or its JSON form; or a list of them, one for each row.

    Raises:
        UsageError: a plan is none, or names a layer that the stack does not have.
    """

    name = "plan"
    decides = True

    def __init__(
        self,
        plan: Plan | str | dict[str, Any] | Sequence[Plan | str | dict[str, Any]] = "all",
        *,
        scope: Scope = "all",
        skipped_kv: Literal["project", "hole"] = "project",
    ) -> None:
        super().__init__(scope=scope, skipped_kv=skipped_kv)
        each: Any = plan if isinstance(plan, list | tuple) else [plan]
        self.plans = tuple(plan_of(one) for one in each)
        if not self.plans:
            raise UsageError("no plan given; give one, or one for each row.")

    def check(self, layers: int) -> None:
        for plan in self.plans:
            plan.for_layers(layers)

    def bounds(self, layer: int) -> Bounds:
        counts = [visits_of(plan, layer) for plan in self.plans]
        return Bounds(min(counts), max(counts))

    def again(self, visit: Visit) -> Answer:
        goes = [float(visit.number < visits_of(plan, visit.layer)) for plan in self.plans]
        if len(set(goes)) == 1:
            return goes[0]
        rows, tokens = visit.state.shape[:2]
        answers = torch.tensor(goes, device=visit.state.device)[:, None]  # Shape: [plans, 1]
        return expand_rows(answers, rows).expand(rows, tokens)

    def rows_going(self, layer: int, number: int, rows: int) -> tuple[bool, ...] | None:
        goes = [number < visits_of(plan, layer) for plan in self.plans]
        if len(set(goes)) == 1 or rows % len(goes):
            return None
        return tuple(one for one in goes for _ in range(rows // len(goes)))

    def settings(self) -> dict[str, Any]:
        plans = [plan.to_json() for plan in self.plans]
        return {
            "plan": plans[0] if len(plans) == 1 else plans,
            "scope": self.scope,
            "skipped_kv": self.skipped_kv,
        }


def plan_of(plan: Plan | str | dict[str, Any]) -> Plan:
    """A plan from itself, its text or its JSON form; raises `UsageError` when it is none."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, dict):
        return Plan.from_json(plan)
    if isinstance(plan, str):
        return Plan(plan)
    raise UsageError(
        f"{plan!r:.60} is no plan; write plan text such as '0-7:2 8-23', Plan([2, 1, 0]) for the "
        "visits of each layer, or a list of these, one for each row."
    )


def visits_of(plan: Plan, layer: int) -> int:
    """How often a plan visits one layer."""
    return plan.visits[layer] if layer < len(plan.visits) else plan.beyond
