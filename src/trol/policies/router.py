"""A router per sequence: the prompt's first hidden states choose one plan for the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trol.depth import AbstractPolicy, Answer, Bounds, Plan, Scope, Visit
from trol.depth.policy import check_share
from trol.errors import UsageError
from trol.policies.controller import start_linear
from trol.policies.parameters import Learnt, tell_untrained
from trol.policies.planned import plan_of, visits_of

UNTRAINED = "Router's parameters were never trained: it chooses plans at random."


class Ballot(Learnt):
    """Votes of single tokens, and what their mean says of each level; all in float32.

        f(x) = relu(W_1 norm(x))        P(level m suffices) = sigmoid(W_2 mean_t f(x_t))_m

    norm takes mean and scale off, without parameters. The weights are parameters and no
    `nn.Linear`, so that nothing that looks for linear maps in a host takes them for the host's.
    """

    def __init__(self, width: int, hidden: int, levels: int) -> None:
        super().__init__()
        self.vote_weight = nn.Parameter(torch.empty(hidden, width))
        self.vote_bias = nn.Parameter(torch.empty(hidden))
        self.verdict_weight = nn.Parameter(torch.empty(levels, hidden))
        self.verdict_bias = nn.Parameter(torch.empty(levels))
        self.start_over()

    def start_over(self) -> None:
        """Sets the parameters to their first values."""
        start_linear(self.vote_weight, self.vote_bias)
        start_linear(self.verdict_weight, self.verdict_bias)
        self.begin()

    def forward(self, state: Tensor, question: Tensor) -> Tensor:
        """The logits [B, M] of rows whose question tokens `question` [B, T] names.

        Shape of state: [B, T, D]. For training; a running model asks `votes` and `verdict`.
        """
        counts = question.sum(1, keepdim=True).clamp(min=1)
        return self.verdict((self.votes(state) * question[..., None]).sum(1) / counts)

    def votes(self, state: Tensor) -> Tensor:
        """f(x) of each token. Shape: [B, T, D] -> FloatTensor [B, T, H]."""
        with torch.autocast(state.device.type, enabled=False):
            normed = nn.functional.layer_norm(state.detach().float(), state.shape[-1:])
            weight, bias = self.vote_weight.float(), self.vote_bias.float()
            return nn.functional.relu(nn.functional.linear(normed, weight, bias))

    def verdict(self, means: Tensor) -> Tensor:
        """The logit of each level but the full one. Shape: [..., H] -> FloatTensor [..., M]."""
        with torch.autocast(means.device.type, enabled=False):
            weight, bias = self.verdict_weight.float(), self.verdict_bias.float()
            return nn.functional.linear(means, weight, bias)


class Router(AbstractPolicy):
    """The answer follows the cheapest plan of a menu that is likely to be as good as the full one.

        P_m = sigmoid(W_2 mean_t relu(W_1 norm(x_t)))_m      over the question tokens x_t so far
        plan = the first m of the menu with P_m >= dial, else the full plan

    x_t is what enters layer `after`, so the layers below it run for every token. An answer token
    counts the question tokens before it alone: all tokens of one answer get the same plan, and no
    token waits for a later one. What Glavas et al. (https://arxiv.org/abs/2410.20022) leave to an
    oracle per sequence is predicted here; `trol.training.routing` trains it on the oracle's rows.

    Args:
        menu: plans from the cheapest to the full model's (`all`), which comes last.
        after: k; layers 0 .. k - 1 always run.
        hidden: H, the width of a vote.
        dial: how sure it must be, in [0, 1]: 0 always takes the cheapest plan, 1 the full one.
        scope: `answer`. A plan for the question itself would depend on tokens that come later.

    Raises:
        UsageError: a setting is out of its range, or the menu is no such menu.
    """

    name = "router"
    decides = True
    reads_start = True
    observes = True

    def __init__(
        self,
        menu: Sequence[Plan | str | dict[str, Any]] = (),
        *,
        after: int = 1,
        hidden: int = 64,
        dial: float = 0.5,
        scope: Scope = "answer",
        skipped_kv: Literal["project", "hole"] = "project",
    ) -> None:
        super().__init__(scope=scope, skipped_kv=skipped_kv)
        if scope != "answer":
            raise UsageError(
                f"scope is {scope!r}, but a router reads the question to choose the plan of its "
                "answer, and a question's own tokens cannot wait for its end; set scope='answer'."
            )
        self.menu = () if isinstance(menu, str) else tuple(plan_of(plan) for plan in menu)
        if len(self.menu) < 2:
            raise UsageError(
                f"the menu is {menu!r}; give a list of two plans or more, such as ['0-3', 'all']."
            )
        if after < 0 or hidden < 1:
            raise UsageError(
                f"after is {after} and hidden is {hidden}; give 0 or more and 1 or more."
            )
        check_share("dial", dial, below=1.0 + 1e-9)
        self.after, self.hidden, self.dial = after, hidden, dial

    def check(self, layers: int) -> None:
        if self.after >= layers:
            raise UsageError(
                f"after is {self.after}, but this stack has {layers} layers; give at most "
                f"{layers - 1}."
            )
        visits = [plan.for_layers(layers) for plan in self.menu]
        for plan, counts in zip(self.menu, visits, strict=True):
            if counts[: self.after] != (1,) * self.after:
                raise UsageError(
                    f"plan '{written(plan)}' of the menu does not visit each of the layers 0-"
                    f"{self.after - 1} once, but they run before the router chooses (after="
                    f"{self.after}); let it name them, or lower after."
                )
        costs = [sum(counts) for counts in visits]
        if visits[-1] != (1,) * layers or costs != sorted(costs):
            raise UsageError(
                f"the menu costs {costs} layers, in its order; give its plans from the cheapest "
                "to the full model's, 'all', which comes last."
            )

    def gate(self, layer: int, width: int) -> nn.Module | None:
        return Ballot(width, self.hidden, len(self.menu) - 1) if layer == self.after else None

    def learns(self, layer: int) -> bool:
        return False  # it learns from an oracle's plans

    def bounds(self, layer: int) -> Bounds:
        counts = [visits_of(plan, layer) for plan in self.menu]
        # Layer `after` must be asked about, even where all plans visit it once.
        return Bounds(0 if layer == self.after else min(counts), max(counts))

    def again(self, visit: Visit) -> Answer:
        key, context = (self.name, self.after), visit.context
        if visit.layer == self.after and visit.number == 0:
            tell_untrained(visit, UNTRAINED)
            level = self._level(visit)
            if level is not None:
                context.notes[key] = level
        if context.in_scope is False or visit.layer < self.after:
            return float(visit.number == 0)
        goes = [float(visit.number < visits_of(plan, visit.layer)) for plan in self.menu]
        if len(set(goes)) == 1:
            return goes[0]
        level = context.notes[key].to(visit.state.device)
        return torch.tensor(goes, device=visit.state.device)[level]

    def look_flops(self, visit: Visit) -> int:
        if visit.gate is None or visit.number:
            return 0
        ballot: Any = visit.gate
        voting, judging = ballot.vote_weight.numel(), ballot.verdict_weight.numel()
        in_scope = visit.context.in_scope
        return 2 * (voting * (in_scope is not True) + judging * (in_scope is not False))

    def settings(self) -> dict[str, Any]:
        return {
            "menu": [written(plan) for plan in self.menu],
            "after": self.after,
            "hidden": self.hidden,
            "dial": self.dial,
            "scope": self.scope,
            "skipped_kv": self.skipped_kv,
        }

    def _level(self, visit: Visit) -> Tensor | None:
        """Reads the question tokens; the level of each token [B, T], None where none needs one."""
        ballot: Any = visit.gate
        state, context = visit.state, visit.context
        rows, tokens = state.shape[:2]
        if context.in_scope is True:
            counted = state.new_zeros(rows, tokens, self.hidden + 1, dtype=torch.float32)
        else:
            asks = context.real(state) & ~torch.as_tensor(context.in_scope, device=state.device)
            votes = torch.nn.functional.pad(ballot.votes(state), (0, 1), value=1.0)
            counted = votes * asks[..., None]  # a token's vote, and 1 for the token itself
        kept = visit.keep_with_cache(counted)
        if context.in_scope is False:
            return None
        before = kept[:, : kept.shape[1] - tokens].sum(1, keepdim=True)
        sums = before + counted.cumsum(1)
        return first_sure(ballot.verdict(sums[..., :-1] / sums[..., -1:].clamp(min=1)), self.dial)


def first_sure(logits: Tensor, dial: float) -> Tensor:
    """The first level with sigmoid(logit) >= dial, else the full one: [..., M - 1] -> [...]."""
    sure = logits.sigmoid() >= dial if dial < 1 else torch.zeros_like(logits, dtype=torch.bool)
    full = torch.ones_like(sure[..., :1])
    return torch.cat([sure, full], dim=-1).int().argmax(-1)


def written(plan: Plan) -> Any:
    """A plan as its text, or as JSON where it has none."""
    return plan.to_json() if plan.visits and plan.beyond else str(plan)
