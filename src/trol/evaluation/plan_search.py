"""Plans that a model is measured for: the layers that it misses least.

A pretrained decoder keeps an attention sink at its first token: one layer builds it, and most of
the harm of skipping that layer is done at this token (https://arxiv.org/abs/2309.17453 names the
sink). So plans for prompts are searched with the first token at full depth, and the plan found is
measured with it and without.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trol.depth import Plan, Scope, depth
from trol.errors import UsageError, unknown
from trol.evaluation.answers import StepsDone, losses, mean_loss
from trol.evaluation.draft_search import draft_plan
from trol.evaluation.hidden_states import influences, layers_of
from trol.evaluation.items import WHOLE, Item, Part, positions_of
from trol.evaluation.removal import Layers, Removal, measurements
from trol.evaluation.shared_layers import PlanLosses
from trol.evaluation.store import Measurements, Once
from trol.evaluation.tasks import questions_of, task_of
from trol.policies.planned import STATIC, Planned, kept_count, plan_keeping, static_plan

MEASURED = ("influence", "greedy", "draft")
"""The methods that look at the model, beside the static ones."""

METHODS = (*MEASURED, *STATIC)
"""The methods of `chosen_plan`. On SmolLM2 greedy with long windows leaves least harm at a share of
.73, influence less than greedy with short ones, and evenly spaced layers most (docs/studies.md)."""

KEEP_FIRST = 1
"""First tokens of a sequence that plans leave at full depth, if that is better: there the attention
sink is."""

QUESTIONS = 64
"""Questions that a plan is chosen by, where nobody says."""

WINDOWS, WINDOW = 2, 1024
"""Windows of plain text that a plan is chosen by, where nobody says, and tokens of each: a few
minutes of two cores for a model of 135 M parameters. Long ones: plans chosen by windows of 256
tokens lose layers that a longer context needs (docs/depth-selection.md)."""


CHOOSING, JUDGING = (0.0, 0.125), (0.125, 1.0)
"""Of a file of the user's, which has no splits: the part that plans are chosen by, and the part
that they are judged by, where one command does both."""


@dataclass(frozen=True)
class ChosenPlan:
    """A plan, for which tokens it is, and what it costs on the questions that chose it."""

    plan: Plan
    keep_first: int = 0
    """The first tokens of each sequence that visit every layer. Unit: tokens."""
    losses: dict[str, float] = field(default_factory=dict)
    """The answers' mean losses: `full` of the full model, and `keep_first=N` of the plan with N
    first tokens at full depth; empty where nothing was measured. Unit: nats per token."""

    @property
    def loss(self) -> float | None:
        """The plan's own loss."""
        return self.losses.get(keep_first_text(self.keep_first))


def keep_first_text(keep_first: int) -> str:
    """What a loss is called with so many first tokens at full depth."""
    return f"keep_first={keep_first}"


def items_to_choose_by(
    model: Any,
    processor: Any,
    task: str,
    count: int | None = None,
    *,
    seed: int = 0,
    judged: str = "test",
    part: Part = WHOLE,
) -> list[Item]:
    """Items of a task's validation split, as many as a search takes in a few minutes if not said.

    Where that is the split that the plan will be judged by, they are of the train split.

    Args:
        model: the model.
        processor: what prepares its inputs.
        task: a task's name.
        count: questions, or windows of plain text, at most.
        seed: which of them.
        judged: the split that the plan will be judged by.
        part: of the user's own file, from and to.
    """
    window = None
    if task_of(task).windows:
        window = min(WINDOW, positions_of(model) or WINDOW)
    count = count or (QUESTIONS if window is None else WINDOWS)
    split = "train" if judged == "validation" else "validation"
    return questions_of(
        model, processor, task, count, seed=seed, split=split, window=window, part=part
    )


def chosen_plan(
    method: str,
    model: Any,
    processor: Any,
    items: Sequence[Item],
    keep: float,
    *,
    scope: Scope = "answer",
    seed: int = 0,
    progress: StepsDone = lambda done, of: None,
    measured: Measurements | None = None,
) -> ChosenPlan:
    """The plan of max(1, round(keep * L)) layers that `method` judges best on `items`.

    Where first tokens are in the scope, it is tried with `KEEP_FIRST` of them at full depth and
    with none, and the better one is taken; of equal ones the one with none.

    Args:
        method: a static one, which measures nothing where scope is `answer`; `influence` (reads
            the states once), `greedy` (once for each layer that may go, then for the most
            promising ones at every step) or `draft` (`draft_plan`, whatever the scope).
        model: a model, plain or attached; a policy that it carries is out of force meanwhile.
        processor: what prepares its inputs.
        items: questions with answers, of a split that the plan is not judged by.
        keep: the share of layers that stay.
        scope: whose tokens will skip: in the paper, those of answers.
        seed: of the method `random`.
        progress: called before the first measurement, and after each.
        measured: keeps what is measured, and has what was measured before.

    Raises:
        UsageError: the method is unknown, `keep` is outside (0, 1], or no items are given.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    layers = layers_of(model)
    kept = kept_count(layers, keep)
    if method in STATIC and scope == "answer":
        return ChosenPlan(static_plan(method, layers, keep, seed))
    if not items:
        raise UsageError(f"{method} measures on questions, but got none; give at least one.")
    measured = measured or Measurements()
    subject = (model, processor, items)
    if method == "draft":
        return ChosenPlan(draft_plan(*subject, keep, progress=progress, measured=measured).plan)
    steps = {"influence": 1, "greedy": measurements(layers, layers - kept)}.get(method, 0)
    of = steps + 2 + (scope != "answer")
    search = _Search(subject, scope, measured.counted(progress, of))
    if method in STATIC:
        plan = static_plan(method, layers, keep, seed)
    else:
        find = search.by_influence if method == "influence" else search.greedily
        plan = plan_keeping(find(kept), layers)
    chosen = search.with_its_losses(plan)
    progress(of, of)
    return chosen


Subject = tuple[Any, Any, Sequence[Item]]
"""Model, processor and items."""


class _Search:
    """The measurements of one search; `once` gives the value of a name, measured if it must be."""

    def __init__(self, subject: Subject, scope: Scope, once: Once) -> None:
        self.subject, self.once = subject, once
        self.scope: Scope = scope
        self.layers = layers_of(subject[0])
        self.keep_first = 0 if scope == "answer" else KEEP_FIRST
        self._losses: dict[int, PlanLosses] = {}

    def by_influence(self, kept: int) -> list[int]:
        """The layers of greatest block influence: the mean over tokens, times the worst token's.

        ShortGPT (https://arxiv.org/abs/2403.03853, section 3.3) ranks by the mean alone, which does
        not see what a layer does at few tokens. Without 15 of its 30 layers, SmolLM2 has 52 times
        its perplexity on docstrings (1,024 tokens) by the mean, 148 by the worst token and 21 by
        both, and without 8 of them 2.64 by the mean and by both. Of equal layers the earlier stays.
        """
        each = self.once(
            "influences", lambda: influences(*self.subject, self.scope, keep_first=self.keep_first)
        )
        both = [one["mean"] * one["worst"] for one in each]
        return sorted(range(self.layers), key=lambda layer: (-both[layer], layer))[:kept]

    def greedily(self, kept: int) -> Layers:
        """The layers left when those that the loss misses least are gone one by one."""

        def cost(stays: Layers, base: Layers) -> float:
            return self.loss(plan_keeping(stays, self.layers), plan_keeping(base, self.layers))

        removal = Removal(range(self.layers), cost)
        for _ in removal.take(self.layers - kept):
            pass
        return removal.left

    def loss(self, plan: Plan, base: Plan, keep_first: int | None = None) -> float:
        """The loss under a plan that has its first layers in common with `base`."""
        first = self.keep_first if keep_first is None else keep_first
        name = f"{plan}, {keep_first_text(first)}"
        return self.once(name, lambda: self._of(first).of(plan, base))

    def with_its_losses(self, plan: Plan) -> ChosenPlan:
        """The plan with its loss and the full model's, and the better `keep_first`."""
        full = Plan([1] * self.layers)
        values = {"full": self.loss(full, full)}
        tried = sorted({0, self.keep_first})
        values |= {keep_first_text(first): self.loss(plan, plan, first) for first in tried}
        return ChosenPlan(
            plan, min(tried, key=lambda first: (values[keep_first_text(first)], first)), values
        )

    def _of(self, keep_first: int) -> PlanLosses:
        if keep_first not in self._losses:
            self._losses[keep_first] = PlanLosses(*self.subject, self.scope, keep_first)
        return self._losses[keep_first]


def plan_loss(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    plan: Plan,
    scope: Scope,
    *,
    keep_first: int = 0,
) -> float:
    """The items' mean loss under a plan, as `mean_loss` takes it; NaN counts as infinite."""
    with depth(model, Planned(plan, scope=scope, keep_first=keep_first)):
        mean = mean_loss(items, losses(model, processor, items))
    return math.inf if math.isnan(mean) else mean
