"""Calibrated thresholds: the record of gates, what a setting costs, the search, the promise."""

import random
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from training import standins
from trol.depth import attach, attached, depth, trace
from trol.depth.attachment import cost_of, gates_of
from trol.errors import DataError, HostError, UsageError
from trol.evaluation.answers import answers
from trol.evaluation.calibration import calibrate_gates, most_changed, questions_for
from trol.evaluation.gates import Trial, at, last_holding, record_gates, search
from trol.evaluation.items import Item, prompts
from trol.evaluation.timing import time_prefills
from trol.family.loading import load_model
from trol.policies.mixer import TrolMixer

LAYERS, NEW = 4, 3


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read once in each way, since no time is looked at."""
    monkeypatch.setattr(
        "trol.evaluation.calibration.time_prefills", partial(time_prefills, rounds=1)
    )


def items(count: int) -> list[Item]:
    """Questions of a few words, all different."""
    source = random.Random(0)
    words = " ".join([*standins.ASKED, *standins.ANSWERED]).split()
    said = [" ".join(source.choices(words, k=source.randint(2, 9))) for _ in range(count)]
    return [Item(None, text, "7", "words") for text in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return standins.llm(tmp_path_factory.mktemp("llama"), num_hidden_layers=LAYERS)


def traversing(folder: str, policy: TrolMixer, biases: tuple[float, ...]) -> tuple[Any, Any]:
    """A random decoder whose gates have these biases, and spread around them."""
    model, processor = load_model(folder)
    source = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data = 0.2 * torch.randn(weight.shape, generator=source)
    attach(model, policy)
    for gate, bias in zip(gates_of(attached(model)[1]), biases, strict=True):
        gate.weight.data = 0.2 * torch.randn(gate.weight.shape, generator=source)
        gate.bias.data.fill_(bias)
    return model, processor


@pytest.fixture(scope="module")
def llama(folder: str) -> tuple[Any, Any]:
    """Layers 0 and 2 open, 1 half, 3 all but shut."""
    return traversing(folder, TrolMixer(), (0.8, 0.0, 0.8, -12.0))


@pytest.mark.parametrize("passes", [2, 3])
def test_the_record_is_the_gates(folder: str, passes: int) -> None:
    """Its shares are the visits that a policy of one layer's threshold really makes."""
    policy = TrolMixer(passes, sharing="shared")
    model, processor = traversing(folder, policy, (0.0,) * LAYERS)
    asked = items(12)
    record = record_gates(model, processor, asked, policy, new_tokens=NEW)
    assert record.answers == tuple(answers(model, processor, asked, new_tokens=NEW))
    inputs = prompts(processor, asked)
    assert record.least.shape == (LAYERS, passes - 1, inputs["attention_mask"].sum())
    for tau in (0.4, 0.5):  # layer 0 sees the same states whatever the thresholds are
        with depth(model, at(policy, (tau,) * LAYERS)), trace(model) as seen:
            model(**inputs)
        later = (seen.visits - 1)[0][seen.real].double().mean() / (passes - 1)
        assert record.shares((tau,) * LAYERS)[0] == pytest.approx(later.item())
        assert 0 < later < 1
    assert record.shares((None, 0.0, None, 0.0)) == [0, 1, 0, 1]


def test_costs_by_hand(llama: tuple) -> None:
    model, processor = llama
    record = record_gates(model, processor, items(8), TrolMixer(), new_tokens=NEW)
    layer = cost_of(model).layers[0]
    assert layer is not None
    assert layer.keys_per_token is not None
    assert record.flops
    assert record.visit[0] > layer.per_token
    assert record.keys[0] == layer.keys_per_token + 2 * 64  # the gate is asked as well
    assert record.cost((0.0,) * LAYERS) == pytest.approx(2)
    assert record.cost((None,) * LAYERS) == 1
    assert record.cost((0.0, None, None, None)) == pytest.approx(1.25)
    share = record.shares((0.5, None, None, None))[0]
    again = share * record.visit[0] + (1 - share) * record.keys[0]
    by_hand = 1 + again / sum(record.visit)
    assert record.cost((0.5, None, None, None)) == pytest.approx(by_hand)


class Scored(Trial):
    """A trial whose faults are a sum over layers of harm x tokens left out."""

    harm: tuple[float, ...]
    record: Any

    def changed(self, thresholds: Any) -> int:
        left = [1 - share for share in self.record.shares(thresholds)]
        self.counts[thresholds] = round(sum(h * n for h, n in zip(self.harm, left, strict=True)))
        return self.counts[thresholds]


def scored(llama: tuple, harm: tuple[float, ...]) -> tuple[Scored, Any]:
    record = record_gates(*llama, items(8), TrolMixer(), new_tokens=NEW)
    trial = Scored(*llama, items(8), TrolMixer(), NEW, record.answers, lambda: None)
    trial.harm, trial.record = harm, record
    return trial, record


def test_harmless_layers_go_first(llama: tuple) -> None:
    """Each step leaves out more than the one before it; the last is within what is allowed."""
    trial, record = scored(llama, (40, 2, 40, 0))
    order = search(trial, record, allowed=6)
    assert order[0] == (0.0,) * LAYERS
    costs = [record.cost(setting) for setting in order]
    assert costs == sorted(set(costs), reverse=True)
    for before, after in pairwise(order):
        pairs = zip(before, after, strict=True)
        assert all(b is None or b <= a if a is not None else True for b, a in pairs)
    last = order[-1]
    assert (last[1], last[3]) == (None, None)
    assert last[0] is not None
    assert last[2] is not None
    assert max(last[0], last[2]) > 0
    assert trial.changed(last) <= 6
    first_gone = next(setting for setting in order if None in setting)
    assert first_gone[3] is None
    assert first_gone[1] is not None


def test_where_everything_is_needed_nothing_goes(llama: tuple) -> None:
    trial, record = scored(llama, (1e6,) * LAYERS)
    order = search(trial, record, allowed=0)
    assert all(record.shares(setting) == [1] * LAYERS for setting in order)
    assert all(None not in setting for setting in order)


def test_the_bisection_finds_the_last() -> None:
    for most in (0, 1, 6):
        for last in range(most + 1):
            assert last_holding(most, lambda place, last=last: place <= last) == last


def test_a_random_model_is_calibrated(llama: tuple) -> None:
    """The promise holds on the half that judged; figures are those of running."""
    model, processor = llama
    calls: list[tuple[int, int]] = []
    asked = items(120)
    calibrated = calibrate_gates(
        model,
        processor,
        asked,
        new_tokens=NEW,
        quality=0.8,
        confidence=0.8,
        progress=lambda done, of: calls.append((done, of)),
    )
    assert calibrated.policy.threshold(3) is None  # its gates are all but shut
    assert calibrated.kept.questions == 60
    assert calibrated.p_value <= 0.2
    assert 0.8 <= calibrated.at_least <= calibrated.kept.share
    full, sparse = calibrated.cost
    assert (full, calibrated.flops) == (pytest.approx(2), True)
    assert 1 <= sparse < full
    assert calibrated.shares[3] == 0
    assert all(0 <= share <= 1 for share in calibrated.shares)
    judged = asked[1::2]
    with depth(model, calibrated.policy):
        given = answers(model, processor, judged, new_tokens=NEW)
    with depth(model, TrolMixer()):
        wanted = answers(model, processor, judged, new_tokens=NEW)
    assert sum(a != b for a, b in zip(given, wanted, strict=True)) == calibrated.kept.changed
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert all(done <= of for done, of in calls)
    assert [read.questions for read in calibrated.prefill] == [1, 32]
    assert all(read.ratio["plain"] == 1 for read in calibrated.prefill)
    as_json = calibrated.json()
    assert as_json["policy"]["tau"][3] is None
    assert as_json["second_visits"] == list(calibrated.shares)
    assert attached(model)[1].depth_policy == TrolMixer()  # what the model carries is as it was


def test_shut_gates_need_no_second_visit(folder: str) -> None:
    """At any quality below 1 everything goes, and the model is the plain one."""
    model, processor = traversing(folder, TrolMixer(tau=0.3), (-30.0,) * LAYERS)
    for gate in gates_of(attached(model)[1]):
        gate.weight.data.zero_()
    quality = 0.97
    count = questions_for(quality, 0.7)
    calibrated = calibrate_gates(
        model, processor, items(count), new_tokens=1, quality=quality, confidence=0.7
    )
    assert calibrated.policy.settings()["tau"] == [None] * LAYERS
    assert calibrated.kept.share == 1
    assert calibrated.shares == (0.0,) * LAYERS
    assert calibrated.cost[1] == 1


def test_what_is_judged_decides(llama: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other questions show more faults, a setting that leaves out less is taken."""
    real, asked = Trial.changed, items(40)
    judge = asked[1::2]

    def changed(trial: Trial, setting: Any) -> int:
        return (
            sum(one is None for one in setting) * 9
            if trial.items == judge
            else real(trial, setting)
        )

    monkeypatch.setattr(Trial, "changed", changed)
    calibrated = calibrate_gates(*llama, asked, new_tokens=1, quality=0.6, confidence=0.6)
    assert most_changed(20, 0.6, 0.6) < 9
    assert None not in (calibrated.policy.threshold(layer) for layer in range(LAYERS))


def test_refusals(llama: tuple, folder: str) -> None:
    model, processor = llama
    given = {"new_tokens": 1, "quality": 0.9, "confidence": 0.9}
    with pytest.raises(DataError, match="no questions"):
        calibrate_gates(model, processor, [], **given)
    with pytest.raises(UsageError, match=r"42 questions, of which half .*; give 44 or more"):
        calibrate_gates(model, processor, items(42), **given)
    for quality in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="quality is"):
            calibrate_gates(model, processor, items(44), **{**given, "quality": quality})
    bare, _ = load_model(folder)
    with pytest.raises(UsageError, match="no policy, and so no gates"):
        calibrate_gates(bare, processor, items(44), **given)
    with pytest.raises(UsageError, match="passes is 1"):
        calibrate_gates(attach(bare, TrolMixer(1)), processor, items(44), **given)


def test_gates_that_nobody_is_asked_by(folder: str) -> None:
    model, processor = traversing(folder, TrolMixer(scope="answer"), (0.0,) * LAYERS)
    with pytest.raises(HostError, match="scope 'answer'"):
        record_gates(model, processor, items(4), TrolMixer(scope="answer"), new_tokens=1)
