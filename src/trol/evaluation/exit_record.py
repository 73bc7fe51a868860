"""What early exits would do: one pass of the full model, and what running them really does.

An *answer* is the unit: its tokens depend on one another. Its quality is the share of its tokens
whose exit predicts what the full model predicts; its last token predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trol.data.chat import IGNORED
from trol.depth import attached, depth, trace
from trol.depth.host import gates_of
from trol.depth.readout import Readout
from trol.errors import DataError
from trol.evaluation.hidden_states import Batch, states
from trol.evaluation.metrics import labelled
from trol.evaluation.tasks import Item, batches, fitted, prompts, tokenizer_of
from trol.evaluation.timing import time_generate
from trol.host.layers import find_decoder, layer_list
from trol.policies.confidence import MEASURES
from trol.policies.exits import EarlyExit

BATCH = 16
"""Answers read at once."""

ALONE, TOKENS = 5, 16
"""Questions that are answered one at a time to count FLOPs, and the tokens of such an answer."""


@dataclass(frozen=True)
class Record:
    """What the full model would have said at every look of N tokens in S answers."""

    confidence: Tensor
    """Shape: [E, N]."""
    agrees: Tensor
    """Whether the prediction is that of the last layer. Shape: [E, N]."""
    answer: Tensor
    """Which answer a token belongs to, counted from 0. Shape: [N]."""
    layers: Tensor
    """The layer before which each look is taken, and L for tokens that never leave: [E + 1]."""

    def outcome(self, threshold: float) -> Outcome:
        """What leaving at this threshold would give."""
        sure = torch.cat([self.confidence >= threshold, torch.ones_like(self.agrees[:1])])
        look = sure.int().argmax(0)  # the first
        agrees = torch.cat([self.agrees, torch.ones_like(self.agrees[:1])])
        kept = agrees.gather(0, look[None])[0]
        executed = self.layers[look] / self.layers[-1]
        return Outcome(_by_answer(kept, self.answer), _by_answer(executed, self.answer))


@dataclass(frozen=True)
class Outcome:
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
def recorded(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policy: EarlyExit,
    passed: Callable[[], None] = lambda: None,
) -> Record:
    """What every look of `policy` sees where all tokens go through all layers.

    Args:
        model: a model; exit heads are those of the policy attached to it.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions with answers.
        policy: whose measure, first, every and heads are taken.
        passed: called after each pass over a batch.

    Raises:
        DataError: no answer has a token that another follows.
    """
    count = len(layer_list(find_decoder(model)) or ())
    looks = [layer for layer in range(count) if policy.looks(layer)]
    read, parts = Readout(model), []
    heads = gates_of(attached(model)[1]) if policy.heads else [None] * count
    for batch, chosen in counted(model, processor, items):
        seen = states(model, batch, "plain", chosen).to(read.head.weight.dtype)  # type: ignore[arg-type]
        last, kept, found = read(seen[-1]).argmax(-1), None, []
        for layer in looks:
            head = heads[layer]
            logits = read(seen[layer] if head is None else head(seen[layer]))
            sure, kept = MEASURES[policy.measure](logits, kept)
            found.append(torch.stack([sure.float(), (logits.argmax(-1) == last).float()]))
        parts.append((torch.stack(found, dim=1).cpu(), chosen.sum(1).cpu()))
        passed()
    sizes = torch.cat([size for _, size in parts])
    if not sizes.any():
        raise DataError(
            "no answer has a token that another follows, so nothing is predicted after an exit; "
            "give questions with longer answers."
        )
    confidence, agrees = torch.cat([part for part, _ in parts], dim=-1)
    answer = torch.arange(len(sizes)).repeat_interleave(sizes)
    return Record(confidence, agrees.bool(), answer, torch.tensor([*looks, count]))


@torch.inference_mode()
def run(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policy: EarlyExit,
    passed: Callable[[], None] = lambda: None,
) -> Outcome:
    """What happens where tokens really leave; arguments as `recorded` takes them."""
    agrees, shares, sizes = [], [], []
    for batch, chosen in counted(model, processor, items):
        with depth(model, "plain"):
            full = model(**batch, use_cache=False).logits[chosen].argmax(-1)
        with depth(model, policy), trace(model) as seen:
            said = model(**batch, use_cache=False).logits[chosen].argmax(-1)
        agrees.append((said == full).cpu())
        shares.append(seen.visits[:, chosen.cpu()].double().mean(0))
        sizes.append(chosen.sum(1).cpu())
        passed()
    size = torch.cat(sizes)
    answer = torch.arange(len(size)).repeat_interleave(size)
    return Outcome(_by_answer(torch.cat(agrees), answer), _by_answer(torch.cat(shares), answer))


@torch.inference_mode()
def flops_share(
    model: Any, processor: Any, items: Sequence[Item], policy: EarlyExit
) -> float | None:
    """FLOPs of an answer's token where tokens leave, as a share of the full model's.

    Traced while the first items are answered one at a time, since in a batch or in reading a whole
    answer nobody's leaving saves anything. Looks count, and keys and values of skipped layers.
    None where the layers' FLOPs are not known.
    """
    sums: list[int] = []
    some = [fitted(model, processor, item, TOKENS) for item in items[:ALONE]]
    for followed in (policy, "plain"):
        steps: list[int | None] = []
        for item in some:
            inputs = prompts(processor, [item]).to(model.device)
            with depth(model, followed), trace(model) as seen:
                time_generate(model, inputs, TOKENS)
            steps += seen.flops[1:]  # the first pass is the question's
        known = [step for step in steps if step is not None]
        if len(known) < len(steps):
            return None
        sums.append(sum(known))
    return sums[0] / sums[1]


def counted(model: Any, processor: Any, items: Sequence[Item]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches, and which of their tokens are answer and have an answer token next: [B, T]."""
    for some in batches(items, BATCH):
        batch = labelled(model, processor, some, tokenizer_of(processor)).to(model.device)
        answer = batch["labels"] != IGNORED
        chosen = torch.zeros_like(answer)
        chosen[:, :-1] = answer[:, :-1] & answer[:, 1:]
        yield batch, chosen


def _by_answer(values: Tensor, answer: Tensor) -> Tensor:
    """Means over the tokens of each answer that has any. Shape: [N], [N] -> [S]."""
    sizes = answer.bincount()
    sums = torch.zeros(len(sizes), dtype=torch.double).index_add(0, answer, values.double())
    return (sums / sizes)[sizes > 0]
