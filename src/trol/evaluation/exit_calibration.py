"""Early exits: the threshold that saves most at a wanted quality, or the reverse.

One pass of the full model over questions with their answers records, at every look, how sure each
token is and whether its prediction is the full model's already. All thresholds are judged from
this record; the chosen one is then run for real, because tokens that left change later ones.

What early exits would do: one pass of the full model, and what running them really does.

An *answer* is the unit: its tokens depend on one another. Its quality is the share of its tokens
whose exit predicts what the full model predicts; its last token predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trol.depth import attached, depth, trace
from trol.depth.attachment import gates_of
from trol.depth.policy import from_settings
from trol.depth.readout import Readout
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError, HostError, UsageError
from trol.evaluation.evidence import Progress, check_count, check_wish, p_value
from trol.evaluation.hidden_states import Batch, states
from trol.evaluation.metrics import labelled
from trol.evaluation.tasks import Item, batches, fitted, prompts, tokenizer_of
from trol.evaluation.timing import time_generate
from trol.host.layers import find_decoder, layer_list
from trol.policies.exits import MEASURES, EarlyExit

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
        answer = batch["labels"] != IGNORED_LABEL
        chosen = torch.zeros_like(answer)
        chosen[:, :-1] = answer[:, :-1] & answer[:, 1:]
        yield batch, chosen


def _by_answer(values: Tensor, answer: Tensor) -> Tensor:
    """Means over the tokens of each answer that has any. Shape: [N], [N] -> [S]."""
    sizes = answer.bincount()
    sums = torch.zeros(len(sizes), dtype=torch.double).index_add(0, answer, values.double())
    return (sums / sizes)[sizes > 0]


THRESHOLDS = tuple(round(1 - 10 ** (step / 20 - 6), 7) for step in range(121))
"""What is tried, from strict to lenient, for measures in [0, 1]: fixed before any data are seen,
and finest near 1, where trained models are."""


@dataclass(frozen=True)
class Calibration:
    """A policy with its threshold, and how it was found."""

    policy: EarlyExit
    predicted: Outcome
    """From the record."""
    ran: Outcome
    """From running the policy."""
    p_value: float | None
    """Of the hypothesis that the quality of what ran is below the wanted; None for a cost."""
    tokens: int
    """Counted, in all answers."""
    flops_share: float | None
    """FLOPs of an answer's token, looks included, as a share of the full model's; None where they
    are not known."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "policy": self.policy.settings(),
            "predicted": self.predicted.json(),
            "ran": self.ran.json(),
            "flops_share": self.flops_share,
            "p_value": self.p_value,
            "answers": len(self.ran.qualities),
            "tokens": self.tokens,
        }


def calibrate(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policy: EarlyExit,
    *,
    quality: float | None = None,
    cost: float | None = None,
    confidence: float = 0.9,
    progress: Progress = lambda done, of: None,
) -> Calibration:
    """The policy with the threshold that goes through fewest layers, or keeps most quality.

    With `quality`, thresholds are tested from strict to lenient until one fails; of those that
    passed, the last is cheapest (fixed-sequence testing, CALM, https://arxiv.org/abs/2207.07061,
    section 3.6). If running it shows less than the record promised, the next stricter one is run.

    Args:
        model: the model; what is attached to it is out of force, but its exit heads are used.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions with answers, of a split that nothing else is measured on.
        policy: measure, first, every and heads; its threshold does not matter.
        quality: wanted mean share of tokens that agree with the full model, in (0, 1).
        cost: in its place, the wanted mean share of layers, in (0, 1].
        confidence: that the quality holds on answers like these, in (0, 1).
        progress: called after each pass over a batch.

    Raises:
        UsageError: a setting is outside its range, or too few items for the wanted confidence.
        DataError: no answer has a token that another follows.
        HostError: no threshold keeps what is wanted.
    """
    check_wishes(quality, cost, confidence, len(items))
    if policy.scope != "answer":
        raise UsageError(
            f"scope is {policy.scope!r}, but answers are what exits are calibrated on; take "
            "scope='answer'."
        )
    given = (model, processor, items)
    passed = _counter(progress, len(items))
    record = recorded(*given, policy, passed)
    order = _thresholds(policy, len(record.layers) - 1)
    outcomes = [record.outcome(threshold) for threshold in order]
    if quality is not None:
        check_count(len(outcomes[0].qualities), quality, confidence)
        place: int | None = _last_passed(outcomes, quality, 1 - confidence)
    else:
        place = _best_within(outcomes, cost or 0.0)
    while place is not None:
        chosen = with_threshold(policy, order[place])
        ran, p = run(*given, chosen, passed), None
        if quality is not None:
            p = p_value(1 - ran.qualities, 1 - quality)
        if ran.executed <= (cost or 1.0) + 1e-9 if p is None else p <= 1 - confidence:
            flops = flops_share(*given, chosen)
            return Calibration(chosen, outcomes[place], ran, p, record.answer.numel(), flops)
        place = _next(outcomes, place, 1 if p is None else -1)
    wish = f"cost of {cost}" if quality is None else f"quality of {quality}"
    raise HostError(
        f"no threshold keeps a {wish} when tokens really leave, since later ones then see other "
        "keys and values; ask for less, or look at later layers (first)."
    )


def with_threshold(policy: EarlyExit, threshold: float) -> EarlyExit:
    """The same exits at another threshold."""
    made = from_settings(
        {"policy": policy.name, **policy.settings(), "threshold": threshold},
    )
    assert isinstance(made, EarlyExit)
    return made


def check_wishes(
    quality: float | None, cost: float | None, confidence: float, answers: int
) -> None:
    """Raises `UsageError` where a wish is out of its range, or more than so many answers show."""
    if (quality is None) == (cost is None):
        raise UsageError("give either a wanted quality or a wanted cost.")
    for name, value in (("quality", quality), ("confidence", confidence)):
        if value is not None:
            check_wish(name, value)
    if cost is not None and not 0 < cost <= 1:
        raise UsageError(f"cost is {cost}, but is a share of the layers, in (0, 1].")
    if quality is not None:
        check_count(answers, quality, confidence)


def _thresholds(policy: EarlyExit, looks: int) -> Sequence[float]:
    return range(looks - 1, 0, -1) if policy.measure == "patience" else THRESHOLDS


def _last_passed(outcomes: Sequence[Outcome], quality: float, limit: float) -> int:
    passed = -1
    for outcome in outcomes:
        if p_value(1 - outcome.qualities, 1 - quality) > limit:
            break
        passed += 1
    if passed < 0:
        raise HostError(
            "even the strictest threshold cannot be shown to keep a quality of "
            f"{quality}; lower it, give more questions, or look at later layers (first)."
        )
    return passed


def _best_within(outcomes: Sequence[Outcome], cost: float) -> int:
    within = [place for place, one in enumerate(outcomes) if one.executed <= cost + 1e-9]
    if not within:
        least = min(one.executed for one in outcomes)
        raise UsageError(
            f"cost is {cost}, but these exits go through {least:.3f} of the layers at least; "
            "allow more, or let tokens leave earlier (first)."
        )
    return max(within, key=lambda place: (outcomes[place].quality, -place))


def _next(outcomes: Sequence[Outcome], place: int, step: int) -> int | None:
    """The next threshold in this direction at which something else would happen."""
    here, place = outcomes[place].executed, place + step
    while 0 <= place < len(outcomes):
        if outcomes[place].executed != here:
            return place
        place += step
    return None


def _counter(progress: Progress, items: int) -> Callable[[], None]:
    """Counts passes over batches; two sweeps are known of, a third comes rarely."""
    made, sweep = [0], -(-items // BATCH)

    def passed() -> None:
        made[0] += 1
        progress(made[0], sweep * max(2, -(-made[0] // sweep)))

    return passed
