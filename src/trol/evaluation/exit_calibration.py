"""Calibration of early exits: the threshold that saves most while the words stay the full model's.

All thresholds are judged from one pass of the full model; the chosen one is then run for real,
because tokens that left change later ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any

import torch

from trol.depth import depth
from trol.depth.policy import SKIPPED_KV, from_settings
from trol.errors import HostError, UsageError
from trol.evaluation.answers import StepsDone
from trol.evaluation.calibration import check_count, check_exit_wishes, counter, p_value
from trol.evaluation.hidden_states import (
    BATCH,
    ExitOutcome,
    ExitRecord,
    layers_of,
    record_exits,
    run_exits,
)
from trol.evaluation.items import Item, fitted_prompts
from trol.evaluation.timing import forced_traces
from trol.policies.base import SkippedKV
from trol.policies.exits import EarlyExit

EXIT_THRESHOLDS = tuple(round(1 - 10 ** (step / 20 - 6), 7) for step in range(121))
"""Candidate thresholds for measures in [0, 1], strict to lenient: fixed before any data are seen,
and finest near 1, where trained models are."""

ALONE, TOKENS = 5, 16
"""Questions that are answered one at a time to count FLOPs, and the tokens of such an answer."""


@dataclass(frozen=True)
class ExitCalibration:
    """Exits with their threshold, and what was measured of it."""

    policy: EarlyExit
    predicted: ExitOutcome
    """Read from the record."""
    ran: ExitOutcome
    """Measured by running the policy."""
    other: ExitOutcome | None
    """Measured with the other `skipped_kv`, at the threshold where both were tried; None where the
    host cannot hide tokens."""
    p_value: float | None
    """For the hypothesis that the quality is below the wanted one; None where a cost is wanted."""
    tokens: int
    """Counted, in all answers."""
    flops_share: float | None = None
    """FLOPs of an answer's token, looks included, as a share of the full model's; None where they
    are not known."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "policy": self.policy.settings(),
            "predicted": self.predicted.json(),
            "ran": self.ran.json(),
            "other_skipped_kv": None if self.other is None else self.other.json(),
            "flops_share": self.flops_share,
            "p_value": self.p_value,
            "answers": len(self.ran.qualities),
            "tokens": self.tokens,
        }


def calibrate_exits(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    policy: EarlyExit,
    *,
    quality: float | None = None,
    cost: float | None = None,
    confidence: float = 0.9,
    progress: StepsDone = lambda done, of: None,
) -> ExitCalibration:
    """The policy with the threshold that goes through fewest layers, or keeps most quality.

    With `quality`, thresholds are tested from strict to lenient until one fails; of those that
    passed, the last is cheapest (fixed-sequence testing, CALM, https://arxiv.org/abs/2207.07061,
    section 3.6). If running it shows less than the record promised, stricter ones are run, halving
    those that are left: the one that is taken was run and keeps what is wanted, and the next more
    lenient one that was run does not.
    What later tokens see of one that left (`skipped_kv`) is tried both ways at the first threshold
    that is run, where the host can hide tokens; the way that keeps more is taken.

    Args:
        model: the model; what is attached to it is out of force, but its exit heads are used.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions with answers, of a split that nothing else is measured on.
        policy: measure, first, every, heads and keep_first; its threshold and skipped_kv do not
            matter.
        quality: wanted mean share of tokens that agree with the full model, in (0, 1).
        cost: in its place, the wanted mean share of layers, in (0, 1].
        confidence: that the quality holds on answers like these, in (0, 1).
        progress: called after each pass over a batch, with the most that there can be
            (`sweeps`); a threshold found early ends it early.

    Raises:
        UsageError: a setting is outside its range, or too few items for the wanted confidence.
        DataError: no answer has a token that another follows.
        HostError: no threshold keeps what is wanted.
    """
    check_exit_wishes(quality, cost, confidence, len(items))
    if policy.scope != "answer":
        raise UsageError(
            f"scope is {policy.scope!r}, but answers are what exits are calibrated on; take "
            "scope='answer'."
        )
    most = sweeps(model, policy)[1] * -(-len(items) // BATCH)
    after_batch = counter(progress, lambda done: most)
    record = record_exits(model, processor, items, policy, after_batch)

    def run(exits: EarlyExit) -> ExitOutcome:
        return run_exits(model, processor, items, exits, after_batch, words=record.words)

    wish = _Wish(quality, cost, confidence)
    chosen = _first_that_keeps(record, policy, _ways(model, policy), wish, run)
    return replace(chosen, flops_share=flops_share(model, processor, items, chosen.policy))


def sweeps(model: Any, policy: EarlyExit) -> tuple[int, int]:
    """How often `calibrate_exits` reads all answers: at least, and at most.

    Once for the record, once for each way of `skipped_kv`, and then once for each time that the
    other thresholds can be halved.
    """
    least = 1 + len(_ways(model, policy))
    return least, least + (len(_order(policy, layers_of(model))) - 1).bit_length()


def _order(policy: EarlyExit, layers: int) -> Sequence[float]:
    """The candidate thresholds, strict to lenient."""
    if policy.measure != "patience":
        return EXIT_THRESHOLDS
    return range(sum(map(policy.looks, range(layers))) - 1, 0, -1)


@dataclass(frozen=True)
class _Wish:
    """What exits are to keep: a quality, shown with a confidence, or a cost."""

    quality: float | None
    cost: float | None
    confidence: float

    def promised(self, outcomes: Sequence[ExitOutcome]) -> int:
        """Of outcomes that the record foretells, the place of the one to run first."""
        if self.quality is None:
            return _best_within(outcomes, self.cost or 0.0)
        check_count(len(outcomes[0].qualities), self.quality, self.confidence)
        return _last_passed(outcomes, self.quality, 1 - self.confidence)

    def p_value(self, ran: ExitOutcome, ways: int) -> float | None:
        """That of the best of so many ways, which may be best by chance (Bonferroni)."""
        if self.quality is None:
            return None
        return min(1.0, ways * p_value(1 - ran.qualities, 1 - self.quality))

    def is_kept(self, ran: ExitOutcome, p: float | None) -> bool:
        """Whether this run shows that it is."""
        return ran.executed <= (self.cost or 1.0) + 1e-9 if p is None else p <= 1 - self.confidence


def _first_that_keeps(
    record: ExitRecord,
    policy: EarlyExit,
    ways: Sequence[SkippedKV],
    wish: _Wish,
    run: Callable[[EarlyExit], ExitOutcome],
) -> ExitCalibration:
    """Runs the threshold that the record promises most of, then stricter or cheaper ones.

    The first is run in all `ways` of `skipped_kv`, the others in the one that kept more.
    """
    order = _order(policy, int(record.layers[-1]))
    outcomes = [record.outcome(threshold) for threshold in order]
    places = _onwards(outcomes, wish.promised(outcomes), 1 if wish.quality is None else -1)
    tried, other = len(ways), None
    calibrated: ExitCalibration | None = None
    failed, kept_at, at = -1, len(places), 0  # bounds of the first place that keeps; the one to run
    while failed < at < kept_at:
        exits = [with_threshold(policy, order[places[at]], skipped_kv=way) for way in ways]
        ran = [(run(one), one) for one in exits]
        kept, chosen = max(ran, key=lambda one: one[0].quality)  # project where they are equal
        other = other or next((one for one, _ in ran if one is not kept), None)
        ways = [chosen.skipped_kv]
        p = wish.p_value(kept, tried)
        if wish.is_kept(kept, p):
            tokens, kept_at = record.answer.numel(), at
            calibrated = ExitCalibration(chosen, outcomes[places[at]], kept, other, p, tokens)
        else:
            failed = at
        at = (failed + kept_at) // 2
    if calibrated is not None:
        return calibrated
    wished = f"cost of {wish.cost}" if wish.quality is None else f"quality of {wish.quality}"
    raise HostError(
        f"no threshold that was run keeps a {wished} when tokens really leave, since later ones "
        "then see other keys and values; ask for less, or look at later layers (first)."
    )


def _ways(model: Any, policy: EarlyExit) -> list[SkippedKV]:
    """The ways in which tokens that leave can be treated on this host."""
    return [way for way in SKIPPED_KV if _can_skip(model, policy, way)]


def _can_skip(model: Any, policy: EarlyExit, way: SkippedKV) -> bool:
    """Whether tokens that leave can be treated so on this host, its attention included."""
    try:
        with depth(model, with_threshold(policy, policy.threshold, skipped_kv=way)):
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            model(input_ids=ids, assistant_masks=torch.ones_like(ids), use_cache=False)
    except HostError:
        if way == "project":
            raise
        return False
    return True


def with_threshold(policy: EarlyExit, threshold: Any, **settings: Any) -> EarlyExit:
    """The same exits at another threshold, and with other settings if given."""
    exits = from_settings(
        {"policy": policy.name, **policy.settings(), "threshold": threshold, **settings}
    )
    assert isinstance(exits, EarlyExit)
    return exits


@torch.inference_mode()
def flops_share(
    model: Any, processor: Any, items: Sequence[Item], policy: EarlyExit
) -> float | None:
    """FLOPs of an answer's token where tokens leave, as a share of the full model's.

    Traced while the first items are answered one at a time, since a token that leaves saves nothing
    in a batch, or where a whole answer is read at once. Looks count, and keys and values of skipped
    layers. None where the layers' FLOPs are not known.
    """
    inputs = [fitted_prompts(model, processor, [item], TOKENS) for item in items[:ALONE]]
    sums: list[int] = []
    for one in (policy, "plain"):
        with depth(model, one):
            traces = list(forced_traces(model, inputs, TOKENS))
        steps = [step for seen in traces for step in seen.flops[1:]]  # the first is the question's
        known = [step for step in steps if step is not None]
        if len(known) < len(steps):
            return None
        sums.append(sum(known))
    return sums[0] / sums[1]


def _last_passed(outcomes: Sequence[ExitOutcome], quality: float, limit: float) -> int:
    passes = (p_value(1 - outcome.qualities, 1 - quality) <= limit for outcome in outcomes)
    passed = sum(takewhile(bool, passes)) - 1
    if passed < 0:
        raise HostError(
            "even the strictest threshold cannot be shown to keep a quality of "
            f"{quality}; lower it, give more questions, or look at later layers (first)."
        )
    return passed


def _best_within(outcomes: Sequence[ExitOutcome], cost: float) -> int:
    within = [place for place, one in enumerate(outcomes) if one.executed <= cost + 1e-9]
    if not within:
        least = min(one.executed for one in outcomes)
        raise UsageError(
            f"cost is {cost}, but these exits go through {least:.3f} of the layers at least; "
            "allow more, or let tokens leave earlier (first)."
        )
    return max(within, key=lambda place: (outcomes[place].quality, -place))


def _onwards(outcomes: Sequence[ExitOutcome], place: int, step: int) -> list[int]:
    """The places from this one on, each at which another share of the layers runs."""
    places = range(place, len(outcomes) if step > 0 else -1, step)
    return [next(same) for _, same in groupby(places, key=lambda one: outcomes[one].executed)]
