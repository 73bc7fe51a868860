"""One batch under plan after plan, where the layers below the first that plans differ in run once.

A base plan runs whole, and what enters each of its layers is recorded; a plan that is the base's up
to layer l begins with what entered that layer. What it computes is the same to the last digit.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trol.depth import AbstractPolicy, Answer, Bounds, Plan, Scope, Visit, depth
from trol.depth.roles import Mask
from trol.evaluation.answers import mean_loss, mean_losses
from trol.evaluation.hidden_states import entering, layers_of, scoped
from trol.evaluation.items import Item, batches, labelled
from trol.policies.planned import Planned, visits_of

BATCH = 16
"""Items read at once, those of like length together."""

RECORDED = 2**27
"""Numbers in the recorded states of all batches at most: 512 MiB in float32. Nothing is recorded of
the batches above it, and every plan runs whole on them."""


class Resumed(AbstractPolicy):
    """A plan from layer `first` on, entered by the states that another run left there.

    Args:
        plan: the plan; what it says of earlier layers is not read.
        holds: for which tokens; all others visit each layer once. Shape: [B, T].
        first: the layer that is entered.
        states: what enters it. Shape: [B, T, D].
    """

    name = "resumed"
    decides = True
    translates = True

    def __init__(self, plan: Plan, holds: Mask, first: int, states: Tensor) -> None:
        super().__init__(scope="all")
        self.plan, self.holds, self.first, self.states = plan, holds, first, states

    def bounds(self, layer: int) -> Bounds:
        if layer < self.first:
            return Bounds(0, 0)
        visits = visits_of(self.plan, layer)
        most = max(visits, 1)
        if layer == self.first:  # one whose visits are settled may not be entered at all
            return Bounds(0, most)
        return Bounds(visits, visits) if self.holds is True else Bounds(min(visits, 1), most)

    def enter(self, visit: Visit) -> Tensor:
        return self.states if visit.layer == self.first else visit.state

    def again(self, visit: Visit) -> Answer:
        goes = float(visit.number < visits_of(self.plan, visit.layer))
        plain = float(visit.number < 1)
        if goes == plain or self.holds is True:
            return goes
        return torch.where(torch.as_tensor(self.holds), goes, plain)

    def settings(self) -> dict[str, Any]:
        return {"plan": str(self.plan), "first": self.first}


class SharedRun:
    """One batch under plan after plan.

    Args:
        model: the model.
        read: reads the batch under a policy, with whatever caller wants of it.
        policy: plan -> the policy that runs it whole.
        holds: the tokens that plans are for. Shape: [B, T].
        numbers: in the states that enter one layer, B * T * D.
    """

    def __init__(
        self,
        model: Any,
        read: Callable[[AbstractPolicy], Any],
        policy: Callable[[Plan], AbstractPolicy],
        *,
        holds: Mask,
        numbers: int,
    ) -> None:
        self.model, self.read, self.policy, self.holds = model, read, policy, holds
        self.layers = layers_of(model)
        self.numbers = self.layers * numbers
        self.base: Plan | None = None
        self.entered: list[Tensor] = []
        """What enters each layer under the base plan; empty before there is one."""

    def under(self, plan: Plan) -> Any:
        """What `read` gives under a plan."""
        return self.read(self._resumed(plan))

    def start_from(self, plan: Plan) -> None:
        """Records what enters each layer under the base of the plans to come."""
        known = self.entered[: self._first_other(plan) + 1]
        with entering(self.model) as entered:
            self.read(self._resumed(plan))
        self.entered = [*known, *entered[len(known) :]]
        self.base = plan

    def _resumed(self, plan: Plan) -> AbstractPolicy:
        if not self.entered:
            return self.policy(plan)
        first = self._first_other(plan)
        return Resumed(plan, self.holds, first, self.entered[first])

    def _first_other(self, plan: Plan) -> int:
        """The first layer in which a plan differs from the base, the last one where none does."""
        base, last = self.base or plan, self.layers - 1
        return next((n for n in range(last) if visits_of(plan, n) != visits_of(base, n)), last)


class SharedRuns:
    """Several batches under plan after plan, recorded as far as `RECORDED` allows."""

    def __init__(self, runs: Sequence[SharedRun]) -> None:
        self.runs = runs
        self.base: Plan | None = None

    def under(self, plan: Plan, base: Plan) -> Iterator[Any]:
        """What each batch gives under a plan that has its first layers in common with `base`."""
        if self.base != base:
            numbers = 0
            for run in self.runs:
                numbers += run.numbers
                if numbers <= RECORDED:
                    run.start_from(base)
            self.base = base
        return (run.under(plan) for run in self.runs)


class PlanLosses:
    """The items' mean loss under one plan after another, as `mean_loss` takes it.

    Args:
        model: a model, plain or attached; a policy that it carries is out of force meanwhile.
        processor: what prepares its inputs.
        items: questions with answers, or windows of text.
        scope: the tokens that the plans are for.
        keep_first: the first tokens of each sequence that they are not for.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        items: Sequence[Item],
        scope: Scope,
        keep_first: int = 0,
    ) -> None:
        self.model, self.keep_first = model, keep_first
        self.scope: Scope = scope
        self.items = sorted(items, key=lambda item: len(item.question) + len(item.answer))
        read = (dict(labelled(model, processor, some)) for some in batches(self.items, BATCH))
        self.runs = SharedRuns([self._run(inputs) for inputs in read])

    def of(self, plan: Plan, base: Plan) -> float:
        """The loss under a plan with its first layers in common with `base`; NaN is infinite."""
        each = [loss for some in self.runs.under(plan, base) for loss in some]
        mean = mean_loss(self.items, each)
        return math.inf if math.isnan(mean) else mean

    def _run(self, inputs: Mapping[str, Tensor]) -> SharedRun:
        def losses(policy: AbstractPolicy) -> list[float]:
            with depth(self.model, policy):
                return mean_losses(self.model, dict(inputs))

        return SharedRun(
            self.model,
            losses,
            lambda plan: Planned(plan, scope=self.scope, keep_first=self.keep_first),
            holds=self._holds(inputs),
            numbers=inputs["input_ids"].numel() * self.model.config.get_text_config().hidden_size,
        )

    def _holds(self, inputs: Mapping[str, Tensor]) -> Mask:
        if self.scope == "all" and not self.keep_first:
            return True
        places = inputs["attention_mask"].long().cumsum(-1) - 1
        return scoped(inputs, self.scope) & (places >= self.keep_first)
