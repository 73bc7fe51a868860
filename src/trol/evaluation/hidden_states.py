"""Hidden states layer by layer, and what early exits read from them.

x_0 enters the first layer, x_l leaves layer l - 1; x_L is read before the final norm.

An exit's unit is the *answer*, because its tokens depend on one another. Its quality is the share
of its tokens whose exit predicts what the full model predicts; its last token predicts nothing.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from trol.depth import Scope, attached, depth, trace
from trol.depth.attachment import gates_of
from trol.depth.policy import PolicyLike
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError
from trol.evaluation.answers import unread_states
from trol.evaluation.items import Item, batches, labelled
from trol.host.layers import find_decoder, layer_list
from trol.policies.exits import MEASURES, EarlyExit

BATCH = 16
"""Answers read at once."""

Batch = Mapping[str, Tensor]


def layers_of(model: Any) -> int:
    """Layers of the decoder inside `model`."""
    return len(_layers(model))


def _layers(model: Any) -> nn.ModuleList:
    layers = layer_list(find_decoder(model))
    assert layers is not None  # or find_decoder had raised
    return layers


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
        full, other = (states(model, batch, one, chosen) for one in ("plain", policy))
        return cosine_similarity(full[1:], other[1:], dim=-1)

    return _all(cosines(batch) for batch in _read(model, processor, items)).mean(1).tolist()


def influences(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    scope: Scope = "answer",
    *,
    keep_first: int = 0,
) -> list[dict[str, float]]:
    """Block influence of each layer in the full model, 1 - cos(x_l, x_l+1): `mean` and `worst`.

    ShortGPT's (https://arxiv.org/abs/2403.03853, section 3.2) is the mean over the tokens in
    `scope`, here without the first `keep_first` of each row. The worst token shows what the mean
    hides: a layer that matters at one token alone, such as the one that builds an attention sink.

    Raises:
        DataError: the items have no tokens in scope.
    """

    def cosines(batch: Batch) -> Tensor:
        places = batch["attention_mask"].long().cumsum(-1) - 1
        chosen = scoped(batch, scope) & (places >= keep_first)
        full = states(model, batch, "plain", chosen)
        return cosine_similarity(full[:-1], full[1:], dim=-1)

    each = 1 - _all(cosines(batch) for batch in _read(model, processor, items))
    both = zip(each.mean(1).tolist(), each.amax(1).tolist(), strict=True)
    return [{"mean": mean, "worst": worst} for mean, worst in both]


@torch.inference_mode()
def states(model: Any, batch: Batch, policy: PolicyLike, chosen: Tensor) -> Tensor:
    """x_0 to x_L of the N tokens in `chosen` [B, T] under `policy`. Shape: [L + 1, N, D], float32.

    A skipped layer leaves its input as it is.
    """
    with depth(model, policy), _recorded(model, chosen) as seen:
        unread_states(model, batch)
    return torch.stack(seen)


def scoped(batch: Batch, scope: Scope) -> Tensor:
    """Which tokens of a batch are in `scope`; padding never is. Shape: [B, T]."""
    answer = batch["labels"] != IGNORED_LABEL
    real = batch["attention_mask"].bool()
    return {"answer": answer, "question": real & ~answer, "all": real}[scope]


def _read(model: Any, processor: Any, items: Sequence[Item]) -> Iterator[Batch]:
    """The items with their answers in batches, `labels` on the answers."""
    for some in batches(items, BATCH):
        yield labelled(model, processor, some)


def _all(batches_of: Iterable[Tensor]) -> Tensor:
    """The values of all tokens of all batches. Shape: [L, N] each -> [L, N]."""
    parts = [values.double().cpu() for values in batches_of]
    if not sum(part.shape[1] for part in parts):
        raise DataError("the questions have no tokens to measure; give some, with answers.")
    return torch.cat(parts, dim=1)


@contextmanager
def _recorded(model: Any, chosen: Tensor) -> Generator[list[Tensor]]:
    """Records the states that enter the first layer and leave each layer, as the layers run."""
    layers = _layers(model)
    seen: list[Tensor] = []

    def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[chosen].float())

    def leaves(_: Any, __: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out)[chosen].float())

    hooks = [layers[0].register_forward_pre_hook(enters, with_kwargs=True)]
    hooks += [layer.register_forward_hook(leaves) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def entering(model: Any) -> Generator[list[Tensor]]:
    """Records what enters each layer of one pass, as the layers run. Shape of each: [B, T, D]."""
    seen: list[Tensor] = []

    def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(enters, with_kwargs=True) for layer in _layers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class ExitRecord:
    """The full model's predictions at every look, for N tokens in S answers."""

    confidence: Tensor
    """Shape: [E, N]."""
    agrees: Tensor
    """Whether the prediction is that of the last layer. Shape: [E, N]."""
    words: Tensor
    """What the last layer predicts. Shape: [N]."""
    answer: Tensor
    """Which answer a token belongs to, counted from 0. Shape: [N]."""
    layers: Tensor
    """The layer before which each look is taken, and L for tokens that never leave: [E + 1]."""

    def outcome(self, threshold: float) -> "ExitOutcome":
        """The predicted outcome of leaving at this threshold."""
        always = torch.ones_like(self.agrees[:1])
        look = torch.cat([self.confidence >= threshold, always]).int().argmax(0)  # the first
        kept = torch.cat([self.agrees, always]).gather(0, look[None])[0]
        executed = self.layers[look] / self.layers[-1]
        return ExitOutcome(_by_answer(kept, self.answer), _by_answer(executed, self.answer))


@dataclass(frozen=True)
class ExitOutcome:
    """Quality and executed share of the layers, answer by answer. Shapes: [S]."""

    qualities: Tensor
    shares: Tensor

    @property
    def quality(self) -> float:
        """Mean share of an answer's tokens on which exit and full model agree."""
        return self.qualities.mean().item()

    @property
    def executed(self) -> float:
        """Mean share of the layers that an answer's tokens go through."""
        return self.shares.mean().item()

    def json(self) -> dict[str, float]:
        """As a JSON object."""
        return {"quality": self.quality, "executed": self.executed}


@torch.inference_mode()
def record_exits(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policy: EarlyExit,
    after_batch: Callable[[], None] = lambda: None,
) -> ExitRecord:
    """The predictions at every look of `policy` while all tokens go through all layers.

    Args:
        model: a model; exit heads are those of the policy attached to it.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions with answers.
        policy: whose measure, first, every and heads are taken.
        after_batch: called after each pass over a batch.

    Raises:
        DataError: no answer has a token that another follows.
    """
    count = layers_of(model)
    looks = [layer for layer in range(count) if policy.looks(layer)]
    read, parts, sizes = Readout(model), [], []
    heads = gates_of(attached(model)[1]) if policy.heads else [None] * count
    for batch, chosen in predicting_tokens(model, processor, items):
        seen = states(model, batch, "plain", chosen).to(read.head.weight.dtype)  # type: ignore[arg-type]
        for some in seen.split(read.at_once, dim=1):
            last, earlier, rows = read(some[-1]).argmax(-1), None, []
            for layer in looks:
                head = heads[layer]
                logits = read(some[layer] if head is None else head(some[layer]))
                sure, earlier = MEASURES[policy.measure](logits, earlier)
                rows.append(torch.stack([sure.float(), (logits.argmax(-1) == last).float()]))
            parts.append((torch.stack(rows, dim=1).cpu(), last.cpu()))
        sizes.append(chosen.sum(1).cpu())
        after_batch()
    size = torch.cat(sizes)
    if not size.any():
        raise DataError(
            "no answer has a token that another follows, so nothing is predicted after an exit; "
            "give questions with longer answers."
        )
    confidence, agrees = torch.cat([part for part, _ in parts], dim=-1)
    words = torch.cat([last for _, last in parts])
    answer = torch.arange(len(size)).repeat_interleave(size)
    return ExitRecord(confidence, agrees.bool(), words, answer, torch.tensor([*looks, count]))


@torch.inference_mode()
def run_exits(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policy: EarlyExit,
    after_batch: Callable[[], None] = lambda: None,
    *,
    words: Tensor | None = None,
) -> ExitOutcome:
    """The outcome where tokens really leave; arguments as `record_exits` takes them.

    `words` are a record's, where there is one: what the full model predicts. Shape: [N].
    """
    full, left, shares, sizes = [], [], [], []
    for batch, chosen in predicting_tokens(model, processor, items):
        if words is None:
            with depth(model, "plain"):
                full.append(_words(model, batch, chosen))
        with depth(model, policy), trace(model) as seen:
            left.append(_words(model, batch, chosen))
        shares.append(seen.visits[:, chosen.cpu()].double().mean(0))
        sizes.append(chosen.sum(1).cpu())
        after_batch()
    size = torch.cat(sizes)
    answer = torch.arange(len(size)).repeat_interleave(size)
    agrees = torch.cat(left) == (torch.cat(full) if words is None else words)
    return ExitOutcome(_by_answer(agrees, answer), _by_answer(torch.cat(shares), answer))


def _words(model: Any, batch: Batch, chosen: Tensor) -> Tensor:
    """The most probable next word of the chosen tokens, on the CPU. Shape: [B, T] -> [N]."""
    read, unread = Readout(model), unread_states(model, batch)
    pieces = unread[chosen.to(unread.device)].split(read.at_once)
    return torch.cat([read.behind_norm(some).argmax(-1).cpu() for some in pieces])


def predicting_tokens(
    model: Any, processor: Any, items: Sequence[Item]
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches, and which of their tokens are answer and have an answer token next: [B, T]."""
    for batch in _read(model, processor, items):
        answer = scoped(batch, "answer")
        chosen = torch.zeros_like(answer)
        chosen[:, :-1] = answer[:, :-1] & answer[:, 1:]
        yield batch, chosen


def _by_answer(values: Tensor, answer: Tensor) -> Tensor:
    """Means over the tokens of each answer that has any. Shape: [N], [N] -> [S]."""
    sizes = answer.bincount()
    sums = torch.zeros(len(sizes), dtype=torch.double).index_add(0, answer, values.double())
    return (sums / sizes)[sizes > 0]
