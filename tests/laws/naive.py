"""The visit loop of ARCHITECTURE in plainest form: one token, one visit, one call at a time.

No cache, no batch, no masks of scope: for every token and every visit the keys and values that it
may see are looked up in a table, position by position, and the bare layer is called on that one
token. Slow, and independent of everything in `trol.depth` but the policies' settings.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosts.host import Inputs
from trol.depth import AbstractPolicy, Plan
from trol.depth.readout import Readout
from trol.host.names import CACHE
from trol.policies.controller import Controller
from trol.policies.exits import EarlyExit
from trol.policies.mixer import TrolMixer
from trol.policies.planned import Planned
from trol.policies.random_tokens import RandomTokens
from trol.policies.router import Router

KeysValues = tuple[Tensor, Tensor]
"""Of one token. Shape: [1, H, 1, d] each."""


class Shelf:
    """What a layer takes for its cache: shows it the keys and values chosen for one token."""

    def __init__(self, shown: Sequence[KeysValues]) -> None:
        self.shown = shown
        self.fresh: KeysValues | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.fresh = keys, values
        return tuple(torch.cat(part, -2) for part in zip(*self.shown, self.fresh, strict=True))


class NaiveExits:
    """Who has left the stack in one row, and what was said of the tokens so far."""

    def __init__(self, policy: EarlyExit, read: Readout) -> None:
        self.policy, self.read = policy, read
        self.left: set[int] = set()
        self.said: dict[int, tuple[Tensor, int]] = {}

    def entering(
        self, layer: int, token: int, x: Tensor, head: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """What token `token` is when it enters a layer, or passes it by. Shape: [1, 1, D]."""
        policy = self.policy
        looks = range(policy.first, layer + 1, policy.every)
        if token in self.left or layer not in looks:
            return x
        own = x if head is None else x + x @ head[0].T + head[1]
        shares = self.read(own).flatten().softmax(0)
        number = len(looks) - 1 if len(policy.thresholds) > 1 else 0
        if self._confidence(token, shares) >= policy.thresholds[number]:
            self.left.add(token)
            return own
        return x

    def _confidence(self, token: int, shares: Tensor) -> float:
        before, unchanged = self.said.get(token, (None, 0))
        agrees = before is not None and before.argmax() == shares.argmax()
        self.said[token] = shares, unchanged + 1 if agrees else 0
        if self.policy.measure == "patience":
            return self.said[token][1]
        if self.policy.measure == "saturation":
            return 0.0 if before is None else torch.minimum(before, shares).sum().item()
        if self.policy.measure == "margin":
            second, best = shares.sort().values[-2:].tolist()
            return best - second
        return 1 + (shares * shares.log()).sum().item() / math.log(len(shares))


class NaiveRouter:
    """The features of one row's question tokens, and the plan of each answer token."""

    def __init__(self, policy: Router, head: Sequence[Tensor]) -> None:
        self.policy, self.head = policy, head
        self.features: list[Tensor] = []
        self.plans: dict[int, Plan] = {}

    def reading(self, token: int, x: Tensor, *, answer: bool) -> None:
        """Reads a question token, or averages those read so far for an answer token."""
        vote_weight, vote_bias, verdict_weight, verdict_bias = self.head
        if not answer:
            normed = (x.flatten() - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
            self.features.append((vote_weight @ normed + vote_bias).relu())
            return
        mean = sum(self.features) / len(self.features)
        shares = torch.sigmoid(verdict_weight @ mean + verdict_bias).tolist()
        suffices = [share >= self.policy.dial for share in (*shares, 1.0)]
        self.plans[token] = self.policy.menu[suffices.index(True)]


class NaiveLayer:
    """A forward hook that puts the naive visit loop in the place of a bare layer's output.

    Args:
        answer: for each token whether the assistant said it. Shape: [T].
        gate: weight [D] and bias [1] of this layer's gate, where the policy has one; of an exit
            head [D, D] and [D].
        exits: who has left, where the policy lets tokens leave; one for all layers.
        router: what was voted for, where the policy chooses plans; one for all layers.
    """

    def __init__(
        self,
        index: int,
        policy: AbstractPolicy,
        answer: Sequence[bool],
        gate: tuple[Tensor, ...] | None,
        exits: NaiveExits | None = None,
        router: NaiveRouter | None = None,
    ) -> None:
        self.index, self.policy, self.answer, self.gate = index, policy, answer, gate
        self.exits, self.router = exits, router

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        given.pop("self")
        states = given.pop("hidden_states")
        planes: list[dict[int, KeysValues]] = []
        outs = []
        for token in range(states.shape[1]):
            planes.append({})
            outs.append(self._token(layer, given, states[:, token : token + 1], planes))
        out = torch.cat(outs, 1)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    def _token(self, layer: nn.Module, given: dict, x: Tensor, planes: list[dict]) -> Tensor:
        """out = sum_r w_r x_r of the last token in `planes`. Shape: [1, 1, D]."""
        token = len(planes) - 1
        role = "answer" if self.answer[token] else "question"
        mine = self.policy.scope in ("all", role) and token >= self.policy.keep_first
        most = max(self._most(), 1) if mine else 1
        if mine and self.exits is not None:
            x = self.exits.entering(self.index, token, x, self.gate)
        if self.router is not None and self.index == self.router.policy.after:
            self.router.reading(token, x, answer=self.answer[token])
        out, alive = torch.zeros_like(x), 1.0
        for visits in range(most + 1):
            again = 0.0 if visits == most else float(visits == 0)
            if mine and visits < most:
                again = self._again(visits, x, token)
            out = out + alive * (1 - again) * x
            alive = alive * again
            if visits == most or (alive == 0 and visits == 0 and self.policy.skipped_kv == "hole"):
                break
            # A token that leaves still gives its keys and values, made from where it stands.
            visited = self._visit(layer, given, x, planes, visits + 1)
            x = visited if alive > 0 else x
        return out

    def _visit(
        self, layer: nn.Module, given: dict, x: Tensor, planes: list[dict], plane: int
    ) -> Tensor:
        """The bare layer on one token, which sees the newest plane <= `plane` of each other."""
        token = len(planes) - 1
        seen = [at for at in range(token) if planes[at]]
        shelf = Shelf([planes[at][max(p for p in planes[at] if p <= plane)] for at in seen])
        here = {
            name: _of_token(name, value, token, [*seen, token]) for name, value in given.items()
        }
        cache = (
            "layer_past"
            if "layer_past" in inspect.signature(type(layer).forward).parameters
            else (CACHE)
        )
        out = type(layer).forward(layer, x, **here | {cache: shelf})
        planes[token][plane] = shelf.fresh
        return out[0] if isinstance(out, tuple) else out

    def _most(self) -> int:
        if isinstance(self.policy, TrolMixer):
            return 1 if self._tau() is None else self.policy.passes
        if isinstance(self.policy, Router):
            return max(self._of_plan(plan) for plan in self.policy.menu)
        if isinstance(self.policy, RandomTokens):
            return self.policy.visit
        return self._of_plan(self.policy.plans[0]) if isinstance(self.policy, Planned) else 1

    def _of_plan(self, plan: Plan) -> int:
        return plan.visits[self.index] if self.index < len(plan.visits) else plan.beyond

    def _again(self, visits: int, x: Tensor, token: int) -> float:
        if self.exits is not None:
            return float(token not in self.exits.left)
        if isinstance(self.policy, (Planned, RandomTokens)):
            return float(visits < self._settled(token))
        if self.router is not None:
            plan = self.router.plans.get(token)
            return float(visits < (1 if plan is None else self._of_plan(plan)))
        if isinstance(self.policy, Controller) and self.gate is not None:
            skip, go = (self.gate[0] @ x.flatten() + self.gate[1]).tolist()
            return float(go >= skip)
        return 1.0 if visits == 0 else self._gated(x)

    def _gated(self, x: Tensor) -> float:
        weight, bias = self.gate
        gate = (0.5 * torch.tanh(x.flatten() @ weight + bias) + 0.5).item()
        tau = self._tau()
        return gate if tau == 0 or gate > tau else 0.0

    def _settled(self, token: int) -> int:
        if isinstance(self.policy, RandomTokens):
            return self.policy.visit - (self._draw(token) >= self.policy.share)
        return self._of_plan(self.policy.plans[0])

    def _draw(self, token: int) -> float:
        """A hash of seed, layer and position, in 24 of its 32 bits."""
        word = 0
        for part in (self.policy.seed + 1, self.index, token):
            word = (word + part) % 2**32
            for _ in range(2):
                word = (word ^ word // 2**16) * 0x45D9F3B % 2**32
            word ^= word // 2**16
        return word // 2**8 / 2**24

    def _tau(self) -> float | None:
        tau = self.policy.tau
        return tau[self.index] if isinstance(tau, tuple) else tau


def _of_token(name: str, value: Any, token: int, columns: list[int]) -> Any:
    """One token's share of a layer's argument."""
    if name == "position_embeddings":
        return tuple(part[..., token : token + 1, :] for part in value)
    if name == "position_ids" and value is not None:
        return value[..., token : token + 1]
    if name == "attention_mask" and value is not None:
        return value[..., token : token + 1, columns]
    if name == "alibi" and value is not None:
        return value[..., columns]
    return value


@contextmanager
def naively(
    layers: nn.ModuleList,
    policy: AbstractPolicy,
    answer: Sequence[bool],
    gates: Sequence[tuple[Tensor, ...] | None],
    read: Readout,
) -> Iterator[None]:
    """Runs bare layers by the naive visit loop for a while."""
    exits = NaiveExits(policy, read) if isinstance(policy, EarlyExit) else None
    router = NaiveRouter(policy, gates[policy.after]) if isinstance(policy, Router) else None
    hooks = [
        layer.register_forward_hook(
            NaiveLayer(i, policy, answer, gate, exits, router), with_kwargs=True
        )
        for i, (layer, gate) in enumerate(zip(layers, gates, strict=True))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def naive_logits(
    bare: PreTrainedModel,
    layers: nn.ModuleList,
    policy: AbstractPolicy,
    inputs: Inputs,
    *,
    answer: Sequence[bool],
    gates: Sequence[tuple[Tensor, ...] | None],
) -> Tensor:
    """The logits of one row. Shape: [1, T, V]."""
    with naively(layers, policy, answer, gates, Readout(bare)):
        return bare(**inputs, use_cache=False).logits
