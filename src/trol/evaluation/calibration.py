"""Calibration: the thresholds of gates that save most while the answers stay as they were.

An answer is kept if it is, word for word, that of full traversal. Layers and thresholds are
searched on one half of the questions and judged on the other, in an order fixed before
(fixed-sequence testing), so the promise holds for questions that the search never saw. How many
answers show what, and how surely, is here for `exit_calibration` too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trol.depth import attached, is_attached
from trol.depth.policy import check_number
from trol.errors import DataError, UsageError
from trol.evaluation import gates
from trol.evaluation.answers import StepsDone
from trol.evaluation.items import BATCH, Item
from trol.evaluation.timing import time_prefills
from trol.policies.mixer import TrolMixer


def needed(quality: float, confidence: float) -> int:
    """Fewest answers that can show `quality`, were there no fault: quality^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(quality))


def p_value(losses: Tensor, limit: float) -> float:
    """p-value of the hypothesis that the mean of losses in [0, 1] is above `limit`.

    Hoeffding-Bentkus:

        min(exp(-n h(min(m, limit), limit)), e P[Binomial(n, limit) <= ceil(n m)])

    with m the mean of the n losses and h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)).
    Learn then test (https://arxiv.org/abs/2110.01052, section 3.2); a plain binomial tail would
    hold only for losses that are 0 or 1.
    """
    n, mean = len(losses), losses.double().mean().item()
    low = min(mean, limit)
    divergence = (1 - low) * math.log((1 - low) / (1 - limit))
    divergence += low * math.log(low / limit) if low else 0.0
    tail = binomial_tail(math.ceil(n * mean - 1e-9), n, limit)
    return min(1.0, math.exp(-n * divergence), math.e * tail)


def binomial_tail(most: int, n: int, share: float) -> float:
    """P[Binomial(n, share) <= most]."""
    logs = (
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(share)
        + (n - k) * math.log1p(-share)
        for k in range(min(most, n) + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def most_changed(n: int, quality: float, confidence: float) -> int:
    """The most of `n` answers that may differ and still show `quality`; -1 where none may.

    For answers that are the same or not, so that the binomial tail is exact:
    max {k: P[Binomial(n, 1 - quality) <= k] <= 1 - confidence}.
    """
    too_many = (k for k in range(n) if binomial_tail(k, n, 1 - quality) > 1 - confidence)
    return next(too_many, n) - 1


def at_least(changed: int, n: int, confidence: float) -> float:
    """Lower limit of the share kept where `changed` of `n` answers differ (Clopper and Pearson)."""
    low, high = changed / n, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if middle < 1 and binomial_tail(changed, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return 1 - high


def check_share(name: str, value: float) -> None:
    """Raises `UsageError` unless 0 < value < 1."""
    check_number(name, value)
    if math.isnan(value):
        raise UsageError(f"{name} is no number; give one in (0, 1), such as 0.95.")
    if not 0 < value < 1:
        raise UsageError(
            f"{name} is {value}, but must lie in (0, 1): no finite set could show more."
        )


def check_exit_wishes(
    quality: float | None, cost: float | None, confidence: float, answers: int
) -> None:
    """Raises `UsageError` where a wish is out of its range, or more than so many answers show."""
    if (quality is None) == (cost is None):
        raise UsageError("give either a wanted quality or a wanted cost.")
    for name, value in (("quality", quality), ("confidence", confidence)):
        if value is not None:
            check_share(name, value)
    if cost is not None:
        check_number("cost", cost)
        if not 0 < cost <= 1:
            raise UsageError(f"cost is {cost}, but is a share of the layers, in (0, 1].")
    if quality is not None:
        check_count(answers, quality, confidence)


def check_count(answers: int, quality: float, confidence: float) -> None:
    """Raises `UsageError` where so many answers cannot show the quality, even without a fault."""
    least = needed(quality, confidence)
    if answers < least:
        raise UsageError(
            f"{answers} answers cannot show a quality of {quality} with a confidence of "
            f"{confidence}, even without a fault; give {least} or more, or ask for less."
        )


def calibrate_gates(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    *,
    new_tokens: int,
    quality: float = 0.99,
    confidence: float = 0.9,
    progress: StepsDone = lambda done, of: None,
) -> gates.GateCalibration:
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
    check_gate_wishes(quality, confidence, None)
    if not items:
        raise DataError("there are no questions to calibrate on; give a set that has some.")
    _check_halves(len(items), quality, confidence)
    layers = attached(model)[1].depth_layers
    expected = 2 + 3 * layers + 3 * math.ceil(math.log2(len(gates.GRID) * (layers + 1)))
    after_pass = counter(progress, lambda done: max(expected, done))
    trials, records = [], []
    for half in (items[0::2], items[1::2]):
        records.append(gates.record_gates(model, processor, half, mixer, new_tokens=new_tokens))
        full = records[-1].answers
        trials.append(gates.Trial(model, processor, half, mixer, new_tokens, full, after_pass))
        after_pass()
    first, judge = trials
    order = gates.search(first, records[0], most_changed(len(first.items), quality, confidence))
    chosen = order[0]
    for setting in order:
        if _p_value(judge.agreement(setting), quality) > 1 - confidence:
            break
        chosen = setting
    return _measured(first, judge, records[0], chosen, quality=quality, confidence=confidence)


def _measured(
    first: gates.Trial,
    judge: gates.Trial,
    record: gates.GateRecord,
    chosen: gates.Thresholds,
    *,
    quality: float,
    confidence: float,
) -> gates.GateCalibration:
    """The chosen thresholds with what they did to the answers, and what they cost."""
    model, processor, everything = judge.model, judge.processor, gates.full_traversal(len(chosen))
    policy, full = gates.at(judge.mixer, chosen), gates.at(judge.mixer, everything)
    made, most = (
        gates.count_second_visits(
            model, processor, judge.items[: 2 * BATCH], one, new_tokens=judge.new_tokens
        )
        for one in (policy, full)
    )
    kept = judge.agreement(chosen)
    policies = {"plain": "plain", "full": full, "sparse": policy}
    return gates.GateCalibration(
        policy,
        searched=first.agreement(chosen),
        kept=kept,
        p_value=_p_value(kept, quality),
        at_least=at_least(kept.changed, kept.questions, confidence),
        shares=tuple((made / most.clamp(min=1)).tolist()),
        cost=(record.cost(everything), record.cost(chosen)),
        flops=record.flops,
        tried=len(first.counts.keys() | judge.counts.keys()),
        prefill=time_prefills(model, processor, judge.items, policies),
    )


def _p_value(kept: gates.Agreement, quality: float) -> float:
    """For the hypothesis that the share kept is below `quality`; exact binomial tail."""
    return binomial_tail(kept.changed, kept.questions, 1 - quality)


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
    """Default number of questions: so many that some answers of each half may differ."""
    return 4 * needed(quality, confidence)


def check_gate_wishes(quality: float, confidence: float, questions: int | None) -> None:
    """Raises `UsageError` where a wish is out of its range, or more than so many answers show."""
    check_share("quality", quality)
    check_share("confidence", confidence)
    if questions is not None:
        _check_halves(questions, quality, confidence)


def _check_halves(questions: int, quality: float, confidence: float) -> None:
    """Raises `UsageError` where half of the questions, on which is judged, cannot show enough."""
    if questions // 2 < needed(quality, confidence):
        raise UsageError(
            f"{questions} questions, of which half judge the thresholds that the others chose, "
            f"cannot show a quality of {quality} with a confidence of {confidence}; give "
            f"{2 * needed(quality, confidence)} or more, or ask for less."
        )


def counter(progress: StepsDone, expected: Callable[[int], int]) -> Callable[[], None]:
    """Counts passes, and reports them with how many are expected after so many."""
    done = 0

    def passed() -> None:
        nonlocal done
        done += 1
        progress(done, expected(done))

    return passed
