"""What a policy computes: the formula by hand, in three independent ways."""

import pytest
import torch
from hosts import HOSTS, Host

from trol import depth
from trol.depth import attached, detach
from trol.depth.host import gates_of
from trol.policies.mixer import TrolMixer

from .naive import naive_logits
from .subjects import (
    HOLED,
    POLICIES,
    attach_settled,
    gap,
    gates_as_tensors,
    hosts_and_attns,
    layers_of,
    some_hosts,
)

TURNS = (False, False, False, True, True, False, False, True)
"""Question, answer, question, answer, over and over."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def naive_cases() -> list[object]:
    """Every host with keys and values in every layer; every policy."""
    return [
        pytest.param(host, name, make, id=f"{host.name}-{name}")
        for host in HOSTS.values()
        if not host.hybrid and host.name != "gemma3_vl"  # its images are not read token by token
        for name, make in {**POLICIES, **HOLED}.items()
        if not (name in HOLED and host.name == "bloom")
    ]


@pytest.mark.parametrize(("host", "name", "make"), naive_cases())
def test_every_policy_is_the_naive_loop(host: Host, name: str, make) -> None:
    """One call with several turns == one token, one visit, one layer call at a time."""
    model, inputs = host.build("eager"), host.inputs(length=11)
    plain = model(**inputs).logits
    attach_settled(model, make())
    length = inputs["input_ids"].shape[1]
    turns = torch.tensor([(TURNS * length)[:length]])
    whole = model(**inputs, assistant_masks=turns, use_cache=False).logits
    policy, gates = attached(model)[1].depth_policy, gates_as_tensors(model)
    detach(model)
    expected = naive_logits(
        model, layers_of(model), policy, inputs, answer=turns[0].tolist(), gates=gates
    )
    assert gap(whole, expected) <= host.default_exact
    if name != "plain":
        assert gap(whole, plain) > 1e-2  # the policy matters on these weights
