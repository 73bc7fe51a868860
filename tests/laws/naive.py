"""The idea of DESIGN in the plainest form: one token, one visit, one layer call at a time.

No cache, no batch, no masks of scope: for every token and every visit the keys and values that it
may see are looked up in a table, position by position, and the bare layer is called on that one
token. Slow, and independent of everything in `trol.depth` but the policies' settings.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hosts.host import Inputs
from trol.depth import AbstractPolicy
from trol.policies.mixer import TrolMixer
from trol.policies.plain import Plain
from trol.policies.planned import Planned

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


class NaiveLayer:
    """A forward hook that puts the naive visit loop in the place of a bare layer's output.

    Args:
        answer: for each token whether the assistant said it. Shape: [T].
        gate: weight [D] and bias [1] of this layer's gate, where the policy has one.
    """

    def __init__(
        self,
        index: int,
        policy: AbstractPolicy,
        answer: Sequence[bool],
        gate: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.index, self.policy, self.answer, self.gate = index, policy, answer, gate

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
        mine = self.policy.scope in ("all", "answer" if self.answer[token] else "question")
        most = max(self._most(), 1) if mine else 1
        out, alive = torch.zeros_like(x), 1.0
        for visits in range(most + 1):
            again = 0.0 if visits == most else float(visits == 0)
            if mine and visits < most:
                again = self._again(visits, x)
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
            else ("past_key_values")
        )
        out = type(layer).forward(layer, x, **here | {cache: shelf})
        planes[token][plane] = shelf.fresh
        return out[0] if isinstance(out, tuple) else out

    def _most(self) -> int:
        if isinstance(self.policy, TrolMixer):
            return self.policy.passes
        return 1 if isinstance(self.policy, Plain) else self._plan()

    def _plan(self) -> int:
        assert isinstance(self.policy, Planned)
        plan = self.policy.plans[0]
        return plan.visits[self.index] if self.index < len(plan.visits) else plan.beyond

    def _again(self, visits: int, x: Tensor) -> float:
        if isinstance(self.policy, Planned):
            return float(visits < self._plan())
        if visits == 0:
            return 1.0
        weight, bias = self.gate
        gate = (0.5 * torch.tanh(x.flatten() @ weight + bias) + 0.5).item()
        return gate if gate > self.policy.tau else 0.0


def _of_token(name: str, value: Any, token: int, columns: list[int]) -> Any:
    """One token's share of a layer's argument."""
    if name == "position_embeddings":
        return tuple(part[:, token : token + 1] for part in value)
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
    gates: Sequence[tuple[Tensor, Tensor] | None],
) -> Iterator[None]:
    """Runs bare layers by the naive visit loop for a while."""
    hooks = [
        layer.register_forward_hook(NaiveLayer(i, policy, answer, gate), with_kwargs=True)
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
    gates: Sequence[tuple[Tensor, Tensor] | None],
) -> Tensor:
    """The logits of one row. Shape: [1, T, V]."""
    with naively(layers, policy, answer, gates):
        return bare(**inputs, use_cache=False).logits
