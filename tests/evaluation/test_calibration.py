"""Calibration: its statistics by hand, its record against running, its choices, its refusals."""

import random
from typing import Any

import pytest
import torch
from scipy import stats

from training import standins
from trol.depth import attach, attached, detach
from trol.depth.attachment import gates_of
from trol.errors import DataError, HostError, UsageError
from trol.evaluation.calibration import at_least, binomial_tail, most_changed, needed, p_value
from trol.evaluation.exit_calibration import (
    EXIT_THRESHOLDS,
    calibrate_exits,
    flops_share,
    sweeps,
    with_threshold,
)
from trol.evaluation.hidden_states import ExitOutcome, predicting_tokens, record_exits, run_exits
from trol.evaluation.items import Item
from trol.family.loading import load_model
from trol.host.layers import FAMILY_NOTES, FamilyNote
from trol.policies.exits import EarlyExit


def _items(count: int, words: int) -> list[Item]:
    """Answers of so many words, the same on every call."""
    source = random.Random(0)
    return [
        Item(
            None,
            standins.ASKED[place % 4],
            " ".join(source.choice(standins.ANSWERED) for _ in range(words)),
            "words",
        )
        for place in range(count)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    model, processor = load_model(folder)
    source = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = 0.2 * torch.randn(weight.shape, generator=source)
    return model, processor


def test_the_binomial_tail_is_scipy_s() -> None:
    for n, share in ((1, 0.5), (20, 0.05), (300, 0.1), (2000, 0.02)):
        for most in (0, 1, n // 20, n // 2, n):
            expected = stats.binom.cdf(most, n, share)
            assert binomial_tail(most, n, share) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_p_values() -> None:
    """Without faults quality^n; never smaller with more faults; true hypotheses rarely refuted."""
    assert p_value(torch.zeros(45), 0.05) == pytest.approx(0.95**45)
    assert [needed(0.95, 0.9), needed(0.9, 0.9), needed(0.5, 0.5)] == [45, 22, 1]
    assert p_value(torch.zeros(45), 0.05) <= 0.1 < p_value(torch.zeros(44), 0.05)
    grown = [p_value(torch.full((60,), share), 0.1) for share in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0)]
    assert grown == sorted(grown)
    assert grown[-1] == 1.0
    source = torch.Generator().manual_seed(0)
    drawn = torch.rand(400, 150, generator=source)
    for losses in ((drawn < 0.1).double(), 0.2 * drawn):  # their means are 0.1
        refuted = sum(p_value(row, 0.1) <= 0.1 for row in losses)
        assert refuted <= 50  # of 40 on average at most


def test_how_many_answers_may_differ() -> None:
    """The most faults whose tail is still small; the share that they show, as scipy has it."""
    for n, quality, confidence in ((230, 0.99, 0.9), (229, 0.99, 0.9), (500, 0.9, 0.95)):
        most = most_changed(n, quality, confidence)
        tails = [stats.binom.cdf(k, n, 1 - quality) for k in (most, most + 1)]
        assert most < 0 or tails[0] <= 1 - confidence
        assert tails[1] > 1 - confidence
    assert [most_changed(n, 0.99, 0.9) for n in (229, 230)] == [-1, 0]
    for faults, n in ((0, 45), (3, 200), (20, 20)):
        shown = stats.beta.ppf(0.9, faults + 1, n - faults) if faults < n else 1.0
        assert at_least(faults, n, 0.9) == pytest.approx(1 - shown, abs=1e-5)


def test_thresholds_are_fixed_and_strict_first() -> None:
    assert list(EXIT_THRESHOLDS) == sorted(EXIT_THRESHOLDS, reverse=True)
    assert (EXIT_THRESHOLDS[0], EXIT_THRESHOLDS[-1]) == (0.999999, 0.0)


@pytest.mark.parametrize("measure", ["entropy", "margin", "saturation", "patience"])
def test_the_record_is_what_happens(llama: tuple, measure: str) -> None:
    """Exactly, where no token follows one that left; the last word of an answer is not counted."""
    items, policy = _items(20, words=1), EarlyExit(measure, 1.0)
    record = record_exits(*llama, items, policy)
    assert record.layers.tolist() == [1, 2, 3, 4]
    executed = set()
    for threshold in (0.0, 0.3, 0.6, 0.999999) if measure != "patience" else (1, 2):
        predicted = record.outcome(threshold)
        ran = run_exits(*llama, items, with_threshold(policy, threshold))
        torch.testing.assert_close(predicted.qualities, ran.qualities)
        torch.testing.assert_close(predicted.shares, ran.shares, rtol=1e-6, atol=1e-6)
        executed.add(round(ran.executed, 6))
    assert len(executed) > 1


def test_an_outcome_by_hand(llama: tuple) -> None:
    """Token by token: the first look that is sure, its agreement, means over answers."""
    items, policy = _items(6, words=4), EarlyExit("margin", 1.0, first=2)
    record = record_exits(*llama, items, policy)
    by_answer: dict[int, list[tuple[float, float]]] = {}
    for token, answer in enumerate(record.answer.tolist()):
        looks = zip(record.confidence[:, token], record.agrees[:, token], (2, 3), strict=True)
        sure = [(float(agrees), layer / 4) for sure, agrees, layer in looks if sure >= 0.2]
        by_answer.setdefault(answer, []).append((sure or [(1.0, 1.0)])[0])
    qualities, shares = (
        [sum(pair[place] for pair in pairs) / len(pairs) for pairs in by_answer.values()]
        for place in (0, 1)
    )
    outcome = record.outcome(0.2)
    assert outcome.qualities.tolist() == pytest.approx(qualities)
    assert outcome.shares.tolist() == pytest.approx(shares)
    assert outcome.json() == {"quality": outcome.quality, "executed": outcome.executed}
    chosen = torch.cat([each.flatten() for _, each in predicting_tokens(*llama, items)])
    assert chosen.sum() == len(record.answer)


def test_the_cheapest_that_keeps_the_quality(llama: tuple) -> None:
    """It passes its test when run; the next more lenient threshold of the record does not."""
    items, policy = _items(60, words=3), EarlyExit("margin", 1.0)
    calibrated = calibrate_exits(*llama, items, policy, quality=0.6, confidence=0.8)
    assert calibrated.p_value is not None
    assert calibrated.p_value <= 0.2
    assert calibrated.ran.quality >= 0.6
    assert calibrated.ran.executed < 1
    assert calibrated.policy == with_threshold(policy, calibrated.policy.thresholds[0])
    record = record_exits(*llama, items, policy)
    place = EXIT_THRESHOLDS.index(calibrated.policy.thresholds[0])
    torch.testing.assert_close(
        calibrated.predicted.qualities, record.outcome(EXIT_THRESHOLDS[place]).qualities
    )
    tested = [p_value(1 - record.outcome(t).qualities, 0.4) <= 0.2 for t in EXIT_THRESHOLDS]
    assert all(tested[: place + 1])
    stricter = calibrate_exits(*llama, items, policy, quality=0.8, confidence=0.8)
    assert stricter.ran.executed > calibrated.ran.executed
    as_json = calibrated.json()
    assert as_json["answers"] == 60
    assert as_json["policy"]["threshold"] == calibrated.policy.thresholds[0]


@pytest.mark.parametrize("cost", [0.5, 0.8, 1.0])
def test_the_best_within_a_cost(llama: tuple, cost: float) -> None:
    items, policy = _items(16, words=3), EarlyExit("entropy", 1.0)
    calibrated = calibrate_exits(*llama, items, policy, cost=cost)
    assert calibrated.ran.executed <= cost + 1e-9
    assert calibrated.p_value is None
    if cost == 1.0:
        assert calibrated.ran.quality == 1


def test_flops_have_the_looks_among_them(llama: tuple) -> None:
    """Never leaving costs the looks on top; leaving saves what no key or value needs."""
    items = _items(3, words=3)
    shares = [
        flops_share(*llama, items, EarlyExit("margin", threshold, every=every))
        for threshold, every in ((1.0, 1), (1.0, 2), (0.0, 1))
    ]
    assert None not in shares
    often, seldom, out = shares
    assert often > seldom > 1
    assert out < seldom
    calibrated = calibrate_exits(*llama, items, EarlyExit("margin", 1.0), cost=1.0)
    assert calibrated.json()["flops_share"] == flops_share(*llama, items, calibrated.policy)


def test_calls_are_counted(llama: tuple) -> None:
    seen: list[tuple[int, int]] = []
    calibrate_exits(
        *llama,
        _items(20, words=1),
        EarlyExit("margin", 1.0),
        cost=1.0,
        progress=lambda done, of: seen.append((done, of)),
    )
    # A record and both ways, 2 batches each; at most 121 thresholds could be halved 7 times.
    assert seen == [(done, 2 * (3 + 7)) for done in range(1, 7)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_what_ran_decides(llama: tuple, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Where running keeps less than the record promised, the next that keeps it is taken.

    It is the one that trying one after the other finds, in fewer runs than are announced.
    """
    items, policy, calls = _items(20, words=1), EarlyExit("margin", 1.0), []
    record = record_exits(*llama, items, policy)
    executed = {t: record.outcome(t).executed for t in EXIT_THRESHOLDS}
    levels = sorted(set(executed.values()))
    limit = levels[round(share * (len(levels) - 1))]

    def outcome(*given: Any, **_: Any) -> ExitOutcome:
        calls.append(given[3].thresholds[0])
        kept = torch.full((20,), float(executed[calls[-1]] >= limit), dtype=torch.double)
        return ExitOutcome(kept, kept)

    monkeypatch.setattr("trol.evaluation.exit_calibration.run_exits", outcome)
    calibrated = calibrate_exits(*llama, items, policy, quality=0.5, confidence=0.6)
    walk = [one for one in reversed(EXIT_THRESHOLDS) if one >= calls[0]]
    assert calibrated.policy.thresholds[0] == next(t for t in walk if executed[t] >= limit)
    assert 1 + len(calls) <= sweeps(llama[0], policy)[1]


def test_what_no_run_keeps_is_refused(llama: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    items, policy = _items(20, words=1), EarlyExit("margin", 1.0)
    monkeypatch.setattr(
        "trol.evaluation.exit_calibration.run_exits",
        lambda *given, words: ExitOutcome(0.0 * words[:20].double(), run_exits(*given).shares),
    )
    with pytest.raises(HostError, match="when tokens really leave"):
        calibrate_exits(*llama, items, policy, quality=0.5, confidence=0.6)


def test_trained_heads_are_used(llama: tuple) -> None:
    model, processor = llama
    items, policy = _items(20, words=1), EarlyExit("margin", 1.0, heads=True)
    plain = record_exits(model, processor, items, EarlyExit("margin", 1.0))
    attach(model, policy)
    try:
        same = record_exits(model, processor, items, policy)
        torch.testing.assert_close(same.confidence, plain.confidence)
        for gate in gates_of(attached(model)[1]):
            if gate is not None:
                torch.nn.init.normal_(gate.weight, std=0.1)
        other = record_exits(model, processor, items, policy)
        assert (other.confidence - plain.confidence).abs().max() > 0.01
        ran = run_exits(model, processor, items, with_threshold(policy, 0.1))
        torch.testing.assert_close(other.outcome(0.1).qualities, ran.qualities)
    finally:
        detach(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "either a wanted quality or a wanted cost"),
        ({"quality": 0.9, "cost": 0.5}, "either"),
        ({"quality": 1.0}, r"quality is 1.0, but must lie in \(0, 1\)"),
        ({"quality": float("nan")}, "quality is no number; give one in"),
        ({"quality": 0.9, "confidence": 1.0}, "confidence is 1.0"),
        ({"cost": 0.0}, "share of the layers"),
        ({"quality": 0.95}, "8 answers cannot show a quality of 0.95 .*; give 45 or more"),
        ({"cost": 0.2}, "go through 0.250 of the layers at least"),
    ],
)
def test_wishes_that_cannot_be(llama: tuple, settings: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        calibrate_exits(*llama, _items(8, words=2), EarlyExit("margin", 1.0), **settings)


def test_answers_that_say_nothing(llama: tuple) -> None:
    """Too short to predict anything; a policy whose exits are not in answers alone."""
    model, processor = llama
    with pytest.raises(UsageError, match="scope='answer'"):
        calibrate_exits(model, processor, _items(8, 2), EarlyExit(scope="all"), cost=1.0)
    items = [Item(None, "say a word.", "", "words")] * 8
    with pytest.raises(DataError, match="longer answers"):
        calibrate_exits(model, processor, items, EarlyExit("margin", 1.0), cost=1.0)


@pytest.mark.parametrize("better", ["project", "hole"])
def test_the_way_that_keeps_more_is_taken(
    llama: tuple, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    """And its p-value is doubled, since the better of two may be so by chance."""

    def outcome(
        model: Any, processor: Any, items: Any, policy: EarlyExit, *_: Any, **__: Any
    ) -> ExitOutcome:
        ran = run_exits(model, processor, items, policy)
        kept = 1.0 if policy.skipped_kv == better else 0.9
        return ExitOutcome(torch.full_like(ran.qualities, kept), ran.shares)

    monkeypatch.setattr("trol.evaluation.exit_calibration.run_exits", outcome)
    items = _items(20, words=1)
    calibrated = calibrate_exits(*llama, items, EarlyExit(), quality=0.5, confidence=0.6)
    assert calibrated.policy.skipped_kv == better
    assert calibrated.json()["other_skipped_kv"]["quality"] == pytest.approx(0.9)
    assert calibrated.p_value == pytest.approx(2 * p_value(torch.zeros(20), 0.5))


def test_a_host_that_hides_no_tokens_projects(
    llama: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILY_NOTES, "llama", FamilyNote(no_holes="of a test"))
    calibrated = calibrate_exits(*llama, _items(20, words=1), EarlyExit(), cost=1.0)
    assert calibrated.policy.skipped_kv == "project"
    assert calibrated.other is None
