"""What the gates of a mixer said under full traversal, and what leaving out small ones would cost.

    again_l = (N - 1) T (share_l visit_l + (1 - share_l) keys_l)      0 where nobody goes again
    cost = (sum_l visit_l T + again_l) / sum_l visit_l T

share_l is the part of the tokens in scope whose gate on layer l is above its tau; the others leave
keys and values. So 1 is the plain model's cost, and full traversal with N passes costs about N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trol.depth import attached, depth, trace
from trol.depth.cost import StackCost
from trol.depth.host import cost_of
from trol.errors import HostError
from trol.evaluation.tasks import Item, answers, batches
from trol.policies.mixer import TrolMixer

Taus = tuple[float | None, ...]
"""A threshold for each layer; None where nobody goes again."""

KEYS_SHARE = 1 / 6
"""What leaving keys and values is taken to cost, as a share of a visit, where FLOPs are not
known: four square matrices read the state in attention, two or three of four times their size
after it, and keys and values are two of the first."""


@dataclass(frozen=True)
class GateRecord:
    """The gates of M tokens in scope on L layers."""

    least: Tensor
    """The smallest gate up to each second or later visit: a token makes the visit if it is above
    tau. Shape: [L, N - 1, M]."""
    answers: tuple[str, ...]
    """What was answered under full traversal."""
    visit: tuple[float, ...]
    """Cost of a visit of layer l, for one token."""
    keys: tuple[float, ...]
    """Cost of leaving keys and values on layer l, for one token."""
    flops: bool
    """Whether these are FLOPs; otherwise they are shares of a visit."""

    def shares(self, taus: Taus) -> list[float]:
        """Of the second and later visits of each layer, the share that is made: [L]."""
        return [
            0.0 if tau is None else 1.0 if tau == 0 else (gates > tau).float().mean().item()
            for tau, gates in zip(taus, self.least, strict=True)
        ]

    def again(self, taus: Taus) -> list[float]:
        """What second and later visits of each layer cost, per token: [L]."""
        later = self.least.shape[1]
        each = zip(taus, self.shares(taus), self.visit, self.keys, strict=True)
        return [
            0.0 if tau is None else later * (share * visit + (1 - share) * keys)
            for tau, share, visit, keys in each
        ]

    def cost(self, taus: Taus) -> float:
        """The cost under these thresholds, of the plain model's."""
        return 1 + sum(self.again(taus)) / sum(self.visit)


def at(mixer: TrolMixer, taus: Taus) -> TrolMixer:
    """The same mixer at other thresholds."""
    tau = 0.0 if all(one == 0 for one in taus) else list(taus)
    return TrolMixer(**{**mixer.settings(), "tau": tau})


def gates_recorded(
    model: Any, processor: Any, items: Sequence[Item], mixer: TrolMixer, *, new_tokens: int
) -> GateRecord:
    """Answers the questions under full traversal, and keeps the gates of the tokens in scope.

    Raises:
        HostError: no token is in scope.
    """
    given: list[str] = []
    parts: list[Tensor] = []
    lengths = []
    with depth(model, at(mixer, (0.0,))):
        for some in batches(items):
            with trace(model) as seen:
                given += answers(model, processor, some, new_tokens=new_tokens)
            parts.append(_least(seen.weights, _in_scope(seen), mixer.passes))
            lengths.append(seen.real.sum().item() / len(some))
    least = torch.cat(parts, dim=-1)
    if not least.shape[-1]:
        raise HostError(
            f"no token of these questions is in the scope {mixer.scope!r}, so no gate is asked."
        )
    tokens = round(sum(lengths) / len(lengths))
    visit, keys, known = _unit_costs(cost_of(model), tokens)
    return GateRecord(least, tuple(given), visit, keys, known)


def visits_made(
    model: Any, processor: Any, items: Sequence[Item], mixer: TrolMixer, *, new_tokens: int
) -> Tensor:
    """How many second and later visits each layer makes in answering these. Shape: [L]."""
    layers = attached(model)[1].depth_layers
    made = torch.zeros(layers, dtype=torch.long)
    with depth(model, mixer):
        for some in batches(items):
            with trace(model) as seen:
                answers(model, processor, some, new_tokens=new_tokens)
            made += ((seen.visits - 1).clamp(min=0) * seen.real).sum((1, 2))
    return made


def _in_scope(seen: Any) -> Tensor:
    """Which tokens could go again: those that did, at tau = 0. Shape: [B, T]."""
    return (seen.visits > 1).any(0) & seen.real


def _least(weights: Tensor, chosen: Tensor, passes: int) -> Tensor:
    """min_{j <= r} g(x_j), from w_r = (1 - g(x_r)) prod_{j < r} g(x_j). Shape: [L, N - 1, M]."""
    alive = torch.ones_like(weights[:, 0][:, chosen])
    least, found = alive, []
    for visit in range(1, passes):
        gate = 1 - weights[:, visit][:, chosen] / alive.clamp(min=1e-12)
        least = torch.minimum(least, gate)
        found.append(least)
        alive = alive * gate
    return torch.stack(found, dim=1)


def _unit_costs(stack: StackCost, tokens: int) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Cost of a visit and of keys and values for each layer; and whether these are FLOPs."""
    visit, keys = [], []
    for layer, gate in zip(stack.layers, stack.gate_per_token, strict=True):
        if layer is None or layer.keys_per_token is None:
            count = len(stack.layers)
            return (1.0,) * count, (KEYS_SHARE,) * count, False
        one = layer.flops(tokens, step=tokens) / tokens
        visit.append(float(one))
        keys.append(float(layer.keys_per_token + gate))
    return tuple(visit), tuple(keys), True
