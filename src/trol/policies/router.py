"""A router per sequence: the prompt's hidden states choose one plan for the whole answer."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trol.depth import Answer, Bounds, Plan, Scope, Visit
from trol.depth.policy import check_share, check_whole
from trol.errors import UsageError
from trol.policies.base import (
    DataclassPolicy,
    PolicyModule,
    SkippedKV,
    init_linear,
    linear,
    warn_if_untrained,
)
from trol.policies.planned import plan_of, visits_of

UNTRAINED = "Router's parameters were never trained: it chooses plans at random."


class RouterHead(PolicyModule):
    """A two-layer network whose hidden layer is averaged over tokens; all in float32.

        f(x) = relu(W_1 norm(x))        P(level m suffices) = sigmoid(W_2 mean_t f(x_t))_m

    norm takes mean and scale off, without parameters. W_1 is `vote_weight` and W_2
    `verdict_weight`, names under which adapters are saved. They are parameters and not `nn.Linear`,
    so that whatever looks for a host's linear maps does not take them for the host's.
    """

    def __init__(self, width: int, hidden: int, levels: int) -> None:
        super().__init__()
        self.vote_weight = nn.Parameter(torch.empty(hidden, width))
        self.vote_bias = nn.Parameter(torch.empty(hidden))
        self.verdict_weight = nn.Parameter(torch.empty(levels, hidden))
        self.verdict_bias = nn.Parameter(torch.empty(levels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.vote_weight, self.vote_bias)
        init_linear(self.verdict_weight, self.verdict_bias)
        self.mark_untrained()

    def forward(self, state: Tensor, question: Tensor) -> Tensor:
        """The logits [B, M] of rows whose question tokens `question` [B, T] names.

        Shape of state: [B, T, D]. For training; a running model calls `features` and `logits`.
        """
        counts = question.sum(1, keepdim=True).clamp(min=1)
        return self.logits((self.features(state) * question[..., None]).sum(1) / counts)

    def features(self, state: Tensor) -> Tensor:
        """f(x) of each token. Shape: [B, T, D] -> FloatTensor [B, T, H]."""
        normed = nn.functional.layer_norm(state.detach().float(), state.shape[-1:])
        return nn.functional.relu(linear(normed, self.vote_weight, self.vote_bias))

    def logits(self, means: Tensor) -> Tensor:
        """The logit of each level but the full one. Shape: [..., H] -> FloatTensor [..., M]."""
        return linear(means, self.verdict_weight, self.verdict_bias)


@dataclass(eq=False, repr=False)
class Router(DataclassPolicy):
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
        hidden: H, the width of the hidden layer.
        dial: the threshold on P_m, in [0, 1]: 0 always takes the cheapest plan, 1 the full one.
        scope: `answer`. A plan for the question itself would depend on tokens that come later.
        keep_first: tokens at the head of each sequence that visit every layer once.

    Raises:
        UsageError: a setting is out of its range, or the menu is not such a list.
    """

    name = "router"
    decides = True
    reads_start = True
    observes = True

    menu: Sequence[Plan | str | dict[str, Any]] = ()
    _: KW_ONLY
    after: int = 1
    hidden: int = 64
    dial: float = 0.5
    scope: Scope = "answer"
    skipped_kv: SkippedKV = "project"
    keep_first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "answer":
            raise UsageError(
                f"scope is {self.scope!r}, but a router reads the question to choose the plan of "
                "its answer, and a question's own tokens cannot wait for its end; set "
                "scope='answer'."
            )
        self.plans = () if isinstance(self.menu, str) else tuple(plan_of(p) for p in self.menu)
        if len(self.plans) < 2:
            raise UsageError(
                f"the menu is {self.menu!r}; give a list of two plans or more, such as "
                "['0-3', 'all']."
            )
        check_whole("after", self.after)
        check_whole("hidden", self.hidden, 1)
        check_share("dial", self.dial, below=1.0 + 1e-9)
        self.menu = self.plans

    def check(self, layers: int) -> None:
        if self.after >= layers:
            raise UsageError(
                f"after is {self.after}, but this stack has {layers} layers; give at most "
                f"{layers - 1}."
            )
        visits = [plan.for_layers(layers) for plan in self.plans]
        for plan, counts in zip(self.plans, visits, strict=True):
            if counts[: self.after] != (1,) * self.after:
                raise UsageError(
                    f"plan '{plan_text(plan)}' of the menu does not visit each of the layers 0-"
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
        return RouterHead(width, self.hidden, len(self.plans) - 1) if layer == self.after else None

    def learns(self, layer: int) -> bool:
        return False  # it learns from an oracle's plans

    def bounds(self, layer: int) -> Bounds:
        counts = [visits_of(plan, layer) for plan in self.plans]
        # Layer `after` must be asked about, even where all plans visit it once.
        return Bounds(0 if layer == self.after else min(counts), max(counts))

    def again(self, visit: Visit) -> Answer:
        key, context = (self.name, self.after), visit.context
        if visit.layer == self.after and visit.number == 0:
            warn_if_untrained(visit, UNTRAINED)
            level = self._level(visit)
            if level is not None:
                context.notes[key] = level
        if context.in_scope is False or visit.layer < self.after:
            return float(visit.number == 0)
        goes = [float(visit.number < visits_of(plan, visit.layer)) for plan in self.plans]
        if len(set(goes)) == 1:
            return goes[0]
        level = context.notes[key].to(visit.state.device)
        return torch.tensor(goes, device=visit.state.device)[level]

    def look_flops(self, visit: Visit) -> int:
        if visit.gate is None or visit.number:
            return 0
        head: Any = visit.gate
        hidden, output = head.vote_weight.numel(), head.verdict_weight.numel()
        in_scope = visit.context.in_scope
        return 2 * (hidden * (in_scope is not True) + output * (in_scope is not False))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"menu": [plan_text(plan) for plan in self.plans]}

    def _level(self, visit: Visit) -> Tensor | None:
        """Reads the question tokens; the level of each token [B, T], None where none needs one."""
        head: Any = visit.gate
        state, context = visit.state, visit.context
        rows, tokens = state.shape[:2]
        if context.in_scope is True:
            counted = state.new_zeros(rows, tokens, self.hidden + 1, dtype=torch.float32)
        else:
            question = context.real(state) & ~torch.as_tensor(context.in_scope, device=state.device)
            features = torch.nn.functional.pad(head.features(state), (0, 1), value=1.0)
            counted = features * question[..., None]  # features, and 1 for the token itself
        kept = visit.keep_with_cache(counted)
        if context.in_scope is False:
            return None
        before = kept[:, : kept.shape[1] - tokens].sum(1, keepdim=True)
        sums = before + counted.cumsum(1)
        return first_sure(head.logits(sums[..., :-1] / sums[..., -1:].clamp(min=1)), self.dial)


def first_sure(logits: Tensor, threshold: float) -> Tensor:
    """The first level with sigmoid(logit) >= threshold, else the full one: [..., M - 1] -> [...].

    A threshold of 1 takes the full level even where a sigmoid rounds to 1.
    """
    never = torch.zeros_like(logits, dtype=torch.bool)
    sure = logits.sigmoid() >= threshold if threshold < 1 else never
    full = torch.ones_like(sure[..., :1])
    return torch.cat([sure, full], dim=-1).int().argmax(-1)


def plan_text(plan: Plan) -> Any:
    """A plan as its text, or as JSON where it has none."""
    return plan.to_json() if plan.visits and plan.beyond else str(plan)
