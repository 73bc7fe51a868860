"""Early exits on every host: the laws, what leaving costs, and what each measure asks for."""

import pytest
import torch

from hosts import CHECKS, HOSTS, Host
from hosts.checks import greedy
from trol import depth
from trol.depth import AbstractPolicy, attach, attached, detach, trace
from trol.depth.attachment import gates_of
from trol.errors import HostError
from trol.policies.exits import EarlyExit

from .naive import naive_logits
from .subjects import (
    SURE,
    assert_same,
    attach_settled,
    gap,
    gates_as_tensors,
    layers_of,
    made,
    recomputed,
    some_hosts,
)
from .test_cost import COUNTED, _count, _counting

pytestmark = pytest.mark.usefixtures("no_grad")

MEASURED = {
    "entropy": EarlyExit("entropy", 0.55, scope="all"),
    "margin": EarlyExit("margin", [0.3, 0.2, 0.1], scope="all"),
    "saturation": EarlyExit("saturation", 0.45, scope="all"),
    "patience": EarlyExit("patience", 1, scope="all"),
    "late": EarlyExit("margin", 0.25, first=2, scope="all"),
    "seldom": EarlyExit("entropy", 0.5, first=1, every=2, scope="all"),
    "heads": EarlyExit("saturation", 0.3, heads=True, scope="all"),
}
"""Each measure and setting, on Llama at thresholds between its tokens."""


@pytest.mark.parametrize("host", some_hosts(*HOSTS))
def test_on_every_host(host: Host) -> None:
    """Cached = uncached, padded rows = alone, causal; tokens leave at different depths."""
    model, inputs = attach_settled(host.build(), made("exit_sure")), host.inputs(batch=2)
    with trace(model) as seen:
        model(**inputs)
    assert len({tuple(column) for column in seen.visits.flatten(1).T.tolist()}) > 1
    assert_same(greedy(model, inputs), recomputed(host, model, inputs), host.default_exact)
    for check in ("left_padding", "right_padding", "causal"):
        assert CHECKS[check](host, model) <= host.default_exact


@pytest.mark.parametrize("name", MEASURED)
def test_every_measure_is_the_naive_one(name: str) -> None:
    host, policy = HOSTS["llama"], MEASURED[name]
    model, inputs = host.build("eager"), host.inputs(length=11)
    attach_settled(model, policy)
    with trace(model) as seen:
        whole = model(**inputs, use_cache=False).logits
    executed = seen.visits.sum(0).flatten()
    assert len(executed.unique()) > 1
    gates = gates_as_tensors(model)
    detach(model)
    expected = naive_logits(
        model, layers_of(model), policy, inputs, answer=[False] * 11, gates=gates
    )
    assert gap(whole, expected) <= host.default_exact


@pytest.mark.parametrize("name", MEASURED)
def test_who_has_left_stays_away(name: str) -> None:
    """Visits never grow with depth; the state passes unchanged; nobody leaves where none looks."""
    host, policy = HOSTS["llama"], MEASURED[name]
    model, inputs = attach_settled(host.build(), policy), host.inputs(batch=3)
    full = _states(model, "plain", inputs)
    with trace(model) as seen:
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert (seen.visits.diff(dim=0) <= 0).all()
    leaves = {layer for layer in range(1, 4) if (seen.visits[layer] < seen.visits[layer - 1]).any()}
    assert leaves <= {layer for layer in range(4) if policy.looks(layer)}
    for layer in (1, 2):  # behind layer 3 stands the final norm
        away = seen.visits[layer - 1] == 0
        if not policy.heads:  # a head changes the state of one that leaves just here
            away = seen.visits[layer] == 0
        assert torch.equal(states[layer + 1][away], states[layer][away])
    assert gap(states[1], full[1]) <= 1e-6


def _states(model: torch.nn.Module, policy: str, inputs: dict) -> tuple[torch.Tensor, ...]:
    with depth(model, policy):
        return model(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("heads", [False, True], ids=["shared", "heads"])
@pytest.mark.parametrize("host", some_hosts(*COUNTED))
def test_looking_is_counted(host: Host, heads: bool) -> None:
    """Norms aside, a look is the head's product (and the translator's): counted by torch."""
    policy = EarlyExit("margin", SURE, scope="all", heads=heads)
    model, inputs = attach_settled(_counting(host), policy), host.inputs(batch=2)
    model(**inputs)
    with trace(model) as seen:
        model(**inputs, use_cache=False)
    assert seen.cost.flops == _count(model, inputs)


def test_nobody_left_nobody_looks() -> None:
    """Once all have left, layers are left at their keys and values and the head rests."""
    host, flops = HOSTS["llama"], []
    inputs = host.inputs(batch=2)
    for threshold in (0.0, 1.0):
        model = attach(_counting(host), EarlyExit("margin", threshold, scope="all"))
        model(**inputs)
        flops.append(_count(model, inputs))
        if threshold == 0.0:
            with trace(model) as seen:
                model(**inputs)
            assert seen.visits.sum((1, 2)).tolist() == [18, 0, 0, 0]
    detach(model)
    bare = _count(model, inputs)
    look = 2 * 32 * 99 * 18
    assert flops == [bare // 4 + look, bare + 3 * look]


def test_heads_are_the_identity_until_they_learn() -> None:
    host = HOSTS["llama"]
    inputs, said = host.inputs(batch=2), []
    for heads in (False, True):
        model = attach(host.build(), EarlyExit("margin", 0.25, heads=heads))
        said.append(greedy(model, inputs))
    assert_same(*said, 0)
    gates = gates_of(attached(model)[1])
    assert [gate is not None for gate in gates] == [False, True, True, True]
    assert sum(p.numel() for p in model.parameters() if p.shape == (32, 32)) > 3 * 32 * 32


def test_training_goes_through_all_layers() -> None:
    """Exits are taught by the exit loss, at full depth; evaluation leaves."""
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs(batch=2)
    full = model(**inputs).logits
    attach_settled(model, EarlyExit("margin", 0.1, scope="all", heads=True))
    assert gap(model.train()(**inputs).logits, full) <= 1e-6
    assert gap(model.eval()(**inputs).logits, full) > 1e-2


def test_the_prompt_uses_all_layers() -> None:
    """Scope answer: the first new token is the full model's, later ones leave."""
    host = HOSTS["llama"]
    model, inputs = host.build(), host.inputs(batch=2)
    full = greedy(model, inputs)[1]
    attach(model, EarlyExit("margin", 0.0))
    with trace(model) as seen:
        said = greedy(model, inputs)[1]
    assert gap(said[:, 0], full[:, 0]) <= 1e-6
    assert seen.visits[:, :, :9].min() == 1
    assert seen.visits[:, :, 9:].sum((1, 2)).tolist() == [4, 0, 0, 0]


def test_a_decoder_without_its_head_is_refused() -> None:
    host = HOSTS["llama"]
    policy: AbstractPolicy = EarlyExit(scope="all")
    decoder = attach(host.build().model, policy)
    with pytest.raises(HostError, match="has no head"):
        decoder(**host.inputs())
    whole = attach(host.build(), policy)
    with pytest.raises(HostError, match="call the model that it belongs to"):
        whole.model(**host.inputs())


def test_holes_where_they_cannot_be() -> None:
    with pytest.raises(HostError, match="set skipped_kv='project'"):
        attach(HOSTS["falcon_h1"].build(), EarlyExit(skipped_kv="hole"))
