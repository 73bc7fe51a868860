"""What an oracle saw, as a table of questions and levels, and what a router makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trol.data.oracle_rows import OracleRow
from trol.depth import Plan
from trol.errors import DataError, UsageError, unknown
from trol.policies.planned import plan_of
from trol.policies.router import first_sure

DIALS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Dials of a report."""


@dataclass(frozen=True)
class Table:
    """N questions, each answered at the M levels of a menu, the full one last."""

    menu: tuple[Plan, ...]
    questions: tuple[OracleRow, ...]
    """A row of each question."""
    costs: Tensor
    """Shape: [N, M]. Unit: layers of an answer's token."""
    scores: Tensor
    """Higher is better. Shape: [N, M]."""
    tolerance: float = 0.0

    @property
    def items(self) -> list[int]:
        """The questions' numbers."""
        return [row.item for row in self.questions]

    @property
    def suffices(self) -> Tensor:
        """Where a level scores at least what the full one does, within the tolerance: [N, M]."""
        return self.scores >= self.scores[:, -1:] - self.tolerance

    def of(self, some: Sequence[int]) -> Table:
        """The same of some questions, by their places in the table."""
        picked = tuple(self.questions[i] for i in some)
        where = list(some)
        return Table(self.menu, picked, self.costs[where], self.scores[where], self.tolerance)


def table(
    rows: Iterable[OracleRow],
    metric: str,
    layers: int,
    menu: Sequence[Plan | str] | None,
    tolerance: float,
) -> Table:
    """The table of an oracle's greedy answers; of all their plans where `menu` is None.

    Raises:
        UsageError: the metric is none of the rows', or there are no rows.
        DataError: a question lacks a level of the menu.
    """
    greedy = [row for row in rows if row.sample == 0]
    if not greedy:
        raise UsageError("no rows to learn from; give those of a folder that `trol oracle` wrote.")
    known = set.intersection(*(set(row.scores) for row in greedy))
    if metric not in known:
        raise unknown("metric of these rows", metric, known)
    cells = {(row.item, Plan(row.plan).for_layers(layers)): row for row in greedy}
    plans = {row.plan: row.cost for row in greedy}
    cheap_first = sorted(plans, key=lambda text: (plans[text], text))
    levels = tuple(plan_of(plan) for plan in (cheap_first if menu is None else menu))
    visits = [plan.for_layers(layers) for plan in levels]
    items = sorted({row.item for row in greedy})
    for item in items:
        for plan, counts in zip(levels, visits, strict=True):
            if (item, counts) not in cells:
                raise DataError(
                    f"question {item} was not answered at level '{plan}'; finish the oracle's "
                    "folder, or leave the level out of the menu."
                )
    found = [[cells[item, counts] for counts in visits] for item in items]
    return Table(
        levels,
        tuple(line[0] for line in found),
        torch.tensor([[float(row.cost) for row in line] for line in found]),
        torch.tensor([[row.value(metric) for row in line] for line in found]),
        tolerance,
    )


def report(logits: Tensor, data: Table, dials: Sequence[float]) -> dict[str, Any]:
    """How right a router is, and what it costs and scores at each dial, by what the oracle saw.

    `random` deals the levels that the router chose to questions at random: the same budget,
    expected. `oracle` takes the cheapest level that suffices. Shape of logits: [N, M - 1].
    """
    suffices = data.suffices
    right = (logits > 0) == suffices[:, :-1]
    cheapest = suffices.int().argmax(1)  # the full one suffices always
    full = torch.full_like(cheapest, len(data.menu) - 1)
    return {
        "questions": len(data.items),
        "menu": [str(plan) for plan in data.menu],
        "accuracy": right.float().mean().item(),
        "accuracy_by_level": right.float().mean(0).tolist(),
        "suffices_by_level": suffices.float().mean(0).tolist(),
        "full": _means(full, data),
        "oracle": _means(cheapest, data),
        "dials": [_at(dial, logits, data) for dial in dials],
    }


def _at(dial: float, logits: Tensor, data: Table) -> dict[str, Any]:
    levels = first_sure(logits, dial)
    shares = torch.bincount(levels, minlength=len(data.menu)) / len(levels)
    dealt = {
        "cost": (shares * data.costs.mean(0)).sum().item(),
        "score": (shares * data.scores.mean(0)).sum().item(),
    }
    return {"dial": dial, **_means(levels, data), "random": dealt, "shares": shares.tolist()}


def _means(levels: Tensor, data: Table) -> dict[str, float]:
    """Mean cost and score where question i is answered at level levels[i]."""
    picked = levels[:, None]
    return {
        "cost": data.costs.gather(1, picked).mean().item(),
        "score": data.scores.gather(1, picked).mean().item(),
    }
