"""Policies that decide nothing while running: a plan, or a trace to repeat.

Also the static plans, which keep a share of the layers without looking at a model. All methods keep
the same number of layers for a share, so that their plans cost the same.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from trol.depth import Answer, Bounds, Plan, Scope, Trace, Visit
from trol.depth.roles import expand_rows
from trol.errors import UsageError, unknown
from trol.policies.base import DataclassPolicy, SkippedKV


@dataclass(eq=False, repr=False)
class Planned(DataclassPolicy):
    """a_r = 1 while r < n_l, then 0: layer l is visited n_l times.

    Skipping a layer is n_l = 0, early exit at e is n_l = 0 for all l >= e.

    Args:
        plan: one plan, plan text or its JSON form; or a list of them, one for each row.
        scope: whose visits the plan settles; all others visit every layer once.
        skipped_kv: what later tokens see of one that skipped.
        keep_first: tokens at the head of each sequence that visit every layer once.

    Raises:
        UsageError: a plan is malformed, or names a layer that the stack does not have.
    """

    name = "plan"
    decides = True

    plan: Plan | str | dict[str, Any] | Sequence[Plan | str | dict[str, Any]] = "all"
    _: KW_ONLY
    scope: Scope = "all"
    skipped_kv: SkippedKV = "project"
    keep_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        each: Any = self.plan if isinstance(self.plan, list | tuple) else [self.plan]
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
        return super().settings() | {"plan": plans[0] if len(plans) == 1 else plans}


def plan_of(plan: Plan | str | dict[str, Any]) -> Plan:
    """A plan from itself, its text or its JSON form; raises `UsageError` for anything else."""
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


@dataclass(eq=False, repr=False)
class Replay(DataclassPolicy):
    """a_r = (sum_{j>r} w_j) / (sum_{j>=r} w_j): the answers that give a trace's weights again.

    Args:
        weights: w_r of every layer and token. Shape: [L, R + 1, B, T]; columns count from the
            first token that the cache ever saw, padding included.
        visits: how often each token visited each layer. Shape: [L, B, T].
        scope, keep_first: those of the policy that was traced.

    Raises:
        UsageError: the stack has another number of layers, or more tokens come than were traced.
    """

    name = "replay"
    reads_start = True

    weights: Tensor | list[Any]
    visits: Tensor | list[Any]
    _: KW_ONLY
    scope: Scope = "all"
    keep_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights = torch.as_tensor(self.weights, dtype=torch.float32)
        self.visits = torch.as_tensor(self.visits)
        # sum_{j>=r} w_j, from behind: 1 - w would round the smallest gates to 0.
        left = self.weights.flip(1).cumsum(dim=1).flip(1)
        later = torch.cat([left[:, 1:], torch.zeros_like(left[:, :1])], dim=1)
        again = torch.where(left > 0, later / left, 0.0)
        self.answers = again.clamp(0, 1)  # Shape: [L, R + 1, B, T]

    @classmethod
    def of(cls, trace: Trace, *, scope: Scope = "all", keep_first: int = 0) -> "Replay":
        """The replay of everything that `trace` saw.

        Raises:
            UsageError: the policy translated states (trained exit heads), which no trace holds.
        """
        if trace.translated:
            raise UsageError(
                "the traced policy changes states at exits, and a trace holds visits and weights "
                "alone; attach the policy itself, or trace it with heads=False."
            )
        return cls(trace.weights, trace.visits, scope=scope, keep_first=keep_first)

    def check(self, layers: int) -> None:
        if len(self.visits) != layers:
            raise UsageError(
                f"the trace has {len(self.visits)} layers, this stack has {layers}; replay it on "
                "the model it was taken from."
            )

    def bounds(self, layer: int) -> Bounds:
        visits: Any = self.visits[layer]
        return Bounds(int(visits.min()), int(visits.max()))

    def again(self, visit: Visit) -> Answer:
        rows, tokens = visit.state.shape[:2]
        traced = self.answers.shape[-1]
        if visit.start + tokens > traced:
            raise UsageError(
                f"the trace covers {traced} tokens, this call ends at {visit.start + tokens}; "
                "trace the whole run."
            )
        here = self.answers[visit.layer, visit.number, :, visit.start : visit.start + tokens]
        return expand_rows(here.to(visit.state.device), rows)

    def settings(self) -> dict[str, Any]:
        lists = {
            name: torch.as_tensor(getattr(self, name)).tolist() for name in ("weights", "visits")
        }
        return super().settings() | lists


def kept_count(layers: int, keep: float) -> int:
    """How many of `layers` layers a share keeps: max(1, round(keep * layers)).

    Raises:
        UsageError: `keep` is outside (0, 1], or there is no layer.
    """
    if layers < 1:
        raise UsageError(f"a stack of {layers} layers has no plan; give at least one layer.")
    if not 0 < keep <= 1:  # NaN as well
        raise UsageError(
            f"keep is {keep}, but is the share of the layers that stay; give a number above 0 and "
            "at most 1, such as 0.5."
        )
    return max(1, round(keep * layers))


def plan_keeping(kept: Iterable[int], layers: int) -> Plan:
    """The plan that visits the layers `kept` once and skips the others of `layers` layers."""
    stays = frozenset(kept)
    return Plan([int(layer in stays) for layer in range(layers)])


def uniform(layers: int, kept: int, seed: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them.

    Layer i of the k that stay is round(i (L - 1) / (k - 1)); one alone is the first. Unified Layer
    Skipping (https://arxiv.org/abs/2404.06954, section 3).
    """
    if kept == 1:
        return [0]
    steps = kept - 1
    return [(2 * i * (layers - 1) + steps) // (2 * steps) for i in range(kept)]


def at_random(layers: int, kept: int, seed: int) -> list[int]:
    """The first and the last layer, and layers between them in a seed's order.

    The paper's random routes (https://arxiv.org/abs/2410.20022) change with every forward pass;
    a plan stays for the whole sequence. As with its controllers, the first and the last layer
    always run. With one seed, the layers of a smaller share are among those of a larger one.
    """
    between = list(range(1, layers - 1))
    random.Random(f"plan/{layers}/{seed}").shuffle(between)
    return sorted([0, layers - 1, *between][:kept] if layers > 1 else [0])


def early_exit(layers: int, kept: int, seed: int) -> list[int]:
    """The first layers: the last ones are off, which is an exit before layer `kept`."""
    return list(range(kept))


def middle(layers: int, kept: int, seed: int) -> list[int]:
    """All layers but one block in the middle; the front keeps one more where the rest is odd."""
    front = (kept + 1) // 2
    return [*range(front), *range(layers - (kept - front), layers)]


STATIC: dict[str, Callable[[int, int, int], list[int]]] = {
    "uniform": uniform,
    "random": at_random,
    "exit": early_exit,
    "middle": middle,
}
"""Method -> (layers, how many stay, seed) -> the layers that stay, in order."""


def static_plan(method: str, layers: int, keep: float, seed: int = 0) -> Plan:
    """The plan by which a stack of `layers` layers keeps max(1, round(keep * layers)) of them.

    `seed` is read by `random` alone.

    Raises:
        UsageError: the method is unknown, or `keep` is outside (0, 1].
    """
    if method not in STATIC:
        raise unknown("method", method, STATIC)
    return plan_keeping(STATIC[method](layers, kept_count(layers, keep), seed), layers)
