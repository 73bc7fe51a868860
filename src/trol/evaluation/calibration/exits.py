"""Early exits: the threshold that saves most at a wanted quality, or the reverse.

One pass of the full model over questions with their answers records, at every look, how sure each
token is and whether its prediction is the full model's already. All thresholds are judged from
this record; the chosen one is then run for real, because tokens that left change later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trol.depth.registry import from_settings
from trol.errors import HostError, UsageError
from trol.evaluation.calibration.evidence import Progress, check_count, check_wish, p_value
from trol.evaluation.exit_record import BATCH, Outcome, flops_share, recorded, run
from trol.evaluation.tasks import Item
from trol.policies.exits import EarlyExit

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
