"""Sparse traversal: the thresholds that leave out most second visits and keep the answers.

An answer is kept where it is, word for word, that of full traversal. Layers and thresholds are
searched on one half of the questions, and what was found is judged on the other, in an order fixed
before (fixed-sequence testing): so the promise holds for questions that nobody has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trol.depth import attached, is_attached
from trol.errors import DataError, UsageError
from trol.evaluation.evidence import (
    Progress,
    at_least,
    binomial_tail,
    check_wish,
    most_faults,
    needed,
)
from trol.evaluation.gate_record import (
    GRID,
    GateRecord,
    Prefill,
    Taus,
    Trial,
    at,
    gates_recorded,
    prefills,
    search,
    visits_made,
)
from trol.evaluation.tasks import BATCH, Item
from trol.policies.mixer import TrolMixer


@dataclass(frozen=True)
class Kept:
    """How many of `questions` answers are those of full traversal."""

    faults: int
    questions: int

    @property
    def share(self) -> float:
        """The share of answers kept."""
        return 1 - self.faults / self.questions

    def p_value(self, quality: float) -> float:
        """Of the hypothesis that the share kept is below `quality`; exact binomial tail."""
        return binomial_tail(self.faults, self.questions, 1 - quality)


@dataclass(frozen=True)
class SparseCalibration:
    """A mixer with its thresholds, and how they were found."""

    policy: TrolMixer
    searched: Kept
    """On the questions that the thresholds were searched on."""
    kept: Kept
    """On the others."""
    p_value: float
    """Of the hypothesis that less than the wanted share is kept."""
    at_least: float
    """The lower confidence limit of that share, were this the only setting judged; over all that
    were judged, what holds with the wanted confidence is the wanted quality."""
    shares: tuple[float, ...]
    """Of full traversal's second visits on each layer, the share that is still made: [L]."""
    cost: tuple[float, float]
    """Cost of a prompt under full and sparse traversal, of the plain model's: predicted."""
    flops: bool
    """Whether that is FLOPs; layer visits otherwise."""
    tried: int
    """Settings of thresholds whose answers were looked at."""
    prefill: tuple[Prefill, ...]
    """Measured in this run."""

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "policy": self.policy.settings(),
            "kept": {
                "share": self.kept.share,
                "at_least": self.at_least,
                "faults": self.kept.faults,
                "questions": self.kept.questions,
            },
            "p_value": self.p_value,
            "searched": {
                "share": self.searched.share,
                "questions": self.searched.questions,
                "tried": self.tried,
            },
            "second_visits": list(self.shares),
            "cost": {
                "unit": "FLOPs" if self.flops else "layer visits",
                "full": self.cost[0],
                "sparse": self.cost[1],
            },
            "prefill": [one.json() for one in self.prefill],
        }


def calibrate_taus(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    new_tokens: int,
    quality: float = 0.99,
    confidence: float = 0.9,
    progress: Progress = lambda done, of: None,
) -> SparseCalibration:
    """The mixer of `model` with the thresholds that cost least of those that keep the answers.

    Layers are left out in the order of the harm that each does alone, as many as the answers bear;
    then one threshold for the other layers is raised, and then each layer's own. Every setting is
    judged by really answering.

    Args:
        model: a model with a `TrolMixer` attached; its own thresholds do not matter.
        processor: its processor; of a text decoder, its tokenizer.
        items: questions of a split that nothing else is measured on.
        new_tokens: longest answer.
        quality: wanted share of answers as under full traversal, in (0, 1).
        confidence: that the quality holds on questions like these, in (0, 1).
        progress: called after each pass over half of the questions.

    Raises:
        DataError: there are no questions.
        UsageError: the model has no gates, a setting is outside its range, or too few items for
            the wanted confidence.
    """
    mixer = mixer_of(model)
    check_wishes(quality, confidence, None)
    if not items:
        raise DataError("there are no questions to calibrate on; give a set that has some.")
    check_halves(len(items), quality, confidence)
    layers = attached(model)[1].depth_layers
    given, passed = (model, processor), _counter(progress, layers)
    trials, records = [], []
    for half in (items[0::2], items[1::2]):
        records.append(gates_recorded(*given, half, mixer, new_tokens=new_tokens))
        full = records[-1].answers
        trials.append(Trial(*given, half, mixer, new_tokens, full, passed))
        passed()
    first, judge = trials
    allowed = most_faults(len(first.items), quality, confidence)
    order = search(first, records[0], allowed)
    chosen = order[0]
    for taus in order:
        if Kept(judge.faults(taus), len(judge.items)).p_value(quality) > 1 - confidence:
            break
        chosen = taus
    return _reported(first, judge, records[0], chosen, (quality, confidence))


def _reported(
    first: Trial, judge: Trial, record: GateRecord, chosen: Taus, wishes: tuple[float, float]
) -> SparseCalibration:
    mixer, model, processor = judge.mixer, judge.model, judge.processor
    policy, full = at(mixer, chosen), at(mixer, (0.0,))
    some = judge.items[: 2 * BATCH]
    made, of = (
        visits_made(model, processor, some, one, new_tokens=judge.new_tokens)
        for one in (policy, full)
    )
    kept = Kept(judge.faults(chosen), len(judge.items))
    everything: Taus = (0.0,) * len(chosen)
    return SparseCalibration(
        policy,
        Kept(first.faults(chosen), len(first.items)),
        kept,
        kept.p_value(wishes[0]),
        at_least(kept.faults, kept.questions, wishes[1]),
        tuple((made / of.clamp(min=1)).tolist()),
        (record.cost(everything), record.cost(chosen)),
        record.flops,
        len(first.found.keys() | judge.found.keys()),
        prefills(model, processor, judge.items, {"plain": "plain", "full": full, "sparse": policy}),
    )


def mixer_of(model: Any) -> TrolMixer:
    """The mixer attached to `model`.

    Raises:
        UsageError: it has none, or one that makes no second visits.
    """
    policy = attached(model)[1].depth_policy if is_attached(model) else None
    if not isinstance(policy, TrolMixer):
        raise UsageError(
            f"this model has {'no policy' if policy is None else f'the policy {policy.name}'}, and "
            "so no gates to calibrate; name a model that traverses (policy trol_mixer), or "
            "--exit MEASURE for early exits."
        )
    if policy.passes < 2:
        raise UsageError(
            "passes is 1, so there is no second visit to leave out; calibrate a mixer of two or "
            "more passes."
        )
    return policy


def questions_for(quality: float, confidence: float) -> int:
    """Questions to ask where nobody says: so many that some answers of each half may differ."""
    return 4 * needed(quality, confidence)


def check_wishes(quality: float, confidence: float, questions: int | None) -> None:
    """Raises `UsageError` where a wish is out of its range, or more than so many answers show."""
    check_wish("quality", quality)
    check_wish("confidence", confidence)
    if questions is not None:
        check_halves(questions, quality, confidence)


def check_halves(questions: int, quality: float, confidence: float) -> None:
    """Raises `UsageError` where half of the questions, on which is judged, cannot show enough."""
    if questions // 2 < needed(quality, confidence):
        raise UsageError(
            f"{questions} questions, of which half judge what the others found, cannot show a "
            f"quality of {quality} with a confidence of {confidence}; give "
            f"{2 * needed(quality, confidence)} or more, or ask for less."
        )


def _counter(progress: Progress, layers: int) -> Callable[[], None]:
    """Counts passes over half of the questions: how many there will be is about known."""
    made, expected = [0], 2 + 3 * layers + 3 * math.ceil(math.log2(len(GRID) * (layers + 1)))

    def passed() -> None:
        made[0] += 1
        progress(made[0], max(expected, made[0]))

    return passed
