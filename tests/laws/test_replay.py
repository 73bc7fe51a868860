"""Replaying a trace gives the traced run again."""

import json

import pytest
import torch

from hosts import HOSTS, Host
from hosts.checks import greedy
from trol import depth
from trol.depth import attach, trace
from trol.depth.policy import from_settings, to_settings
from trol.errors import UsageError
from trol.policies.planned import Planned, Replay

from .subjects import HOLED, assert_same, attach_settled, gap, made, policy_cases, some_hosts

pytestmark = pytest.mark.usefixtures("no_grad")
NOT_REPLAYED = (*HOLED, "exit_heads")
CASES = [
    case
    for case in policy_cases("llama", "gemma3", "gpt2", "qwen3_vl")
    if case.values[1] not in NOT_REPLAYED
]


@pytest.mark.parametrize(("host", "name"), CASES)
def test_replay_is_the_policy(host: Host, name: str) -> None:
    """Question and answer by turns in one call, then a prompt and its decoding steps."""
    policy = made(name)
    model, inputs = attach_settled(host.build(), policy), host.inputs(batch=2)
    roles = torch.zeros_like(inputs["input_ids"])
    roles[0, -4:-1], roles[1, -2:] = 1, 1
    said = {**inputs, "assistant_masks": roles, "use_cache": False}
    expected = model(**said).logits
    with trace(model) as seen:
        assert gap(model(**said).logits, expected) == 0
    replay = Replay.of(seen, scope=policy.scope, keep_first=policy.keep_first)
    with depth(model, "exit@1"), depth(model, replay):
        assert gap(model(**said).logits, expected) <= host.default_exact
    decoded = greedy(model, inputs)
    with trace(model) as seen:
        greedy(model, inputs)
    replay = Replay.of(seen, scope=policy.scope, keep_first=policy.keep_first)
    with depth(model, replay), trace(model) as again:
        assert_same(greedy(model, inputs), decoded, host.default_exact)
    # Also where a gate is 3e-8 (llama-trol has one; 1 - w_1 rounds it away), but not where it is 0.
    assert torch.equal(again.visits, seen.visits.where(seen.weights[:, -1] > 0, again.visits))
    assert (again.weights - seen.weights).abs().max() <= 1e-5


@pytest.mark.parametrize("host", some_hosts("llama", "gemma3", "qwen3_next", "internvl"))
def test_replay_on_another_model(host: Host) -> None:
    """A trace is a plan: what one model decided, another that has no gates can follow."""
    model, rows = attach_settled(host.build(), made("trol_tau")), host.left_padded()
    with trace(model) as seen:
        expected = greedy(model, rows.batch)
    settings = json.loads(json.dumps(to_settings(Replay.of(seen))))
    other = attach(host.build(), from_settings(settings))
    assert_same(greedy(other, rows.batch), expected, host.default_exact)
    beams = {"num_beams": 2, "max_new_tokens": 2, "do_sample": False}
    assert other.generate(**rows.batch, **beams).shape[0] == 3


def test_replay_of_rows_with_different_plans() -> None:
    host = HOSTS["llama"]
    model, inputs = attach(host.build(), Planned(["0:3 1", "1-3", "all"])), host.inputs(batch=3)
    with trace(model) as seen:
        expected = greedy(model, inputs)
    with depth(model, Replay.of(seen)):
        assert_same(greedy(model, inputs), expected, 5e-5)


def test_replay_refuses_what_was_not_traced() -> None:
    host = HOSTS["llama"]
    model, inputs = attach_settled(host.build(), made("trol_all")), host.inputs()
    with trace(model) as seen:
        model(**inputs)
    with depth(model, Replay.of(seen)):
        with pytest.raises(UsageError, match="covers 9 tokens, this call ends at 10"):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        with pytest.raises(UsageError, match="covers 9 tokens"):
            model(**host.inputs(length=12))
    deeper = attach(host.build(layers=6), "all")
    with (
        pytest.raises(UsageError, match="the trace has 4 layers, this stack has 6"),
        depth(deeper, Replay.of(seen)),
    ):
        pass


def test_a_trace_of_translated_states_is_refused() -> None:
    """Visits and weights do not tell what a trained exit head made of a state."""
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made("exit_heads"))
    with trace(model) as seen:
        greedy(model, host.inputs())
    with pytest.raises(UsageError, match="heads=False"):
        Replay.of(seen, scope="answer")


def test_traces_that_cannot_be_read() -> None:
    host = HOSTS["llama"]
    model = attach_settled(host.build(), made("trol"))
    with trace(model) as nothing:
        pass
    for read in (lambda: nothing.visits, lambda: nothing.weights, lambda: nothing.cost):
        with pytest.raises(UsageError, match="saw no forward pass"):
            read()
    with trace(model) as mixed:
        model(**host.inputs())
        model(**host.inputs(batch=2))
    with pytest.raises(UsageError, match="batches of different sizes"):
        mixed.visits  # noqa: B018
