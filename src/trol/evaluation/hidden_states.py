"""Hidden states layer by layer: how near a policy's stay to the full model's.

x_0 is what enters the first layer, x_l what leaves layer l - 1; x_L is read before the final norm.

Layers taken away one by one, each time the one that is missed least: greedy, and lazily so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from trol.depth import Scope, depth
from trol.depth.policy import PolicyLike
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError
from trol.evaluation.metrics import labelled
from trol.evaluation.tasks import Item, batches, tokenizer_of
from trol.host.layers import find_decoder, layer_list

BATCH = 16
"""Answers read at once."""

Batch = Mapping[str, Tensor]


def state_cosines(
    model: Any, processor: Any, items: Sequence[Item], policy: PolicyLike
) -> list[float]:
    """Mean over answer tokens of cos(x_l under the policy, x_l of the full model), l = 1 to L.

    The items' own answers are read, not generated ones, so that both runs see the same tokens.
    https://arxiv.org/abs/2410.20022, experiment 1.

    Raises:
        DataError: the items have no answer tokens.
        UsageError: the policy is unknown or does not fit.
    """

    def cosines(batch: Batch) -> Tensor:
        chosen = scoped(batch, "answer")
        full, kept = (states(model, batch, one, chosen) for one in ("plain", policy))
        return cosine_similarity(full[1:], kept[1:], dim=-1)

    return _means(cosines(batch) for batch in _read(model, processor, items))


def influences(
    model: Any, processor: Any, items: Sequence[Item], scope: Scope = "answer"
) -> list[float]:
    """Block influence of each layer in the full model: 1 - mean over tokens of cos(x_l, x_l+1).

    ShortGPT (https://arxiv.org/abs/2403.03853, section 3.2), over the tokens in `scope`.

    Raises:
        DataError: the items have no tokens in scope.
    """

    def cosines(batch: Batch) -> Tensor:
        full = states(model, batch, "plain", scoped(batch, scope))
        return cosine_similarity(full[:-1], full[1:], dim=-1)

    return [1 - mean for mean in _means(cosines(batch) for batch in _read(model, processor, items))]


@torch.inference_mode()
def states(model: Any, batch: Batch, policy: PolicyLike, chosen: Tensor) -> Tensor:
    """x_0 to x_L of the N tokens in `chosen` [B, T] under `policy`. Shape: [L + 1, N, D], float32.

    After a skipped layer it is what passed by.
    """
    with depth(model, policy), _seen(model, chosen) as seen:
        model(**batch, use_cache=False)
    return torch.stack(seen)


def scoped(batch: Batch, scope: Scope) -> Tensor:
    """Which tokens of a batch are in `scope`, padding never. Shape: [B, T]."""
    answer = batch["labels"] != IGNORED_LABEL
    real = batch["attention_mask"].bool()
    return {"answer": answer, "question": real & ~answer, "all": real}[scope]


def _read(model: Any, processor: Any, items: Sequence[Item]) -> Iterator[Batch]:
    """The items with their answers in batches, `labels` on the answers."""
    for some in batches(items, BATCH):
        yield labelled(model, processor, some, tokenizer_of(processor)).to(model.device)


def _means(found: Iterable[Tensor]) -> list[float]:
    """Means over all tokens of all batches. Shape of each batch: [L, N]."""
    parts = [values.double().cpu() for values in found]
    if not sum(part.shape[1] for part in parts):
        raise DataError("the questions have no tokens to measure; give some, with answers.")
    return torch.cat(parts, dim=1).mean(1).tolist()


@contextmanager
def _seen(model: Any, chosen: Tensor) -> Generator[list[Tensor]]:
    """What enters the first layer and leaves each, as the layers run."""
    layers = layer_list(find_decoder(model))
    assert layers is not None  # or find_decoder had raised
    seen: list[Tensor] = []
    hooks = [layers[0].register_forward_pre_hook(partial(_enters, seen, chosen), with_kwargs=True)]
    hooks += [layer.register_forward_hook(partial(_leaves, seen, chosen)) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _enters(
    seen: list[Tensor], chosen: Tensor, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    seen.append((args[0] if args else kwargs["hidden_states"])[chosen].float())


def _leaves(seen: list[Tensor], chosen: Tensor, _: Any, __: Any, out: Any) -> None:
    seen.append((out[0] if isinstance(out, tuple) else out)[chosen].float())


PROMISING = 8
"""Candidates that are measured again after the first round: those that cost least beside the best
of the round in which they were measured last."""


def removed(
    stays: Sequence[int], count: int, cost: Callable[[tuple[int, ...]], float]
) -> Iterator[int]:
    """The first `count` layers that go, in their order, each as soon as it is known.

    Every candidate is measured in the first round, the `PROMISING` of the last round in all others.
    Of equal costs the earliest layer goes.

    Args:
        stays: the layers that there are.
        count: how many go, fewer than there are.
        cost: what it costs when these layers alone stay; lower is better, and never NaN.
    """
    left = list(stays)
    beside: dict[int, float] = {}  # what each cost above the best of its last round
    for _ in range(count):
        tried = sorted(left, key=lambda layer: (beside.get(layer, 0.0), layer))
        costs = {
            layer: cost(tuple(one for one in left if one != layer))
            for layer in (sorted(tried[:PROMISING]) if beside else left)
        }
        gone = min(costs, key=lambda layer: (costs[layer], layer))
        best = costs[gone]
        beside |= {k: c if math.isinf(c) else c - best for k, c in costs.items()}
        left.remove(gone)
        yield gone


def measurements(layers: int, count: int) -> int:
    """How often `removed` asks for a cost where `count` of so many layers go."""
    later = (min(PROMISING, layers - gone) for gone in range(1, count))
    return layers + sum(later) if count else 0
